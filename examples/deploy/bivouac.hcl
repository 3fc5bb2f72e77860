# Configuration of the Bivouac server. The server reads all .hcl and .json files in
# /etc/bivouac.d. After a change, run
#
#   bivouac config validate -config=/etc/bivouac.d
#
# and restart the server. Put secrets into /etc/bivouac.d/bivouac.env, which must
# belong to root and have mode 0600:
#
#   CONSUL_HTTP_TOKEN=...
#   NOMAD_TOKEN=...

# The same on all replicas, and different for each Bivouac that uses the same Nomad.
instance = "prod"

# What runs in a sandbox, and the folders that may be its volume.
job_template = "docker"
job_vars     = { image = "my/sandbox:1", memory = "512" }
volume_roots = ["/srv/chats"]

log_json = true

consul {
  address = "127.0.0.1:8500"
}

nomad {
  address   = "http://127.0.0.1:4646"
  namespace = "sandboxes"
}
