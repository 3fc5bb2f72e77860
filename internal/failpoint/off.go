//go:build !failpoints

package failpoint

import "time"

// Hit does nothing in this build.
func Hit(string, string) {}

// Wall returns this machine's time.
func Wall() time.Time { return time.Now() }
