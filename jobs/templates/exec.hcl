# Runs the sandbox with Nomad's exec driver: a process in a chroot of its own,
# with limits on CPU and memory.
#
# The exec driver cannot mount a path of the host that a job names. What it can
# mount is a host volume that the client's configuration names:
#
#   client {
#     host_volume "bivouac" {
#       path      = "/srv/bivouac"
#       read_only = false
#     }
#   }
#
# This template mounts that volume, whole, at the same path inside the chroot,
# so that a session's volume_host_path, which has to lie beneath it, is the same
# path inside. Sandboxes of one node therefore see each other's volumes: keep
# them apart by their files' owners and modes, and use the docker template where
# sandboxes do not trust each other.

variable "command" {
  description = "What to run, as the chroot has it."
  type        = string
}

variable "args" {
  description = "The command's arguments."
  type        = list(string)
  default     = []
}

variable "host_volume" {
  description = "The name of the client's host volume."
  default     = "bivouac"
}

variable "volume_root" {
  description = "The path of the client's host volume, here and inside the sandbox."
  default     = "/srv/bivouac"
}

variable "user" {
  description = "The user to run as. Null: nobody."
  type        = string
  default     = null
}

variable "cpu" {
  description = "Share of CPU, in MHz."
  default     = 100
}

variable "memory" {
  description = "Memory limit in MB. A sandbox that exceeds it is killed."
  default     = 256
}

variable "datacenters" {
  description = "Where sandboxes may run."
  type        = list(string)
  default     = ["*"]
}

variable "ready_type" {
  description = "What shows that the sandbox is ready: http, a GET of ready_path that is answered with 2xx, or tcp, a connection to its port."
  default     = "http"
}

variable "ready_path" {
  description = "The path that answers once the sandbox is ready."
  default     = "/healthz"
}

variable "ready_session_id" {
  description = "Whether that answer has to hold the session's ID, so that nobody else on the port passes for the sandbox."
  default     = true
}

variable "ready_timeout" {
  description = "How long a sandbox may take until it is ready: 4m at most."
  default     = "60s"
}

workspace = session.volume_host_path

ready {
  port       = "http"
  type       = var.ready_type
  path       = var.ready_type == "tcp" ? null : var.ready_path
  session_id = var.ready_type == "tcp" ? null : var.ready_session_id
  timeout    = var.ready_timeout
}

job {
  datacenters = var.datacenters

  group "sandbox" {
    network {
      port "http" {}
    }

    volume "volumes" {
      type   = "host"
      source = var.host_volume
    }

    ephemeral_disk {
      size = 20
    }

    task "sandbox" {
      driver       = "exec"
      user         = var.user
      kill_timeout = "5s"

      config {
        command  = var.command
        args     = var.args
        cap_drop = ["all"]
      }

      volume_mount {
        volume      = "volumes"
        destination = var.volume_root
      }

      env {
        BIVOUAC_BIND = "${NOMAD_IP_http}"
      }

      resources {
        cpu    = var.cpu
        memory = var.memory
      }

      # Each task with logs costs a process of its own and time at the start.
      logs {
        disabled      = true
        max_files     = 1
        max_file_size = 1
      }
    }
  }
}
