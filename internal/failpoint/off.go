//go:build !failpoints

package failpoint

import "time"

// Wall returns this machine's time.
func Wall() time.Time { return time.Now() }
