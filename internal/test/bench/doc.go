// Command bench measures Bivouac beside what it stands on: raw Nomad and raw
// docker, all in one run on one machine, in turns, so that a ratio holds where
// the machine's speed does not. And a driver that runs as a plugin beside the same
// driver linked in.
//
// It starts a Nomad, a Consul and replicas of its own, as far as the parts need
// them that are asked for: -run=plugin needs none. It prints a table and
// can write the same as JSON. It judges nothing and must never be part of a
// test: figures here are for people.
package main
