package scheduler

import (
	"context"
	"errors"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/runtime"
)

// settleInterval is how often a replica looks for sessions that another replica left in
// flight.
const settleInterval = 5 * time.Second

// The shortest and the longest pause before background work that ended is started again.
const (
	minRestart = time.Second
	maxRestart = 15 * time.Second
)

// maxHeld is how many changes may wait for their chats' locks at a time.
const maxHeld = 128

// Run does the background work until ctx ends: it cleans up expired sessions, settles
// what dead replicas left in flight, records what happens to sandboxes, follows the events,
// and reconciles while this replica is the leader. It returns once all of that has ended. It logs
// failures and tries again. Any number of replicas may call Run.
func (s *Scheduler) Run(ctx context.Context) {
	ctx = WithCaller(ctx, background())
	s.metrics.leader.Record(ctx, 0)
	var g errgroup.Group
	g.Go(func() error { return every(ctx, s.CleanupInterval, s.cleanupPass) })
	g.Go(func() error { return s.keepSettling(ctx) })
	g.Go(func() error { return s.keepRunning(ctx, "lead_failed", nil, s.lead) })
	g.Go(func() error { return s.keepRunning(ctx, "events_failed", nil, s.history.follow) })
	if len(s.Config.Pools) > 0 {
		g.Go(func() error { return s.keepRunning(ctx, "pools_failed", nil, s.followSpares) })
	}
	for name, driver := range s.Drivers {
		if w, ok := driver.(runtime.Watcher); ok {
			g.Go(func() error {
				return s.keepRunning(ctx, "watch_failed", []any{"runtime", name}, func(ctx context.Context) error { return s.watch(ctx, w) })
			})
		}
	}
	_ = g.Wait() // every only ends with ctx
}

// every calls f at once and then at each interval, until ctx ends.
func every(ctx context.Context, interval time.Duration, f func(context.Context)) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for ctx.Err() == nil { // checked here too: select picks at random if both are ready
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

// keepSettling starts a settle pass at each interval. A chat that takes long does not
// delay later passes.
func (s *Scheduler) keepSettling(ctx context.Context) error {
	var outage backoff.Throttle
	g := newSettlers()
	_ = every(ctx, settleInterval, func(ctx context.Context) { // it only ends with ctx
		s.logFailure(ctx, &outage, "settle_failed", s.beginSettling(ctx, g))
	})
	return g.Wait()
}

// keepRunning restarts the long-running f, with backoff, until ctx ends.
func (s *Scheduler) keepRunning(ctx context.Context, event string, args []any, f func(context.Context) error) error {
	var outage backoff.Throttle
	pause := backoff.Backoff{Min: minRestart, Max: maxRestart}
	for ctx.Err() == nil {
		began := time.Now()
		err := f(ctx)
		s.logFailure(ctx, &outage, event, err, args...)
		if err == nil || time.Since(began) > maxRestart {
			pause.Reset()
		}
		_ = backoff.Sleep(ctx, pause.Next()) // the loop checks ctx
	}
	return nil
}

// logFailure logs a failure of background work. During an outage it logs most failures
// at debug level.
func (s *Scheduler) logFailure(ctx context.Context, outage *backoff.Throttle, event string, err error, args ...any) {
	switch {
	case err == nil:
		outage.Reset()
	case ctx.Err() == nil:
		s.Logger.Log(outage.Level(), event, append(slices.Clone(args), "error", Kind(err), "detail", err)...)
	}
}

// watch records what a driver reports until its watch ends. Changes whose chat's lock
// is held wait in a separate group, so that they do not delay others. If that group is
// full, the change is left to the reconciler.
func (s *Scheduler) watch(ctx context.Context, w runtime.Watcher) error {
	var free, held errgroup.Group
	free.SetLimit(workers)
	held.SetLimit(maxHeld)
	note := func(changed runtime.Sandbox, err error) {
		if err != nil && ctx.Err() == nil {
			s.journal.note(ctx, Event{Type: EventRecordFailed, Before: found{Sandbox: changed}.session(), Err: err})
		}
	}
	err := w.Watch(ctx, func(changed runtime.Sandbox) {
		free.Go(func() error {
			err := s.record(ctx, changed, 0)
			if errors.Is(err, ErrLockTimeout) && held.TryGo(func() error {
				note(changed, s.record(ctx, changed, LockWait))
				return nil
			}) {
				return nil
			}
			note(changed, err)
			return nil
		})
	})
	_ = free.Wait() // their functions return no error
	_ = held.Wait()
	if errors.Is(err, errors.ErrUnsupported) { // it has nothing to report: do not watch it again
		<-ctx.Done()
		return nil
	}
	return err
}
