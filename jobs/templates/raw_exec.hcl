# Runs the sandbox as a plain process of the Nomad client, with no isolation at
# all. For trying out, on a machine that is yours.

variable "command" {
  description = "What to run. The agent fills in its own executable, which then runs the demo sandbox."
  default     = "bivouac"
}

variable "args" {
  description = "The command's arguments."
  type        = list(string)
  default     = ["demo-sandbox"]
}

variable "user" {
  description = "The user to run as. Null: the user that the Nomad client runs as."
  type        = string
  default     = null
}

variable "cpu" {
  description = "CPU that Nomad counts for a sandbox, in MHz."
  default     = 50
}

variable "memory" {
  description = "Memory that Nomad counts for a sandbox, in MB. Not a limit."
  default     = 64
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
  default     = "30s"
}

# There is no isolation, so the volume is where it is.
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

    ephemeral_disk {
      size = 20
    }

    task "sandbox" {
      driver       = "raw_exec"
      user         = var.user
      kill_timeout = "5s"

      config {
        command = var.command
        args    = var.args
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
