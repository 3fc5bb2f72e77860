package scheduler

import (
	"context"
	"errors"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/runtime"
)

// settleInterval is how often a replica looks for what another one left in
// flight.
const settleInterval = 5 * time.Second

// The pause before something is begun again that ended: the first, and what it
// grows to while it goes on failing.
const (
	minRetry = time.Second
	maxRetry = 15 * time.Second
)

// maxHeld is how many changes wait for the locks of their chats at a time.
const maxHeld = 128

// tellEvery is how often a failure is logged that goes on.
const tellEvery = time.Minute

// Run does the background work until ctx ends: it cleans up expired sessions, settles
// what dead replicas left in flight, records what happens to sandboxes, and reconciles
// while this replica is the leader. It returns once all of that has ended. It logs
// failures and tries again. Any number of replicas may call Run.
func (s *Scheduler) Run(ctx context.Context) {
	ctx = WithCaller(ctx, background)
	s.metrics.leader.Record(ctx, 0)
	var g errgroup.Group
	g.Go(func() error { return every(ctx, s.CleanupInterval, s.cleanupPass) })
	g.Go(func() error { return s.keepSettling(ctx) })
	g.Go(func() error { return s.again(ctx, "lead_failed", nil, s.lead) })
	for name, driver := range s.Drivers {
		if w, ok := driver.(runtime.Watcher); ok {
			g.Go(func() error {
				return s.again(ctx, "watch_failed", []any{"runtime", name}, func(ctx context.Context) error { return s.watch(ctx, w) })
			})
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

// keepSettling begins to settle what is in flight, again and again. What takes
// long does not keep what comes to be in flight later from being begun.
func (s *Scheduler) keepSettling(ctx context.Context) error {
	trouble := complaint{s: s, event: "settle_failed"}
	g := newSettlers()
	_ = every(ctx, settleInterval, func(ctx context.Context) { trouble.note(ctx, s.beginSettling(ctx, g)) }) // it only ends with ctx
	return g.Wait()
}

// again calls f, which takes long, anew whenever it ends, until ctx ends.
func (s *Scheduler) again(ctx context.Context, event string, args []any, f func(context.Context) error) error {
	trouble := complaint{s: s, event: event, args: args}
	for pause := minRetry; ctx.Err() == nil; {
		began := time.Now()
		err := f(ctx)
		trouble.note(ctx, err)
		if err == nil || time.Since(began) > maxRetry {
			pause = minRetry
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, maxRetry)
	}
	return nil
}

// complaint logs what goes on failing when it begins to, and then rarely, so
// that an outage does not fill the log.
type complaint struct {
	s     *Scheduler
	event string
	args  []any
	told  time.Time // zero: all is well
}

func (c *complaint) note(ctx context.Context, err error) {
	switch {
	case err == nil:
		c.told = time.Time{}
	case ctx.Err() != nil: // nobody wants it any more
	case time.Since(c.told) >= tellEvery:
		c.told = time.Now()
		c.s.Logger.Warn(c.event, append(slices.Clone(c.args), "error", Kind(err), "detail", err)...)
	}
}

// watch notes what a driver reports until its watch ends. A chat whose lock is
// held waits apart from the others. What finds no room there is left to
// reconciling.
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
	if errors.Is(err, errors.ErrUnsupported) { // it has nothing to report, and is not asked again
		<-ctx.Done()
		return nil
	}
	return err
}
