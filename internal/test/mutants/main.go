// Command mutants shows whether the simulation notices errors. It removes the
// safeguards of Bivouac, one at a time, and looks for a seed that fails without
// the safeguard. If the simulation cannot notice that a safeguard is missing,
// the command runs a test that does.
//
// A source line that is a safeguard ends with a comment that names it. A mutant
// changes the lines with its name through the go command's -overlay flag, so no
// source file is modified. The command must never be part of the product.
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
	"sync"

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

// run tries all mutants, or those that args name, as many at a time as there
// are processors. It prints a line for each mutant, in order, as soon as the
// results are known.
func run(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("mutants", flag.ContinueOnError)
	seeds := flags.Int("seeds", 10000, "how many seeds to try for each mutant")
	if err := flags.Parse(args); err != nil {
		return err
	}
	chosen, err := choose(flags.Args())
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bivouac-mutants-")
	if err != nil {
		return err
	}

	var g errgroup.Group
	results := make([]chan result, len(chosen))
	for i := range chosen {
		results[i] = make(chan result, 1)
	}
	g.SetLimit(1 + runtime.NumCPU()) // plus one for the report
	g.Go(func() error { return report(out, chosen, results) })
	sound := soundness(ctx, dir)
	for i, m := range chosen {
		g.Go(func() error {
			if err := sound(m.noticedBy); err != nil {
				results[i] <- result{err: err}
			} else {
				results[i] <- m.try(ctx, dir, *seeds)
			}
			return nil
		})
	}
	return errors.Join(g.Wait(), os.RemoveAll(dir))
}

// soundness returns a function that reports whether a test passes with all
// safeguards in place. It runs each test once. The simulation itself is not run
// here, because its own runs show that it passes.
func soundness(ctx context.Context, dir string) func(test) error {
	var mu sync.Mutex
	known := map[test]func() error{{}: func() error { return nil }}
	return func(of test) error {
		mu.Lock()
		once := known[of]
		if once == nil {
			once = sync.OnceValue(func() error { return of.sound(ctx, dir) })
			known[of] = once
		}
		mu.Unlock()
		return once()
	}
}

// choose returns the named mutants, or all if there are no names.
func choose(names []string) ([]mutant, error) {
	all := mutants()
	for _, name := range names {
		if !slices.ContainsFunc(all, func(m mutant) bool { return m.without == name }) {
			return nil, fmt.Errorf("no mutant is without the %q", name)
		}
	}
	if len(names) == 0 {
		return all, nil
	}
	return slices.DeleteFunc(all, func(m mutant) bool { return !slices.Contains(names, m.without) }), nil
}

// report prints the results in the order of the mutants. It fails if a mutant
// was not noticed or could not be tried.
func report(out io.Writer, chosen []mutant, results []chan result) error {
	const columns = "%-42s  %-10s  %s\n"
	if _, err := fmt.Fprintf(out, columns, "WITHOUT THE", "NOTICED BY", "AS"); err != nil {
		return err
	}
	var errs []error
	for i, m := range chosen {
		r := <-results[i]
		switch {
		case r.err != nil:
			errs = append(errs, fmt.Errorf("without the %s: %w", m.without, r.err))
			r.by, r.as = "?", "it could not be tried"
		case r.by == "":
			errs = append(errs, fmt.Errorf("without the %s nothing was noticed", m.without))
			r.by, r.as = "NOTHING", "it survived"
		}
		if _, err := fmt.Fprintf(out, columns, m.without, r.by, r.as); err != nil {
			return err
		}
	}
	return errors.Join(errs...)
}
