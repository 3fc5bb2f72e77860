# The least that Bivouac needs in a Consul with ACLs:
#
#   consul acl policy create -name=bivouac -rules=@consul-policy.hcl
#   consul acl token create -description=bivouac -policy-name=bivouac

# All records and locks are below this prefix. It is the setting kv_prefix. To write
# includes to read and to list.
key_prefix "bivouac/" {
  policy = "write"
}

# Each replica has one Consul session, which belongs to the node of the Consul agent that
# the replica talks to. If that is always the same agent, its node is enough:
#
#   session "NODE" {
#     policy = "write"
#   }
session_prefix "" {
  policy = "write"
}
