package scheduler

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/runtime"
)

// settleInterval is how often a replica looks for what another one left in
// flight.
const settleInterval = 5 * time.Second

// watchRetry is the pause after a driver's watch ended with an error.
const watchRetry = time.Second

// Run does the background work until ctx ends: it cleans up what has expired,
// settles what dead replicas left in flight, notes what happens to sandboxes,
// and reconciles while this replica leads. It returns once all of that is quiet.
// Failures are logged and tried again; any number of replicas may run it.
func (s *Scheduler) Run(ctx context.Context) {
	var g errgroup.Group
	g.Go(func() error { return every(ctx, s.CleanupInterval, s.cleanupPass) })
	g.Go(func() error { return every(ctx, settleInterval, s.settlePass) })
	g.Go(func() error { return every(ctx, watchRetry, s.lead) })
	for name, driver := range s.Drivers {
		if w, ok := driver.(runtime.Watcher); ok {
			g.Go(func() error { return every(ctx, watchRetry, func(ctx context.Context) { s.watch(ctx, name, w) }) })
		}
	}
	_ = g.Wait() // every only ends with ctx
}

// every calls f at once and then at each interval, until ctx ends.
func every(ctx context.Context, interval time.Duration, f func(context.Context)) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for ctx.Err() == nil { // also where both are due
		f(ctx)
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
	return nil
}

func (s *Scheduler) cleanupPass(ctx context.Context) {
	_, _ = s.CleanupExpired(ctx) // it has logged and counted its errors
}

func (s *Scheduler) settlePass(ctx context.Context) {
	if err := s.SettleInFlight(ctx); err != nil && ctx.Err() == nil {
		s.Logger.Warn("settle_failed", "error", Kind(err), "detail", err)
	}
}

// watch notes what a driver reports until its watch ends.
func (s *Scheduler) watch(ctx context.Context, name string, w runtime.Watcher) {
	var g errgroup.Group
	g.SetLimit(workers)
	err := w.Watch(ctx, func(changed runtime.Sandbox) {
		g.Go(func() error {
			if err := s.record(ctx, changed); err != nil && ctx.Err() == nil {
				s.Logger.Warn("sandbox_record_failed", "chat_id", changed.ChatID,
					"session_id", changed.SessionID, "error", Kind(err), "detail", err)
			}
			return nil
		})
	})
	_ = g.Wait() // its functions return no error
	if err != nil && ctx.Err() == nil && !errors.Is(err, context.Canceled) {
		s.Logger.Warn("watch_failed", "runtime", name, "error", Kind(err), "detail", err)
	}
}
