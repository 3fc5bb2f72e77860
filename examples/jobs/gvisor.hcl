# A job template of one's own: containers that run under gVisor, on nodes kept
# for sandboxes, with an image that knows nothing of Bivouac.
#
#   bivouac agent -job-template=gvisor.hcl -job-var image=registry.example/agent:1.4
#
# The job block is Nomad's jobspec with one group. Bivouac adds the job's ID, its
# meta and the environment of its tasks, and sees to it that Nomad neither
# restarts, reschedules nor replaces the sandbox; a template that sets such
# things is refused, with the line and the reason.
#
# Expressions know the variables below as var.NAME, and of the session
#
#   session.id, session.chat_id                    anywhere
#   session.agent_id, session.volume_host_path     in env, meta and config
#   session.spare                                  anywhere: whether the sandbox is started
#                                                  for a pool, and has no chat yet
#
# A sandbox of a pool gets its volume when it already runs. gVisor keeps such a mount from
# its containers, so this template cannot be used with a pool. The embedded docker template
# shows how one can.
#
# Names that Nomad interpolates (${NOMAD_ALLOC_ID}, ${attr.kernel.name}, …) are
# left to Nomad.

variable "image" {
  description = "The image. It listens on the port that PORT tells."
  type        = string
}

variable "memory" {
  description = "Memory limit in MB."
  default     = 512
}

variable "logs" {
  description = "Whether Nomad keeps what the sandbox prints. That makes each start slower."
  default     = true
}

variable "dns" {
  description = "Name servers of the sandboxes."
  default     = ["10.0.0.53"]
}

# Where the volume is inside the sandbox: the value of BIVOUAC_WORKSPACE.
workspace = "/home/agent"

# The image has no health path, so an open port has to do. Docker's port proxy
# accepts connections before the container does; give images a path that answers
# with BIVOUAC_SESSION_ID, and ask for it with
#
#   type       = "http"
#   path       = "/healthz"
#   session_id = true
ready {
  port    = "agent"
  type    = "tcp"
  timeout = "45s"
}

job {
  node_pool   = "sandboxes"
  datacenters = ["*"]

  constraint {
    attribute = "${attr.cpu.arch}"
    value     = "amd64"
  }

  group "sandbox" {
    network {
      port "agent" {
        to = 3000
      }

      dns {
        servers = var.dns
      }
    }

    ephemeral_disk {
      size = 100
    }

    task "agent" {
      driver       = "docker"
      user         = "1000:1000"
      leader       = true
      kill_timeout = "10s"

      config {
        image           = var.image
        runtime         = "runsc"
        ports           = ["agent"]
        cap_drop        = ["all"]
        security_opt    = ["no-new-privileges"]
        readonly_rootfs = true
        pids_limit      = 512

        mount {
          type   = "bind"
          source = session.volume_host_path
          target = "/home/agent"
        }
      }

      env {
        AGENT = session.agent_id
      }

      resources {
        cpu    = 500
        memory = var.memory
      }

      logs {
        disabled      = !var.logs
        max_files     = 2
        max_file_size = 5
      }
    }
  }
}
