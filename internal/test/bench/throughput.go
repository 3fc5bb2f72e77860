package main

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"
)

// levels sets the number of callers and how many sandboxes each creates in one
// turn. It is enough to keep many callers busy and little enough to take a few
// minutes. A replica starts at most 128 sandboxes at a time.
var levels = []struct{ callers, perCaller int }{{1, 10}, {8, 4}, {32, 2}, {128, 1}}

// way is one way to create and remove sandboxes.
type way struct {
	name     string
	do, undo func(context.Context, uuid.UUID) error
}

// throughput compares creates per second, until each sandbox answers, with raw
// registrations by as many callers.
func (w *world) throughput(ctx context.Context) (report, error) {
	raw, err := newRawNomad(ctx, w, "raw_exec")
	if err != nil {
		return nil, err
	}
	defer raw.close()
	r, err := w.startReplica(ctx, replicaConfig{consul: w.consul.Addr(), nomad: w.nomad.Addr(), prefix: "throughput", template: "raw_exec"})
	if err != nil {
		return nil, err
	}
	ways := []way{
		{"raw registers",
			func(ctx context.Context, id uuid.UUID) error { return raw.untilAnswers(ctx, id.String()) },
			func(ctx context.Context, id uuid.UUID) error { return raw.remove(ctx, id.String()) }},
		{"creates", r.create, r.delete},
	}
	for _, w := range ways { // warm-up: the first sandboxes of a replica and a client are slower
		if _, err := w.turn(ctx, 1, 2); err != nil {
			return nil, err
		}
	}
	var out report
	for _, level := range levels {
		// In turns, so that each way goes first once.
		took := make([]time.Duration, len(ways))
		for _, i := range []int{0, 1, 1, 0} {
			turn, err := ways[i].turn(ctx, level.callers, level.perCaller)
			if err != nil {
				return nil, err
			}
			took[i] += turn
		}
		rows := make(report, len(ways))
		for i, w := range ways {
			n := 2 * level.callers * level.perCaller
			rows[i] = row{Part: fmt.Sprintf("%d callers", level.callers), What: w.name,
				N: n, Count: float64(n) / took[i].Seconds(), Unit: "per s"}
		}
		rows[1].against(rows[0])
		out = append(out, rows...)
	}
	return out, r.Stop()
}

// turn lets callers create sandboxes as fast as they can, returns how long that
// took, and removes the sandboxes.
func (w way) turn(ctx context.Context, callers, perCaller int) (time.Duration, error) {
	ids := make([]uuid.UUID, callers*perCaller)
	for i := range ids {
		ids[i] = uuid.New()
	}
	each := func(f func(context.Context, uuid.UUID) error) error {
		g, ctx := errgroup.WithContext(ctx)
		g.SetLimit(callers)
		for _, id := range ids {
			g.Go(func() error { return f(ctx, id) })
		}
		return g.Wait()
	}
	began := time.Now()
	if err := each(w.do); err != nil {
		return 0, fmt.Errorf("%s: %w", w.name, err)
	}
	took := time.Since(began)
	if err := each(w.undo); err != nil {
		return 0, fmt.Errorf("undo %s: %w", w.name, err)
	}
	return took, nil
}
