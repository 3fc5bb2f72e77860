// Command prepare builds Nomad and Consul if they are not on PATH, and prints
// their paths. Run it before the tests: a first build takes minutes, which is
// longer than the tests may take.
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
