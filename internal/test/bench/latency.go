package main

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

// stopwatch collects the durations of several operations that are measured in
// turns.
type stopwatch map[string][]time.Duration

func (s stopwatch) time(what string, f func() error) error {
	began := time.Now()
	if err := f(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	s[what] = append(s[what], time.Since(began))
	return nil
}

// latency measures how long a sandbox takes from raw Nomad, from Bivouac, and,
// with the docker template, from docker. Each round measures all of them, one
// after the other.
func (w *world) latency(ctx context.Context, template string, rounds int) (report, error) {
	if template == "docker" && w.image == "" {
		return nil, nil
	}
	raw, err := newRawNomad(ctx, w, template)
	if err != nil {
		return nil, err
	}
	defer raw.close()
	r, err := w.startReplica(ctx, replicaConfig{consul: w.consul.Addr(), nomad: w.nomad.Addr(), prefix: "latency-" + template, template: template})
	if err != nil {
		return nil, err
	}

	const (
		answers, running = "raw register until it answers", "raw register until Nomad says running"
		docker           = "docker run until it answers"
		create, reuse    = "create", "reuse"
		del              = "delete"
	)
	times := stopwatch{}
	for range rounds + 1 { // the first round is a warm-up
		a, b, d, chat := uuid.NewString(), uuid.NewString(), uuid.NewString(), uuid.New()
		steps := []struct {
			what string
			do   func() error
			undo func() error
		}{
			{answers, func() error { return raw.untilAnswers(ctx, a) }, func() error { return raw.remove(ctx, a) }},
			{create, func() error { return r.create(ctx, chat) }, nil},
			{reuse, func() error { return r.create(ctx, chat) }, nil},
			{del, func() error { return r.delete(ctx, chat) }, nil},
			{running, func() error { return raw.untilRunning(ctx, b) }, func() error { return raw.remove(ctx, b) }},
		}
		if template == "docker" {
			check := func(ctx context.Context, e runtime.Endpoint) error { return raw.template.Ready().Check.Wait(ctx, e, d) }
			steps = append(steps, struct {
				what string
				do   func() error
				undo func() error
			}{docker, func() error { return dockerRun(ctx, w.image, r.volume, d, check) }, func() error { return dockerRemove(ctx, d) }})
		}
		for _, step := range steps {
			if err := times.time(step.what, step.do); err != nil {
				return nil, err
			}
			if step.undo != nil {
				if err := step.undo(); err != nil {
					return nil, fmt.Errorf("undo %s: %w", step.what, err)
				}
			}
		}
	}
	if err := r.Stop(); err != nil {
		return nil, err
	}

	row := func(what string) row {
		if len(times[what]) == 0 {
			return timed(template, what, nil)
		}
		return timed(template, what, times[what][1:])
	}
	base := []string{answers, running}
	if template == "docker" {
		base = append(base, docker)
	}
	var out report
	for _, what := range base {
		out = append(out, row(what))
	}
	created := row(create)
	created.against(out...)
	return append(out, created, row(reuse), row(del)), nil
}
