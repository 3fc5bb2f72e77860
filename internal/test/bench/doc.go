// Command bench compares Bivouac with raw Nomad and raw docker. All run in
// turns on the same machine in one run, so that the ratios are valid even if
// the absolute figures depend on the machine. It also compares a driver that
// runs as a plugin with the same driver linked in.
//
// It starts its own Nomad, Consul and replicas if the requested parts need
// them: -run=plugin needs none. It prints a table and can write the same data
// as JSON. It does not judge the figures, which are meant for people, and must
// never be part of a test.
package main
