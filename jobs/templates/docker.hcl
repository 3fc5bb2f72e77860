# Runs the sandbox as a Docker container without privileges: no capabilities, a
# read-only root file system, and limits on processes and memory. The session's
# volume is mounted at /workspace.
#
# The Nomad client's docker plugin must allow host paths:
#
#   plugin "docker" {
#     config {
#       volumes { enabled = true }
#     }
#   }
#
# That opens every path of the node to everyone who may submit jobs to it, so
# keep such nodes for sandboxes, and set Bivouac's -volume-root. Bivouac checks
# the name of a volume only: let nobody but the node's operator write to a root.
#
# Docker opens a container's port on the node before the container's network is
# up. Who calls in between waits a second for ARP, and so does every start of a
# sandbox, unless the node asks again sooner:
#
#   sysctl -w net.ipv4.neigh.docker0.retrans_time_ms=25

variable "image" {
  description = "The image. It is pulled only where it is missing."
  default     = "bivouac-demo:dev"
}

variable "command" {
  description = "What to run in the container. Null: the image's own."
  type        = string
  default     = null
}

variable "args" {
  description = "The command's arguments. Null: the image's own."
  type        = list(string)
  default     = null
}

variable "port" {
  description = "The port that the sandbox listens on inside the container. It is told as PORT."
  default     = 8080
}

variable "user" {
  description = "The user inside the container, as name or UID:GID. Null: the image's own."
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

variable "pids_limit" {
  description = "How many processes and threads a sandbox may have."
  default     = 256
}

variable "datacenters" {
  description = "Where sandboxes may run."
  type        = list(string)
  default     = ["*"]
}

variable "ready_type" {
  description = "What shows that the sandbox is ready: http, a GET of ready_path that is answered with 2xx, or tcp, a connection to its port that stays open for 3s, or that brings a byte."
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
  description = "How long a sandbox may take until it is ready, a pull of its image included: 4m at most."
  default     = "60s"
}

workspace = "/workspace"

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
      port "http" {
        to = var.port
      }
    }

    ephemeral_disk {
      size = 20
    }

    task "sandbox" {
      driver       = "docker"
      user         = var.user
      kill_timeout = "5s"

      config {
        image      = var.image
        force_pull = false
        command    = var.command
        args       = var.args
        ports      = ["http"]

        privileged      = false
        cap_drop        = ["all"]
        security_opt    = ["no-new-privileges"]
        readonly_rootfs = true
        pids_limit      = var.pids_limit

        mount {
          type     = "bind"
          source   = session.volume_host_path
          target   = "/workspace"
          readonly = false
        }

        # A container cannot write to its root, but most programs want /tmp.
        mount {
          type   = "tmpfs"
          target = "/tmp"

          tmpfs_options {
            size = 67108864
          }
        }
      }

      env {
        BIVOUAC_BIND = "0.0.0.0"
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
