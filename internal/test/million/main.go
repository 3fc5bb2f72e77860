package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/runtime/plugin"
)

const (
	// serveModel is the argument that runs this program as the model's plugin.
	serveModel = "serve-model"

	fewRecords = 100
	fewPrefix  = "few"
	manyPrefix = "many"
)

// limit bounds a run. Most of it is for the filling.
const limit = time.Hour

func main() {
	if slices.Contains(os.Args[1:], serveModel) {
		plugin.Serve(new(model))
		return
	}
	records := flag.Int("records", 1_000_000, "records in the larger of two stores")
	flag.Parse()
	if err := runAll(*records); err != nil {
		fmt.Fprintln(os.Stderr, "million:", err)
		os.Exit(1)
	}
}

// runAll makes a run, until it is interrupted, and prints its table.
func runAll(records int) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	dir, err := os.MkdirTemp("", "bivouac-million-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	binary := filepath.Join(dir, "bivouac")
	if err := stack.BuildBivouac(ctx, binary); err != nil {
		return err
	}
	server, err := stack.StartConsul(ctx, stack.ConsulConfig{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Stop()) }()
	r := &run{consul: server.Addr(), consulPID: server.Servers[0].PID()}
	rows, err := r.measureAll(ctx, dir, binary, records)
	return errors.Join(err, printRows(os.Stdout, fewRecords, records, rows))
}

// measureAll fills the stores and measures everything. It returns the rows up to an error.
func (r *run) measureAll(ctx context.Context, dir, binary string, records int) ([]row, error) {
	empty, err := r.consulMemory("empty")
	if err != nil {
		return nil, err
	}
	r.rows = append(r.rows, empty[0])
	nomad, err := nomadRow(ctx, fewRecords, min(records, maxSandboxes))
	if err != nil {
		return nil, err
	}
	r.rows = append(r.rows, nomad)
	began := time.Now()
	for prefix, n := range map[string]int{fewPrefix: fewRecords, manyPrefix: records} {
		if err := fill(ctx, r.consul, prefix, n); err != nil {
			return nil, fmt.Errorf("fill with %d records: %w", n, err)
		}
	}
	r.rows = append(r.rows, row{what: "filling", unit: "s", many: time.Since(began).Seconds()})
	if r.probe, err = startProbe(ctx, r.consul); err != nil {
		return nil, err
	}
	defer r.probe.stop()
	defer func() {
		for _, s := range []*side{r.few, r.many} {
			if s != nil {
				_ = s.stop() // its log went with the folder; the measurements are done
			}
		}
	}()
	for _, part := range []struct {
		name    string
		measure func() ([]row, error)
	}{
		{"Consul filled", func() ([]row, error) { return r.consulMemory("filled") }},
		{"writes", func() ([]row, error) { return r.quiet(ctx, records) }},
		{"start", func() ([]row, error) { return r.start(ctx, dir, binary, fewRecords, records) }},
		{"memory at the start", func() ([]row, error) { return r.memory("started") }},
		{"reconcile pass", func() ([]row, error) { return r.reconcile(ctx) }},
		{"memory after a pass", func() ([]row, error) { return r.memory("after a pass") }},
		{"creates", func() ([]row, error) { return r.creates(ctx) }},
		{"cleanup, 0 expired", func() ([]row, error) { return r.cleanup(ctx, 0, cleanupRounds) }},
		{"cleanup, 100 expired", func() ([]row, error) { return r.cleanup(ctx, 100, 1) }},
		{"cleanup, 1000 expired", func() ([]row, error) { return r.cleanup(ctx, 1000, 1) }},
		{"scrape", func() ([]row, error) { return r.get(ctx, "scrape of /v1/metrics", "/v1/metrics", 10, 0) }},
		{"page", func() ([]row, error) { return r.pages(ctx) }},
		{"event", func() ([]row, error) { return r.events(ctx) }},
		{"counts", func() ([]row, error) { return r.get(ctx, "counts by state", "/v1/sessions/counts", 3, countsLast) }},
		{"reads", func() ([]row, error) { return r.reads(ctx) }},
		{"memory at the end", func() ([]row, error) { return r.memory("at the end") }},
		{"Consul at the end", func() ([]row, error) { return r.consulMemory("at the end") }},
	} {
		if err := r.part(part.name, part.measure); err != nil {
			return r.rows, err
		}
	}
	return append(r.rows, row{what: "write to Consul, slowest of all", unit: "ms", many: ms(r.longest), aim: most(maxStall)}), nil
}
