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

// hit is set once this process was: when it goes on after a pause it may come to the
// same point again.
var hit atomic.Bool

// Hit kills or pauses this process, once, where the environment asks for it at this
// point of an operation on this chat.
func Hit(point, chat string) {
	asked := strings.Fields(os.Getenv("BIVOUAC_FAILPOINT"))
	if len(asked) != 3 || asked[1] != point || asked[2] != chat || !hit.CompareAndSwap(false, true) {
		return
	}
	sig := unix.SIGKILL
	if asked[0] == "pause" {
		sig = unix.SIGSTOP
	}
	// To this very thread: were it to the process, another thread might take the
	// signal, and this one go on for a while.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_ = unix.Tgkill(os.Getpid(), unix.Gettid(), sig) // if it fails, the test waits in vain
}

// Wall returns the time that this process is to take for its machine's.
func Wall() time.Time {
	offset, err := time.ParseDuration(os.Getenv("BIVOUAC_CLOCK_OFFSET"))
	if err != nil { // most likely none was asked for
		return time.Now()
	}
	return time.Now().Add(offset)
}
