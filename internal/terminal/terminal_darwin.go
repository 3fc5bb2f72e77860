package terminal

import (
	"errors"
	"fmt"
	"os"

	"github.com/bivouac/bivouac/runtime"
)

var errNone = fmt.Errorf("%w: there are no terminals on macOS", errors.ErrUnsupported)

// Open returns an error that wraps [errors.ErrUnsupported].
func Open() (ours, theirs *os.File, err error) { return nil, nil, errNone }

// Resize returns an error that wraps [errors.ErrUnsupported].
func Resize(*os.File, runtime.WindowSize) error { return errNone }
