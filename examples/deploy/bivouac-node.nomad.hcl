# Runs the node helper on each Nomad client that has sandboxes. It mounts the volume of a
# chat in a sandbox that was started ahead. PRODUCTION.md says what it may do, and how to
# make its certificates.
#
#   nomad job run -var='volume_roots=["/srv/chats"]' bivouac-node.nomad.hcl
#
# The clients need the raw_exec driver, must run as root, and need Bivouac's program.

variable "volume_roots" {
  description = "The folders that have volumes, on each node."
  type        = list(string)
  default     = ["/srv/chats"]
}

variable "program" {
  description = "The path of Bivouac's program on each node, where the packages install it."
  type        = string
  default     = "/usr/bin/bivouac"
}

variable "datacenters" {
  description = "The datacenters that have sandboxes."
  type        = list(string)
  default     = ["*"]
}

variable "node_pool" {
  description = "The node pool of the sandboxes."
  type        = string
  default     = "sandboxes"
}

job "bivouac-node" {
  type = "system"
  # Not the namespace of the sandboxes: who may submit jobs there could read the key.
  namespace   = "bivouac-node"
  datacenters = var.datacenters
  node_pool   = var.node_pool

  # Claims fall back to cold starts while a helper restarts, so one node after the other.
  update {
    max_parallel     = 1
    min_healthy_time = "5s"
  }

  group "node" {
    # A helper that ends is started again, for as long as it takes.
    restart {
      attempts = 3
      interval = "1m"
      delay    = "5s"
      mode     = "delay"
    }

    network {
      port "https" {
        static = 4748
      }
    }

    # Bivouac finds the helper of a node by this service.
    service {
      name     = "bivouac-node"
      port     = "https"
      provider = "nomad"

      check {
        name            = "live"
        type            = "http"
        protocol        = "https"
        tls_skip_verify = true # a check calls an IP address
        path            = "/v1/live"
        interval        = "10s"
        timeout         = "5s"

        check_restart {
          limit = 3
          grace = "30s"
        }
      }
    }

    task "node" {
      # As root, in the namespaces of the node.
      driver = "raw_exec"
      # The helper finishes its orders within 12 s.
      kill_timeout = "20s"

      config {
        command = var.program
        args = concat([
          "node",
          "-http-addr=${NOMAD_ADDR_https}",
          "-tls-client-ca-file=${NOMAD_SECRETS_DIR}/ca.pem",
          "-tls-cert-file=${NOMAD_SECRETS_DIR}/node.pem",
          "-tls-key-file=${NOMAD_SECRETS_DIR}/node-key.pem",
          "-log-json",
        ], [for root in var.volume_roots : "-volume-root=${root}"])
      }

      # The helper reads the three files again when they change.
      template {
        destination = "${NOMAD_SECRETS_DIR}/ca.pem"
        change_mode = "noop"
        data        = "{{ with nomadVar \"nomad/jobs/bivouac-node\" }}{{ .ca }}{{ end }}"
      }

      template {
        destination = "${NOMAD_SECRETS_DIR}/node.pem"
        change_mode = "noop"
        data        = "{{ with nomadVar \"nomad/jobs/bivouac-node\" }}{{ .cert }}{{ end }}"
      }

      template {
        destination = "${NOMAD_SECRETS_DIR}/node-key.pem"
        change_mode = "noop"
        perms       = "0600"
        data        = "{{ with nomadVar \"nomad/jobs/bivouac-node\" }}{{ .key }}{{ end }}"
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
