// Command prepare builds the Nomad and Consul that this machine's PATH does not
// have, and prints where they are. A first build takes minutes, which is more
// than tests are given: run it before them.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/bivouac/bivouac/internal/test/stack"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	for _, find := range []func(context.Context) (string, error){stack.ConsulBinary, stack.NomadBinary} {
		path, err := find(ctx)
		if err != nil {
			return err
		}
		fmt.Println(path)
	}
	return nil
}
