# Runs the sandbox with Nomad's exec driver: a process in its own chroot, with
# limits on CPU and memory.
#
# The exec driver cannot mount a host path that a job chooses. It can mount a host
# volume from the Nomad client's configuration:
#
#   client {
#     host_volume "bivouac" {
#       path      = "/srv/bivouac"
#       read_only = false
#     }
#   }
#
# This template mounts the whole volume at the same path inside the chroot. A
# session's volume_host_path must be below that path, and is the same inside and
# outside. So the sandboxes of one node see each other's volumes: separate them by
# the owners and modes of their files. Use the docker template if sandboxes do not
# trust each other.

variable "command" {
  description = "The command to run, as a path inside the chroot."
  type        = string
}

variable "args" {
  description = "The command's arguments."
  type        = list(string)
  default     = []
}

variable "host_volume" {
  description = "The name of the Nomad client's host volume."
  default     = "bivouac"
}

variable "volume_root" {
  description = "The path of the Nomad client's host volume, on the node and inside the sandbox."
  default     = "/srv/bivouac"
}

variable "user" {
  description = "The user to run as. Null: nobody."
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

# Logs are off because of what they cost, measured side by side on a busy machine with 2
# cores: the median start of 24 rose from 602 to 895 ms, 1.5 times as long. Nomad's
# processes that collect the output take 13 MB of memory for each sandbox.
variable "logs" {
  description = "Whether Nomad keeps what the sandbox prints, at most 2 MB each of stdout and stderr. A start then takes about 1.5 times as long."
  default     = false
}

variable "datacenters" {
  description = "The datacenters in which sandboxes may run."
  type        = list(string)
  default     = ["*"]
}

variable "ready_type" {
  description = "How to check that the sandbox is ready. http: a GET of ready_path returns a 2xx status. tcp: its port accepts a connection."
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
  description = "How long a sandbox may take to become ready. At most 4m."
  default     = "60s"
}

# A spare gets its volume at the claim, over a folder that Nomad makes for each sandbox and
# that nothing else uses.
workspace = session.spare ? "/alloc/data" : session.volume_host_path

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

      logs {
        disabled      = !var.logs
        max_files     = 2
        max_file_size = 1
      }
    }
  }
}
