package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/bivouac/bivouac/internal/stack"
)

func main() {
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
	flag.Parse()

	w, err := newWorld(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if stopErr := w.stop(); err == nil {
			err = stopErr
		}
	}()

	var all report
	for _, part := range []struct {
		name string
		run  func(context.Context) (report, error)
	}{
		{"one caller, raw_exec", func(ctx context.Context) (report, error) { return w.latency(ctx, "raw_exec", *rounds) }},
		{"one caller, docker", func(ctx context.Context) (report, error) { return w.latency(ctx, "docker", *rounds) }},
		{"many callers", w.throughput},
		{"records standing", func(ctx context.Context) (report, error) { return w.standing(ctx, *rounds, *standing) }},
		{"requests", w.requests},
	} {
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

// world is what is measured: servers, templates and the command itself.
type world struct {
	dir    string
	binary string
	image  string // empty where no Docker engine answers
	consul *stack.Consul
	nomad  *stack.Nomad
}

// manyConns is how many connections the servers take from this machine, on
// which all callers of the benchmark are.
const manyConns = 4000

func newWorld(ctx context.Context) (*world, error) {
	dir, err := os.MkdirTemp("", "bivouac-bench-")
	if err != nil {
		return nil, err
	}
	w := &world{dir: dir, binary: filepath.Join(dir, "bivouac")}
	if err := w.start(ctx); err != nil {
		_ = w.stop() // the first error says more
		return nil, err
	}
	return w, nil
}

func (w *world) start(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Minute)
	defer cancel()
	if err := stack.BuildBivouac(ctx, w.binary); err != nil {
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
	if err := os.RemoveAll(w.dir); first == nil {
		first = err
	}
	return first
}

// volume makes a folder for a sandbox.
func (w *world) volume() (string, error) {
	dir := filepath.Join(w.dir, "volume")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	return dir, nil
}
