//go:build !linux

package conformance_test

import (
	"fmt"
	"os/exec"

	"github.com/bivouac/bivouac/runtime"
)

func attachTerminal(*exec.Cmd, runtime.Command, runtime.Streams) (started, finish func(), err error) {
	return nil, nil, fmt.Errorf("%w: no terminals", runtime.ErrInvalid)
}
