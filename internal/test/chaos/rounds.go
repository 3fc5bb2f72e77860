package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// idle is the maximum average time per created session. A run with fewer
// sessions proves nothing. Creating a session takes much less time.
const idle = 15 * time.Second

// run alternates between faults and quiet periods until the time is over.
func (w *world) run(ctx context.Context) (report string, err error) {
	began := time.Now()
	w.watch(ctx)
	err = w.cycles(ctx, began.Add(w.plan.duration))
	w.halt()
	if n, least := w.load.made.Load(), int64(w.plan.duration/idle); n < least && err == nil {
		err = fmt.Errorf("%w: no more than %d sessions were made, and %d were to be", errBroken, n, least)
	}
	report = w.report(time.Since(began))
	if n := w.log.violations(); n > 0 {
		err = errors.Join(fmt.Errorf("%w: %d violations:\n%s", errBroken, n, w.log.worst()), err)
	}
	return report, err
}

func (w *world) cycles(ctx context.Context, end time.Time) error {
	patience := end.Add(w.plan.duration)
	w.serveNeighbour(ctx)
	for round := 1; ctx.Err() == nil; round++ {
		name, times := w.rarest()
		switch now := time.Now(); {
		case now.Before(end):
		case times >= w.plan.times:
			return nil
		case now.After(patience):
			return fmt.Errorf("%s came only %d times", name, times)
		}
		w.log.note("round %d", round)
		if err := w.stir(ctx, w.plan.stir); err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		if ctx.Err() != nil {
			break
		}
		if err := w.settle(ctx); err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		if w.serve(ctx); ctx.Err() != nil {
			break
		}
		if w.checkEvents(ctx); ctx.Err() != nil {
			break
		}
		fmt.Fprintf(os.Stderr, "chaos: %s\n", w.progress(round))
	}
	return ctx.Err()
}
