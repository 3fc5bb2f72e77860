//go:build !failpoints

package agent

// withFailpoints leaves the base as it is: this build has no failpoints.
func withFailpoints(b base) base { return b }
