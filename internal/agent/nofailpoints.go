//go:build !failpoints

package agent

import "time"

// withFailpoints leaves the base as it is: this build has no failpoints.
func withFailpoints(b base) base { return b }

// wall returns this machine's time.
func wall() time.Time { return time.Now() }
