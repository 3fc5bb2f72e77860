// Package stack runs the real Nomad and Consul, for tests and for trying
// Bivouac out by hand.
//
// It finds or builds the pinned versions, starts dev agents and clusters of
// several servers on loopback ports of its own, waits until they can be used,
// breaks them on request, and leaves nothing behind when they stop: no
// process, no container, no mount, no file. It also tells whether a Docker
// engine answers and makes the image that tests run there.
//
// The versions are pinned by the modules in the folders nomad and consul, which
// exist so that the root modules of both (BUSL) stay out of the product's
// module graph; this package runs them as programs and talks to them through
// their published API clients. It must never know of Bivouac's own packages,
// and no package of the product may import it outside of tests. It needs Linux.
package stack
