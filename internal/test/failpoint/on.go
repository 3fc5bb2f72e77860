//go:build failpoints

package failpoint

import (
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// hit is set when the failpoint was hit. A process that continues after a pause
// may come to the same point again.
var hit atomic.Bool

// Hit kills or pauses this process, once, if the environment asks for it at
// this point of an operation on this chat.
func Hit(point, chat string) {
	asked := strings.Fields(os.Getenv("BIVOUAC_FAILPOINT"))
	if len(asked) != 3 || asked[1] != point || asked[2] != chat || !hit.CompareAndSwap(false, true) {
		return
	}
	sig := unix.SIGKILL
	if asked[0] == "pause" {
		sig = unix.SIGSTOP
	}
	// Send the signal to this thread. If it went to the process, another thread
	// might receive it, and this one would continue for a while.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_ = unix.Tgkill(os.Getpid(), unix.Gettid(), sig) // if it fails, the test times out
}

// Wall returns the wall clock, shifted by the offset in BIVOUAC_CLOCK_OFFSET.
func Wall() time.Time {
	offset, err := time.ParseDuration(os.Getenv("BIVOUAC_CLOCK_OFFSET"))
	if err != nil { // most likely it is not set
		return time.Now()
	}
	return time.Now().Add(offset)
}
