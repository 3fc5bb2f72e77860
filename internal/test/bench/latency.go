package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/nomad/api"

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
	s.add(what, time.Since(began))
	return nil
}

func (s stopwatch) add(what string, took time.Duration) { s[what] = append(s[what], took) }

// What the ratios of a create should be at most.
const (
	targetOfRun   = 1.25 // docker run until it answers
	targetOfFloor = 1.10 // the fastest that Nomad can do
)

// latency measures how long a sandbox takes from raw Nomad, from Bivouac, and,
// with the docker template, from docker. Each round measures all of them, one
// after the other. With the docker template it also measures which parts of a create
// are Nomad's and Docker's.
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
		best             = "raw register, probed when the container has started"
		docker           = "docker run until it answers"
		dockerOwn        = "docker run, Docker's part"
		create, reuse    = "create", "reuse"
		del              = "delete"
	)
	parts := []string{"create, until Nomad has placed it", "create, from then until Nomad asks Docker",
		"create, Docker's part", "create, from then until it answers"}
	var starts *containerStarts
	if template == "docker" {
		if starts, err = followContainerStarts(ctx); err != nil {
			return nil, err
		}
		defer starts.stop()
	}
	times := stopwatch{}
	for range rounds + 1 { // the first round is a warm-up
		a, b, c, d, chat := uuid.NewString(), uuid.NewString(), uuid.NewString(), uuid.NewString(), uuid.New()
		type step struct {
			what string
			do   func() error
			then func() error // not timed
		}
		var allocID string
		var began time.Time
		created := func() error {
			if starts == nil {
				return nil
			}
			return times.addParts(ctx, parts, began, raw, starts, allocID)
		}
		steps := []step{
			{answers, func() error { return raw.untilAnswers(ctx, a) }, func() error { return raw.remove(ctx, a) }},
			{create, func() (err error) {
				began = time.Now()
				allocID, err = r.createContainer(ctx, chat)
				return err
			}, created},
			{reuse, func() error { return r.create(ctx, chat) }, nil},
			{del, func() error { return r.delete(ctx, chat) }, nil},
			{running, func() error { return raw.untilRunning(ctx, b) }, func() error { return raw.remove(ctx, b) }},
		}
		if template == "docker" {
			check := func(ctx context.Context, e runtime.Endpoint) error { return raw.template.Ready().Check.Wait(ctx, e, d) }
			steps = append(steps,
				step{best, func() error { return raw.untilAnswersAtBest(ctx, c, starts) }, func() error { return raw.remove(ctx, c) }},
				step{docker, func() error { return dockerRun(ctx, w.image, r.volume, d, check) }, func() error {
					from, to, err := starts.times(ctx, d)
					times.add(dockerOwn, to.Sub(from))
					return errors.Join(err, dockerRemove(ctx, d))
				}})
		}
		for _, step := range steps {
			if err := times.time(step.what, step.do); err != nil {
				return nil, err
			}
			if step.then != nil {
				if err := step.then(); err != nil {
					return nil, fmt.Errorf("after %s: %w", step.what, err)
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
		base = append(base, best, docker)
	}
	var out report
	for _, what := range base {
		out = append(out, row(what))
	}
	whole := row(create)
	whole.against(out...)
	if template == "docker" {
		whole.aim(docker, targetOfRun)
		whole.aim(best, targetOfFloor)
	} else {
		whole.aim(answers, targetOfFloor)
	}
	out = append(out, whole)
	if template == "docker" {
		for _, what := range parts {
			part := row(what)
			part.Count, part.Unit = 100*part.P50/whole.P50, "% of create"
			out = append(out, part)
		}
		out = append(out, row(dockerOwn))
	}
	return append(out, row(reuse), row(del)), nil
}

// addParts adds the parts of a create on Docker that began at a time and has just ended.
func (s stopwatch) addParts(ctx context.Context, parts []string, began time.Time, raw *rawNomad, starts *containerStarts, allocID string) error {
	ended := time.Now()
	alloc, _, err := raw.client.Allocations().Info(allocID, (&api.QueryOptions{}).WithContext(ctx))
	if err != nil {
		return err
	}
	asked, started, err := starts.times(ctx, allocID)
	if err != nil {
		return err
	}
	for i, until := range []time.Time{time.Unix(0, alloc.CreateTime), asked, started, ended} {
		s.add(parts[i], until.Sub(began))
		began = until
	}
	return nil
}
