// Command mutants shows whether the simulation bites: it takes the safeguards of
// Bivouac away, one at a time, and looks for a seed that fails without it. For
// one whose loss the simulation cannot notice, it runs the test that does.
//
// A mutant is a change to a few places in the source, applied by the go
// command's -overlay, so that no file is touched. One that no longer fits the
// source is an error. The program must never be part of the product.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"

	"golang.org/x/sync/errgroup"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

// run tries all mutants, or those that args name, and prints the table.
func run(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("mutants", flag.ContinueOnError)
	seeds := flags.Int("seeds", 1500, "how many seeds to try for each mutant")
	if err := flags.Parse(args); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bivouac-mutants-")
	if err != nil {
		return err
	}
	rows, err := try(ctx, dir, *seeds, flags.Args())
	if err := errors.Join(err, os.RemoveAll(dir)); err != nil {
		return err
	}

	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	var survived []string
	lines := []string{"without\tnoticed by\tas"}
	for _, r := range rows {
		if r.by == "" {
			survived = append(survived, r.without)
			r.by, r.as = "NOTHING", fmt.Sprintf("it survived %d seeds", *seeds)
		}
		lines = append(lines, r.without+"\t"+r.by+"\t"+r.as)
	}
	if _, err := fmt.Fprintln(w, strings.Join(lines, "\n")); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if len(survived) > 0 {
		return fmt.Errorf("not noticed: %s", strings.Join(survived, ", "))
	}
	return nil
}

// row is one line of the table.
type row struct{ without, by, as string }

// try tries as many mutants at a time as there are processors.
func try(ctx context.Context, dir string, seeds int, names []string) ([]row, error) {
	chosen := mutants()
	for _, name := range names {
		if !slices.ContainsFunc(chosen, func(m mutant) bool { return m.without == name }) {
			return nil, fmt.Errorf("no mutant is without the %q", name)
		}
	}
	if len(names) > 0 {
		chosen = slices.DeleteFunc(chosen, func(m mutant) bool { return !slices.Contains(names, m.without) })
	}
	rows := make([]row, len(chosen))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.NumCPU())
	for i, m := range chosen {
		g.Go(func() error {
			by, as, err := m.try(ctx, dir, seeds)
			if err != nil {
				return fmt.Errorf("without the %s: %w", m.without, err)
			}
			rows[i] = row{m.without, by, as}
			return nil
		})
	}
	return rows, g.Wait()
}
