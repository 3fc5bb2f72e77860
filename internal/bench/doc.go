// Command bench measures Bivouac beside what it stands on: raw Nomad and raw
// docker, all in one run on one machine, in turns, so that a ratio holds where
// the machine's speed does not.
//
// It starts a Nomad, a Consul and replicas of its own. It prints a table and
// can write the same as JSON. It judges nothing and must never be part of a
// test: figures here are for people.
package main
