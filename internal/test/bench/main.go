package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"time"

	"github.com/bivouac/bivouac/internal/test/processplugin"
	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/runtime/plugin"
)

func main() {
	if slices.Contains(os.Args[1:], servePlugin) {
		plugin.Serve(new(processplugin.Plugin))
		return
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	rounds := flag.Int("rounds", 30, "rounds of each measurement")
	standing := flag.Int("records", 50_000, "records that stand in the larger of two stores")
	out := flag.String("json", "", "file to write the results to")
	only := flag.String("run", "", "regular expression: measure only the parts whose names match")
	flag.Parse()
	wanted, err := regexp.Compile(*only)
	if err != nil {
		return err
	}

	w := &world{}
	parts := []part{
		{"one caller, raw_exec", true, func(ctx context.Context) (report, error) { return w.latency(ctx, "raw_exec", *rounds) }},
		{"one caller, docker", true, func(ctx context.Context) (report, error) { return w.latency(ctx, "docker", *rounds) }},
		{"warm starts", true, func(ctx context.Context) (report, error) { return w.warmStarts(ctx, *rounds) }},
		{"many callers", true, w.throughput},
		{"records standing", true, func(ctx context.Context) (report, error) { return w.standing(ctx, *rounds, *standing) }},
		{"requests", true, w.requests},
		{"logs", true, func(ctx context.Context) (report, error) { return w.logs(ctx, *rounds) }},
		{"callers", true, func(ctx context.Context) (report, error) { return w.callers(ctx, *rounds) }},
		{"exec", true, func(ctx context.Context) (report, error) { return w.exec(ctx, *rounds) }},
		{"reading logs", true, func(ctx context.Context) (report, error) { return w.readLogs(ctx, *rounds) }},
		{"events", true, func(ctx context.Context) (report, error) { return w.events(ctx, *rounds) }},
		{"plugin", false, func(ctx context.Context) (report, error) { return w.plugin(ctx, *rounds) }},
	}
	parts = slices.DeleteFunc(parts, func(p part) bool { return !wanted.MatchString(p.name) })
	if len(parts) == 0 {
		return fmt.Errorf("no part's name matches %q", *only)
	}
	if err := w.start(ctx, slices.ContainsFunc(parts, func(p part) bool { return p.servers })); err != nil {
		return errors.Join(err, w.stop())
	}
	defer func() {
		if stopErr := w.stop(); err == nil {
			err = stopErr
		}
	}()

	var all report
	for _, part := range parts {
		fmt.Fprintf(os.Stderr, "measuring: %s\n", part.name)
		r, err := part.run(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		all = append(all, r...)
	}
	if err := all.print(os.Stdout); err != nil {
		return err
	}
	if *out == "" {
		return nil
	}
	text, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(*out, append(text, '\n'), 0o644)
}

// part is one part of the benchmark.
type part struct {
	name    string
	servers bool // needs Nomad and Consul
	run     func(context.Context) (report, error)
}

// world holds what is measured: servers, templates and the command itself.
type world struct {
	dir    string
	binary string
	image  string // empty if no Docker engine answers
	consul *stack.Consul
	nomad  *stack.Nomad

	helpers *stack.Helpers // nil until they are needed
}

// manyConns is how many connections the servers accept from this machine,
// because all callers of the benchmark run on it.
const manyConns = 4000

// start builds the command and starts the servers if they are needed.
func (w *world) start(ctx context.Context, servers bool) (err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Minute)
	defer cancel()
	if w.dir, err = os.MkdirTemp("", "bivouac-bench-"); err != nil {
		return err
	}
	w.binary = filepath.Join(w.dir, "bivouac")
	if err := stack.BuildBivouac(ctx, w.binary); err != nil || !servers {
		return err
	}
	if err := stack.DockerEngine(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "without docker:", err)
	} else if w.image, err = stack.DemoImage(ctx); err != nil {
		return err
	}
	if w.consul, err = stack.StartConsul(ctx, stack.ConsulConfig{MaxHTTPConns: manyConns}); err != nil {
		return err
	}
	w.nomad, err = stack.StartNomad(ctx, stack.NomadConfig{MaxHTTPConns: manyConns})
	return err
}

func (w *world) stop() error {
	var first error
	if w.nomad != nil {
		first = w.nomad.Stop()
	}
	if w.consul != nil {
		if err := w.consul.Stop(); first == nil {
			first = err
		}
	}
	if w.helpers != nil {
		if err := w.helpers.Stop(); first == nil {
			first = err
		}
	}
	if err := os.RemoveAll(w.dir); first == nil {
		first = err
	}
	return first
}

// volume creates a directory for sandboxes.
func (w *world) volume() (string, error) {
	dir := filepath.Join(w.dir, "volume")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	return dir, nil
}
