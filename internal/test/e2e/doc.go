// Package e2e holds the end-to-end tests: they run the bivouac command as users
// do, against a real Nomad and a real Consul, and speak to it over HTTP alone.
//
// It has no code of its own and must never know Bivouac's internals, except for
// the JSON of its API.
package e2e
