package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/test/stack"
)

// logs measures what Nomad's logs cost a start. Each round creates a sandbox without
// logs and one with them, one after the other, and every second round begins with the
// other one.
func (w *world) logs(ctx context.Context, rounds int) (report, error) {
	var out report
	for _, template := range []string{"raw_exec", "docker", "exec"} {
		rows, err := w.logsOf(ctx, template, rounds)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", template, err)
		}
		out = append(out, rows...)
	}
	return out, nil
}

func (w *world) logsOf(ctx context.Context, template string, rounds int) (report, error) {
	flags, err := w.logsFlags(ctx, template)
	if err != nil || flags == nil {
		return nil, err
	}
	type side struct {
		what    string
		replica *replica
	}
	var sides []side
	for _, logs := range []string{"false", "true"} {
		r, err := w.startReplica(ctx, replicaConfig{
			consul: w.consul.Addr(), nomad: w.nomad.Addr(), template: template,
			prefix: "logs-" + logs + "-" + template, flags: append([]string{"-job-var=logs=" + logs}, flags...),
		})
		if err != nil {
			return nil, err
		}
		if template == "exec" {
			r.volume = filepath.Join(w.nomad.VolumeDir, "bench")
			if err := os.MkdirAll(r.volume, 0o755); err != nil {
				return nil, err
			}
		}
		sides = append(sides, side{"create with logs = " + logs, r})
	}
	times := stopwatch{}
	for round := range rounds + 1 { // the first round is a warm-up
		for i := range sides {
			s, chat := sides[(round+i)%len(sides)], uuid.New()
			if err := times.time(s.what, func() error { return s.replica.create(ctx, chat) }); err != nil {
				return nil, err
			}
			if err := s.replica.delete(ctx, chat); err != nil {
				return nil, err
			}
		}
	}
	var out report
	for _, s := range sides {
		r := timed("logs, "+template, s.what, times[s.what][1:])
		if len(out) > 0 {
			r.against(out[0])
			r.Count, r.Unit = r.P50-out[0].P50, "ms more at p50"
		}
		out = append(out, r)
		if err := s.replica.Stop(); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// logsFlags returns more flags of replicas with a template, and nil if the template
// cannot be used on this machine.
func (w *world) logsFlags(ctx context.Context, template string) ([]string, error) {
	switch template {
	case "docker":
		if w.image == "" {
			return nil, nil
		}
	case "exec":
		if err := stack.BuildBivouac(ctx, filepath.Join(w.nomad.ExecDir, "bivouac")); err != nil {
			return nil, err
		}
		args, err := json.Marshal([]string{"demo-sandbox"})
		if err != nil {
			return nil, err
		}
		return []string{"-job-var=command=/usr/local/bin/bivouac", "-job-var=args=" + string(args), "-job-var=volume_root=" + w.nomad.VolumeDir}, nil
	}
	return []string{}, nil
}
