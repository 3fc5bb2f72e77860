# Runs Bivouac itself as a Nomad job: two replicas, which reach Nomad through the Task
# API with the job's own identity. PRODUCTION.md says what Nomad and Consul need first.
#
#   nomad job run -var=image=registry.example/bivouac:1.0 bivouac.nomad.hcl

variable "image" {
  description = "The image that make image built, in a registry that the clients reach."
  type        = string
}

variable "datacenters" {
  description = "The datacenters that Bivouac runs in."
  type        = list(string)
  default     = ["*"]
}

variable "node_pool" {
  description = "The node pool that Bivouac runs in. Not that of the sandboxes."
  type        = string
  default     = "default"
}

job "bivouac" {
  type        = "service"
  # Not the namespace of the sandboxes: who may submit jobs there could replace Bivouac.
  namespace   = "bivouac"
  datacenters = var.datacenters
  node_pool   = var.node_pool

  # One replica after the other. A new one must be ready before an old one stops.
  update {
    max_parallel     = 1
    canary           = 1
    health_check     = "checks"
    min_healthy_time = "10s"
    healthy_deadline = "3m"
    auto_promote     = true
    auto_revert      = true
  }

  spread {
    attribute = "${node.unique.id}"
  }

  group "bivouac" {
    count = 2

    # Callers stop coming before the replica stops.
    shutdown_delay = "5s"

    network {
      port "http" {}
    }

    service {
      name     = "bivouac"
      port     = "http"
      provider = "nomad"

      # Ready for requests. It fails while Consul or Nomad is away, so it must not
      # restart anything.
      check {
        name     = "health"
        type     = "http"
        path     = "/v1/agent/health"
        interval = "5s"
        timeout  = "4s"
      }

      # Alive. It fails only if the process hangs.
      check {
        name     = "live"
        type     = "http"
        path     = "/v1/agent/live"
        interval = "10s"
        timeout  = "5s"

        check_restart {
          limit = 3
          grace = "30s"
        }
      }
    }

    task "bivouac" {
      driver = "docker"

      # Bivouac stops within 45 s. The clients must allow it: client { max_kill_timeout = "60s" }.
      kill_timeout = "60s"

      config {
        image           = var.image
        args            = ["agent", "-config=${NOMAD_TASK_DIR}/bivouac.hcl", "-http-addr=${NOMAD_ADDR_http}"]
        network_mode    = "host" # the node's Consul agent is on loopback
        cap_drop        = ["all"]
        security_opt    = ["no-new-privileges"]
        readonly_rootfs = true

        # Runtime plugins put their sockets there.
        mount {
          type   = "tmpfs"
          target = "/tmp"

          tmpfs_options {
            size = 16777216
          }
        }
      }

      # NOMAD_TOKEN, with the policy that is attached to this job.
      identity {
        env = true
      }

      env {
        NOMAD_ADDR = "unix://${NOMAD_SECRETS_DIR}/api.sock"
      }

      # CONSUL_HTTP_TOKEN, from Consul's auth method for Nomad's identities. It lives as
      # long as the allocation.
      consul {}

      identity {
        name = "consul_default"
        aud  = ["consul.io"]
        ttl  = "1h"
      }

      template {
        destination = "${NOMAD_TASK_DIR}/bivouac.hcl"
        # A new configuration makes a new version of this job.
        change_mode = "noop"
        data        = <<-EOT
          instance     = "prod"
          job_template = "docker"
          job_vars     = { image = "my/sandbox:1", memory = "512" }
          volume_roots = ["/srv/chats"]
          log_json     = true

          # Callers are jobs in the namespace "chat", known by their workload identities.
          jwt "nomad" {
            nomad        = true
            audiences    = ["bivouac.io"]
            bound_claims = { nomad_namespace = ["chat"] }
            policies     = ["chat"]
          }

          policy "chat" {
            agent_prefix "" {
              capabilities = ["read", "write"]
              volume_roots = ["/srv/chats"]
            }
          }

          # Without this, sandboxes would run in the namespace of this job.
          nomad { namespace = "sandboxes" }

          consul { address = "127.0.0.1:8500" }
        EOT
      }

      resources {
        cpu    = 500
        memory = 256
      }
    }
  }
}
