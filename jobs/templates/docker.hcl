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
# This lets everyone who may submit jobs to the node mount any path of it. Use such
# nodes for sandboxes only, and set Bivouac's -volume-root. Bivouac checks only
# the text of a volume path: let only the operator of the node write to a root.
#
# Docker opens a container's port on the node before the container's network is
# up. A connection in between waits one second for ARP. So Bivouac first connects
# once the Nomad client says that the container has started. Its token needs the
# capability read-logs for that; without it, starts take up to a second longer.

variable "image" {
  description = "The image. A node pulls it only if it does not have it."
  default     = "bivouac-demo:dev"
}

variable "command" {
  description = "The command to run in the container. Null: the image's own."
  type        = string
  default     = null
}

variable "args" {
  description = "The command's arguments. Null: the image's own."
  type        = list(string)
  default     = null
}

variable "port" {
  description = "The port that the sandbox listens on inside the container. The sandbox gets it as PORT."
  default     = 8080
}

variable "user" {
  description = "The user inside the container, as a name or UID:GID. Null: the image's own."
  type        = string
  default     = null
}

variable "cpu" {
  description = "CPU share in MHz."
  default     = 100
}

variable "memory" {
  description = "Memory limit in MB. A sandbox that exceeds it is killed."
  default     = 256
}

variable "pids_limit" {
  description = "The maximum number of processes and threads in a sandbox."
  default     = 256
}

# Logs are off because of what they cost, measured side by side on a busy machine with 2
# cores: the median start of 24 rose from 809 to 945 ms, 1.2 times as long. Nomad's
# processes that collect the output take 26 MB of memory for each sandbox.
variable "logs" {
  description = "Whether Nomad keeps what the sandbox prints, at most 2 MB each of stdout and stderr. A start then takes about 1.2 times as long."
  default     = false
}

variable "datacenters" {
  description = "The datacenters in which sandboxes may run."
  type        = list(string)
  default     = ["*"]
}

variable "ready_type" {
  description = "How to check that the sandbox is ready. http: a GET of ready_path returns a 2xx status. tcp: a connection to its port stays open for 3s or receives a byte."
  default     = "http"
}

variable "ready_path" {
  description = "The path that returns a 2xx status when the sandbox is ready."
  default     = "/healthz"
}

variable "ready_session_id" {
  description = "Whether the response must contain the session ID. If it must, another process on the port cannot be taken for the sandbox."
  default     = true
}

variable "ready_timeout" {
  description = "How long a sandbox may take to become ready, including the pull of its image. At most 4m."
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

        # A spare gets its volume at the claim, over an empty folder.
        mount {
          type     = session.spare ? "tmpfs" : "bind"
          source   = session.spare ? null : session.volume_host_path
          target   = "/workspace"
          readonly = false
        }

        # At the claim of a spare, session.json appears here. It is empty otherwise.
        mount {
          type     = "tmpfs"
          target   = "/run/bivouac"
          readonly = true

          tmpfs_options {
            size = 4096
          }
        }

        # A container cannot write to its root, but most programs need /tmp.
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

      logs {
        disabled      = !var.logs
        max_files     = 2
        max_file_size = 1
      }
    }
  }
}
