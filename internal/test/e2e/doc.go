// Package e2e contains the end-to-end tests. They run the bivouac command as
// users do, with a real Nomad and a real Consul, and call it only over HTTP.
//
// The package has no code besides tests. It must never know Bivouac's
// internals, except for the JSON of its API.
package e2e
