# Runs the sandbox as a plain process of the Nomad client, without any isolation.
# Use it to try Bivouac out on your own machine.

variable "command" {
  description = "The command to run. The Bivouac server sets it to its own executable, which then runs the demo sandbox."
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
  description = "The CPU in MHz that Nomad counts for a sandbox."
  default     = 50
}

variable "memory" {
  description = "The memory in MB that Nomad counts for a sandbox. Not a limit."
  default     = 64
}

# Logs are off because of what they cost, measured side by side on a busy machine with 2
# cores: the median start of 24 rose from 243 to 371 ms, 1.5 times as long. Nomad's
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
  default     = "30s"
}

# There is no isolation, so the sandbox uses the volume's path on the host.
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

      logs {
        disabled      = !var.logs
        max_files     = 2
        max_file_size = 1
      }
    }
  }
}
