package scheduler

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/runtime"
)

// SettleInFlight undoes the starts and finishes the stops that somebody began
// and did not end. A record in flight whose lock is free has nobody at work on
// it: its holder is dead, or can no longer write. One whose lock is held is left
// alone. The error is for a pass that could not begin; what fails for one chat
// is logged and tried again at the next pass.
func (s *Scheduler) SettleInFlight(ctx context.Context) error {
	inFlight, err := s.Store.InFlight(ctx)
	if err != nil {
		return fmt.Errorf("settle: list what is in flight: %w", err)
	}
	var g errgroup.Group
	g.SetLimit(workers)
	for _, session := range inFlight {
		g.Go(func() error {
			if err := s.settle(ctx, session); err != nil && ctx.Err() == nil {
				s.Logger.Warn("sandbox_settle_failed", logArgs(session, "error", Kind(err), "detail", err)...)
			}
			return nil
		})
	}
	_ = g.Wait() // its functions return no error: one failure must not end the pass
	return nil
}

func (s *Scheduler) settle(ctx context.Context, listed Session) error {
	lease, err := s.Locker.Lock(ctx, listed.ChatID, 0)
	if errors.Is(err, ErrLockTimeout) || errors.Is(err, ErrBusy) {
		return nil // somebody is at work on it
	}
	if err != nil {
		return err
	}
	defer s.release(ctx, lease)
	ctx, done := underLock(ctx, lease)
	defer done()
	ctx, cancel := context.WithTimeout(ctx, undoLimit) // not to keep the others waiting
	defer cancel()

	current := lease.Session()
	if current == nil || current.SessionID != listed.SessionID || current.Settled() {
		return nil
	}
	found := *current
	driver, err := s.driver(found.Runtime)
	if err != nil {
		return err
	}
	if err := s.end(ctx, lease, driver, runtime.Driver.Delete); err != nil {
		return err
	}
	s.Logger.Info("sandbox_settled", logArgs(found, "state", found.State)...)
	return nil
}
