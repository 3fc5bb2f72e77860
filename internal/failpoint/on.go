//go:build failpoints

package failpoint

import (
	"os"
	"strings"
	"syscall"
	"time"
)

// Hit kills or pauses this process where the environment asks for it at this
// point of an operation on this chat.
func Hit(point, chat string) {
	asked := strings.Fields(os.Getenv("BIVOUAC_FAILPOINT"))
	if len(asked) != 3 || asked[1] != point || asked[2] != chat {
		return
	}
	sig := syscall.SIGKILL
	if asked[0] == "pause" {
		sig = syscall.SIGSTOP
	}
	_ = syscall.Kill(os.Getpid(), sig) // if it fails, the test waits in vain
}

// Wall returns the time that this process is to take for its machine's.
func Wall() time.Time {
	offset, err := time.ParseDuration(os.Getenv("BIVOUAC_CLOCK_OFFSET"))
	if err != nil { // most likely none was asked for
		return time.Now()
	}
	return time.Now().Add(offset)
}
