# The least that Bivouac needs in a Nomad with ACLs. Put the name of your sandboxes'
# namespace in place of "sandboxes", and apply it:
#
#   nomad namespace apply sandboxes
#   nomad acl policy apply bivouac nomad-policy.hcl
#   nomad acl token create -name=bivouac -policy=bivouac
#
# If Bivouac itself runs as a Nomad job, it needs no token. Bind the policy to the job,
# which then uses its workload identity:
#
#   nomad acl policy apply -namespace=NAMESPACE -job=JOB bivouac nomad-policy.hcl
#
# Give the sandboxes a namespace of their own. Anyone who may submit jobs there can run
# anything on the nodes that accept them, and anyone who may read jobs there sees the
# environment of the sandboxes.

namespace "sandboxes" {
  capabilities = [
    "list-jobs",  # to find the sandboxes
    "read-job",   # to follow them: this includes their allocations, evaluations and events
    "submit-job", # to start, stop and purge them, and to remove the rest of one from its node
    "read-logs",  # to read what they print, and to see when a container has started

    # To run commands in sandboxes. Without these "bivouac session exec" fails, and nothing
    # else changes.
    "alloc-exec",
    "alloc-node-exec", # of raw_exec, which has no isolation
  ]
}

# If the node of a sandbox is lost, Bivouac asks whether an operator has removed the node.
# Only then does it know that the sandbox is gone.
node {
  policy = "read"
}

# The following is optional.
#
# With pools, Bivouac asks Nomad where the node helpers are. If their job is in a namespace
# of its own, which helper_namespace names:
#
#   namespace "bivouac-node" {
#     capabilities = ["read-job"]
#   }
#
# With this, Bivouac's health also tells that the eval broker is paused:
#
#   operator {
#     policy = "read"
#   }
#
# The exec template mounts the host volume "bivouac". Each host volume needs a rule:
#
#   host_volume "bivouac" {
#     policy = "write"
#   }
