//go:build failpoints

package failpoint

import (
	"os"
	"strings"
	"syscall"
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
