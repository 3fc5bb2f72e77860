package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

const (
	// limit is the time limit of one process. Some mutants loop forever, which
	// counts as a failure like any other.
	limit = 5 * time.Minute
	// chunk is how many seeds one process runs.
	chunk = 250
)

// mutant is the source without one safeguard.
type mutant struct {
	without   string
	line      func(code string) string // returns the replacement of a marked line
	noticedBy test                     // instead of the simulation
}

// marker separates the code of a line that is a safeguard from its name.
const marker = " // safeguard: "

// instead replaces the whole line.
func instead(code string) func(string) string {
	return func(string) string { return code }
}

// words replaces pieces of the line, given in pairs.
func words(oldnew ...string) func(string) string {
	return strings.NewReplacer(oldnew...).Replace
}

// condition matches the condition of a case, an if or a return, and what
// surrounds it.
var condition = regexp.MustCompile(`^(case |return |if (?:.*; )?)(.*?)(:| \{|)$`)

// never makes the condition of the line false.
func never(code string) string { return condition.ReplaceAllString(code, "${1}false && (${2})${3}") }

// always makes the condition of the line true.
func always(code string) string { return condition.ReplaceAllString(code, "${1}true || (${2})${3}") }

// test identifies a test by its package and name.
type test struct{ pkg, name string }

var simulation = test{"./internal/test/simulate", "TestSimulations"}

var (
	failedSeed = regexp.MustCompile(`TestSimulations/seed=(\d+)`)
	tookLong   = []byte("panic: test timed out after ")
	noTests    = []byte("testing: warning: no tests to run")
	violated   = regexp.MustCompile(`VIOLATED (.*)`)
)

// result says which seed or test noticed that a safeguard is missing, and how.
// It is empty if nothing noticed.
type result struct {
	by, as string
	err    error
}

// try looks for a seed that fails without the safeguard, or runs the test that
// should fail.
func (m mutant) try(ctx context.Context, dir string, seeds int) result {
	dir = filepath.Join(dir, strings.NewReplacer(" ", "-", "'", "").Replace(m.without))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return result{err: err}
	}
	of := simulation
	if m.noticedBy != (test{}) {
		of = m.noticedBy
	}
	bin, err := m.build(ctx, dir, of)
	if err != nil {
		return result{err: err}
	}
	if of != simulation {
		text, err := start(ctx, bin, of)
		switch {
		case ctx.Err() != nil:
			return result{err: ctx.Err()}
		case err == nil:
			return result{}
		case !of.noticed(text):
			return result{err: fmt.Errorf("%s %s could not run: %w\n%s", of.pkg, of.name, err, text)}
		}
		return result{by: "a test", as: of.pkg + " " + of.name + ": " + failureOf(text, of)}
	}
	for first := 1; first <= seeds; first += chunk {
		text, err := start(ctx, bin, of, fmt.Sprintf("FROM=%d", first), fmt.Sprintf("RUNS=%d", min(chunk, seeds-first+1)))
		if err == nil {
			continue
		}
		seed, why := failedSeed.FindSubmatch(text), violated.FindSubmatch(text)
		switch {
		case ctx.Err() != nil:
			return result{err: ctx.Err()}
		case seed == nil:
			return result{err: fmt.Errorf("%w:\n%s", err, text)}
		case why == nil:
			return result{by: "seed " + string(seed[1]), as: "it does not come to an end"}
		default:
			return result{by: "seed " + string(seed[1]), as: string(why[1])}
		}
	}
	return result{}
}

// build builds the tests of a package with the changed source.
func (m mutant) build(ctx context.Context, dir string, of test) (bin string, err error) {
	overlay, err := m.overlay(dir)
	if err != nil {
		return "", err
	}
	bin = filepath.Join(dir, "mutant.test")
	cmd := exec.CommandContext(ctx, "go", "test", "-c", "-vet=off", "-overlay", overlay, "-o", bin, of.pkg)
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w:\n%s", err, text)
	}
	return bin, nil
}

// noticed reports whether the output of a failed run shows that the test itself
// failed or timed out. A run that could not start does not count.
func (of test) noticed(text []byte) bool {
	return bytes.Contains(text, tookLong) || slices.ContainsFunc(slices.Collect(bytes.Lines(text)), func(line []byte) bool {
		return bytes.HasPrefix(line, []byte("--- FAIL: "+of.name+" "))
	})
}

// sound returns an error if the test does not pass on the unchanged source.
// Such a test could notice nothing.
func (of test) sound(ctx context.Context, dir string) error {
	bin := filepath.Join(dir, "sound-"+of.name+".test")
	cmd := exec.CommandContext(ctx, "go", "test", "-c", "-vet=off", "-o", bin, of.pkg)
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w:\n%s", err, text)
	}
	text, err := start(ctx, bin, of)
	if err == nil && bytes.Contains(text, noTests) {
		err = errors.New("there is no such test")
	}
	if err != nil {
		return fmt.Errorf("with all safeguards, %s %s does not pass: %w\n%s", of.pkg, of.name, err, text)
	}
	return nil
}

// start runs a test in its package's directory.
func start(ctx context.Context, bin string, of test, env ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, bin, "-test.failfast", "-test.timeout="+limit.String(), "-test.run=^"+of.name+"$")
	cmd.Dir = of.pkg
	cmd.Env = append(os.Environ(), append(env, "SEED=")...)
	return cmd.CombinedOutput()
}

// failureOf returns the first line of a test's failure.
func failureOf(text []byte, of test) string {
	_, rest, _ := strings.Cut(string(text), "--- FAIL: "+of.name)
	for line := range strings.Lines(rest) {
		if line = strings.TrimSpace(line); strings.Contains(line, "_test.go:") && !strings.HasSuffix(line, ":") {
			return line
		}
	}
	return "it does not come to an end"
}

// change returns the text of a file without the safeguard. The second result is
// false if no line of the file is marked with its name.
func (m mutant) change(text string) (string, bool, error) {
	var out strings.Builder
	marked := false
	for line := range strings.Lines(text) {
		code, name, ok := strings.Cut(strings.TrimSpace(line), marker)
		if ok && name == m.without {
			marked = true
			changed := m.line(code)
			if changed == code {
				return "", true, fmt.Errorf("it changes nothing in: %s", code)
			}
			line = changed + "\n"
		}
		out.WriteString(line)
	}
	return out.String(), marked, nil
}

// sources returns the paths of the product's Go files below root.
func sources(root string) ([]string, error) {
	var files []string
	err := filepath.WalkDir(root, func(path string, entry os.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && strings.HasSuffix(path, filepath.Join("internal", "test")):
			return filepath.SkipDir
		case strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go"):
			files = append(files, path)
		}
		return nil
	})
	return files, err
}

// overlay writes the changed files and the overlay file for the go command.
func (m mutant) overlay(dir string) (string, error) {
	files, err := sources(".")
	if err != nil {
		return "", err
	}
	replaced := make(map[string]string)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		changed, marked, err := m.change(string(text))
		if err != nil {
			return "", fmt.Errorf("%s: %w", file, err)
		}
		if !marked {
			continue
		}
		path, err := filepath.Abs(file)
		if err != nil {
			return "", err
		}
		replaced[path] = filepath.Join(dir, strings.ReplaceAll(file, "/", "-"))
		if err := os.WriteFile(replaced[path], []byte(changed), 0o600); err != nil {
			return "", err
		}
	}
	if len(replaced) == 0 {
		return "", fmt.Errorf("no line is marked with%s%s", marker, m.without)
	}
	data, err := json.Marshal(map[string]any{"Replace": replaced})
	if err != nil {
		return "", err
	}
	overlay := filepath.Join(dir, "overlay.json")
	return overlay, os.WriteFile(overlay, data, 0o600)
}
