//go:build !linux

package node

import (
	"context"
	"errors"
	"io"
	"os"
)

// Run returns an error: mount namespaces need Linux.
func Run(context.Context, Config, io.Writer, <-chan os.Signal) error {
	return errors.New("node: the node helper needs Linux")
}
