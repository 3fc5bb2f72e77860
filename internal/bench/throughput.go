package main

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"
)

// perCaller is how many sandboxes each of many callers makes.
const perCaller = 4

// throughput measures creates per second, until each sandbox answers, against
// raw registers with as many callers.
func (w *world) throughput(ctx context.Context) (report, error) {
	tmpl, err := w.template("raw_exec")
	if err != nil {
		return nil, err
	}
	streamCtx, endStream := context.WithCancel(ctx)
	raw, err := newRawNomad(streamCtx, w, tmpl)
	if err != nil {
		endStream()
		return nil, err
	}
	defer func() {
		endStream()
		<-raw.ended
	}()
	r, err := w.startReplica(ctx, replicaConfig{consul: w.consul.Addr(), nomad: w.nomad.Addr(), prefix: "throughput", template: "raw_exec"})
	if err != nil {
		return nil, err
	}
	var out report
	for _, callers := range []int{1, 8, 32} {
		part := fmt.Sprintf("%d callers", callers)
		rawRow, err := rate(ctx, part, "raw registers", callers,
			func(ctx context.Context, id uuid.UUID) error { return raw.untilAnswers(ctx, id.String()) },
			func(ctx context.Context, id uuid.UUID) error { return raw.remove(ctx, id.String()) })
		if err != nil {
			return nil, err
		}
		createRow, err := rate(ctx, part, "creates", callers, r.create, r.delete)
		if err != nil {
			return nil, err
		}
		createRow.against(rawRow)
		out = append(out, rawRow, createRow)
	}
	return out, r.stop()
}

// rate has callers make sandboxes for all they can, and removes them.
func rate(ctx context.Context, part, what string, callers int, do, undo func(context.Context, uuid.UUID) error) (row, error) {
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
	if err := each(do); err != nil {
		return row{}, fmt.Errorf("%s: %w", what, err)
	}
	took := time.Since(began)
	if err := each(undo); err != nil {
		return row{}, fmt.Errorf("undo %s: %w", what, err)
	}
	return row{Part: part, What: what, N: len(ids), Count: float64(len(ids)) / took.Seconds(), Unit: "per s"}, nil
}
