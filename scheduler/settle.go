package scheduler

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/runtime"
)

// SettleInFlight undoes unfinished starts and finishes unfinished stops. If the lock of a
// record in flight is free, nobody works on it: the holder is dead or can no longer write.
// SettleInFlight leaves records alone whose lock is held. It logs a failure for one chat,
// and the next pass tries it again. It returns an error only if the pass could not begin.
func (s *Scheduler) SettleInFlight(ctx context.Context) error {
	g := newSettlers()
	err := s.beginSettling(ctx, g)
	_ = g.Wait() // its functions return no error: one failure must not end the pass
	return err
}

// newSettlers returns a group that runs as many functions at a time as one dead replica
// may have left starts in flight. A sandbox that is slow to stop then delays no other.
func newSettlers() *errgroup.Group {
	var g errgroup.Group
	g.SetLimit(maxStarting)
	return &g
}

// beginSettling has the group settle every session in flight. If the group already
// works on a session, its lock is held and the new attempt leaves it alone.
func (s *Scheduler) beginSettling(ctx context.Context, g *errgroup.Group) error {
	inFlight, err := s.Store.InFlight(ctx)
	if err != nil {
		return fmt.Errorf("settle: list what is in flight: %w", err)
	}
	for _, session := range inFlight { // safeguard: settling of what is in flight
		g.Go(func() error {
			s.settleOne(ctx, session)
			return nil
		})
	}
	s.metrics.passSucceeded(ctx, "settle")
	return nil
}

func (s *Scheduler) settleOne(ctx context.Context, session Session) {
	if err := s.settle(ctx, session); err != nil && ctx.Err() == nil {
		s.journal.note(ctx, Event{Type: EventSettleFailed, Before: &session, Err: err})
	}
}

func (s *Scheduler) settle(ctx context.Context, listed Session) error {
	lease, err := s.Locker.Lock(ctx, listed.ChatID, 0)
	if errors.Is(err, ErrLockTimeout) || errors.Is(err, ErrBusy) {
		return nil // another operation works on it
	}
	if err != nil {
		return err
	}
	defer s.release(ctx, lease)
	ctx, done := s.underLock(ctx, lease)
	defer done()
	ctx, cancel := context.WithTimeout(ctx, undoLimit) // so that the chat is not locked for long
	defer cancel()

	inFlight := func() bool {
		current := lease.Session()
		return current != nil && current.SessionID == listed.SessionID && !current.Settled()
	}
	if !inFlight() {
		return nil
	}
	if _, err := s.reclaim(ctx, lease, listed.ChatID, s.chatFinders()); err != nil {
		return err
	}
	if !inFlight() {
		return nil
	}
	found := *lease.Session()
	driver, err := s.driver(found.Runtime)
	if err != nil {
		return err
	}
	return s.attempt(ctx, Event{Type: EventSettled, Before: &found}, func() error {
		return s.end(ctx, lease, driver, runtime.Driver.Delete, ChangeSettled)
	})
}
