// Command arch checks the arrows between the packages of this module: who may
// import whom. It runs in the module's root, prints each arrow that the rules
// do not allow and fails where there is one. It must never know what a package
// does; it sees import paths alone.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	packages, err := list(ctx)
	if err != nil {
		return err
	}
	if violations := check(bivouac(), packages); len(violations) > 0 {
		return errors.New(strings.Join(violations, "\n"))
	}
	return nil
}

// list asks the go command for the module's packages, for their tests, and
// for all that these depend on.
func list(ctx context.Context) ([]importer, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-deps", "-test",
		"-json=ImportPath,Standard,Module,Doc,GoFiles,Imports", "./...")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	packages, err := decode(out)
	if err := errors.Join(err, cmd.Wait()); err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	return packages, nil
}

func decode(r io.Reader) ([]importer, error) {
	var packages []importer
	for decoder := json.NewDecoder(r); ; {
		var p importer
		switch err := decoder.Decode(&p); {
		case errors.Is(err, io.EOF):
			return packages, nil
		case err != nil:
			return nil, err
		}
		packages = append(packages, p)
	}
}
