// Command mutants shows whether the simulation bites: it takes the safeguards of
// Bivouac away, one at a time, and looks for a seed that fails without it.
//
// A mutant is a change to a few places in the source, applied by the go
// command's -overlay, so that no file is touched. One that no longer fits the
// source is an error. The program must never be part of the product.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// limit bounds the runs of one mutant. Some run in circles, which is as good as
// any other failure.
const limit = 5 * time.Minute

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1) //nolint:forbidigo // the end of a main
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("mutants", flag.ContinueOnError)
	runs := flags.Int("runs", 500, "seeds to try for each mutant")
	if err := flags.Parse(args); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bivouac-mutants-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	var survived []string
	for _, m := range mutants() {
		if flags.NArg() > 0 && !slices.Contains(flags.Args(), m.without) {
			continue
		}
		found, err := m.try(ctx, dir, *runs)
		if err != nil {
			return fmt.Errorf("without %s: %w", m.without, err)
		}
		if found == "" {
			found = fmt.Sprintf("SURVIVED %d seeds", *runs)
			survived = append(survived, m.without)
		}
		if _, err := fmt.Fprintf(w, "without %s\t%s\n", m.without, found); err != nil {
			return err
		}
		if err := w.Flush(); err != nil { // a line as soon as it is known
			return err
		}
	}
	if len(survived) > 0 {
		return fmt.Errorf("not noticed: %s", strings.Join(survived, ", "))
	}
	return nil
}

// mutant is the source without one safeguard.
type mutant struct {
	without string
	changes []change
}

// change is one place in a file, which is to stand there once.
type change struct{ file, from, to string }

var (
	failedSeed = regexp.MustCompile(`seed=(\d+)`)
	violated   = regexp.MustCompile(`VIOLATED (.*)`)
)

// try runs seeds until one fails, and says which and why, or returns "".
func (m mutant) try(ctx context.Context, dir string, runs int) (string, error) {
	overlay, err := m.overlay(dir)
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "go", "test", "-tags", "faults", "-vet=off", "-overlay", overlay, "-count=1", //nolint:gosec // of our own making
		"-failfast", "-timeout", limit.String(), "-run", "TestSimulations", "./internal/simulate")
	cmd.Env = append(os.Environ(), fmt.Sprintf("RUNS=%d", min(runs, maxRuns)), "GOGC=400")
	text, err := cmd.CombinedOutput()
	if err == nil {
		return "", nil
	}
	seed, why := failedSeed.FindSubmatch(text), violated.FindSubmatch(text)
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case seed == nil:
		return "", fmt.Errorf("%w:\n%s", err, text)
	case why == nil:
		return fmt.Sprintf("seed %s: it did not come to an end", seed[1]), nil
	default:
		return fmt.Sprintf("seed %s: %s", seed[1], why[1]), nil
	}
}

// maxRuns is how many seeds one process runs; see the simulation's own tests.
const maxRuns = 500

// overlay writes the changed files and what tells the go command of them.
func (m mutant) overlay(dir string) (string, error) {
	texts := make(map[string]string)
	for _, c := range m.changes {
		text, ok := texts[c.file]
		if !ok {
			data, err := os.ReadFile(c.file)
			if err != nil {
				return "", err
			}
			text = string(data)
		}
		if n := strings.Count(text, c.from); n != 1 {
			return "", fmt.Errorf("%s has %d times: %s", c.file, n, c.from)
		}
		texts[c.file] = strings.Replace(text, c.from, c.to, 1)
	}
	if len(texts) == 0 {
		return "", errors.New("no change")
	}
	replaced := make(map[string]string)
	for file, text := range texts {
		path, err := filepath.Abs(file)
		if err != nil {
			return "", err
		}
		replaced[path] = filepath.Join(dir, strings.ReplaceAll(m.without+"-"+file, string(filepath.Separator), "-"))
		if err := os.WriteFile(replaced[path], []byte(text), 0o600); err != nil {
			return "", err
		}
	}
	data, err := json.Marshal(map[string]any{"Replace": replaced})
	if err != nil {
		return "", err
	}
	overlay := filepath.Join(dir, m.without+".json")
	return overlay, os.WriteFile(overlay, data, 0o600)
}
