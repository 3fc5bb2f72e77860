// Package stack runs real Nomad and Consul, for tests and to try Bivouac out by hand. It
// needs Linux.
//
// It finds or builds the pinned versions, starts dev agents and clusters of several servers
// on its own loopback ports, waits until they can be used, and breaks them on request. When
// they stop, it leaves nothing behind: no process, no container, no mount, no file. It also
// checks for a Docker engine and makes the image for tests. The modules in the directories
// nomad and consul pin the versions. They keep the root modules of both (BUSL) out of the
// product's module graph.
//
// The package does not import Bivouac's own packages, and only tests may import it.
package stack
