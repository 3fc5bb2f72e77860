package scheduler

import (
	"cmp"
	"context"
	"fmt"
	"reflect"
	"time"

	"github.com/google/uuid"
)

// Renew sets the session's expiry to ttl from now, or to the default TTL from now if ttl
// is 0. It never makes the expiry earlier. It returns ErrNotFound if the chat has no
// session that the caller may see, ErrPermissionDenied if the caller may see but not
// renew it, ErrExpired if the session has expired, and ErrNotRunning if the sandbox has
// ended.
func (s *Scheduler) Renew(ctx context.Context, chatID uuid.UUID, ttl time.Duration) (Session, error) {
	ctx, span := s.startSpan(ctx, "usecase.renew_sandbox", chatAttr(chatID))
	defer span.End()

	before, after, err := s.renew(ctx, chatID, ttl)
	if err = s.shuttingDown(err); err != nil {
		err = fmt.Errorf("renew: %w", err)
		s.journal.note(ctx, Event{Type: EventRenewFailed, ChatID: chatID, Before: before, Err: err})
		return Session{}, err
	}
	s.journal.note(ctx, Event{Type: EventRenewed, Before: before, After: after})
	return *after, nil
}

// renew returns the session that it found, even if it then failed, and the renewed
// session.
func (s *Scheduler) renew(ctx context.Context, chatID uuid.UUID, ttl time.Duration) (before, after *Session, err error) {
	if err := checkChatID(chatID); err != nil {
		return nil, nil, err
	}
	if err := s.checkTTL(ttl); err != nil {
		return nil, nil, err
	}
	caller := CallerFrom(ctx)
	lease, err := s.lockVisible(ctx, caller, chatID)
	if err != nil {
		return nil, nil, err
	}
	defer s.release(ctx, lease)
	ctx, done := s.underLock(ctx, lease)
	defer done()

	current := lease.Session()
	if current == nil || current.State == StateCreating {
		return nil, nil, ErrNotFound
	}
	ttl, err = caller.mayRenew(current.AgentID, ttl, cmp.Or(ttl, s.TTL))
	if err != nil {
		return nil, nil, err
	}
	seen := s.observe(ctx, *current)
	now := s.now()
	switch {
	case seen.Expired(now):
		return &seen, nil, expired(seen)
	case seen.State == StateDead || seen.State == StateStopping:
		return &seen, nil, notRunning(seen)
	}
	next := seen
	if later := now.Add(ttl); later.After(next.ExpiresAt) {
		next.ExpiresAt = later
	}
	if reflect.DeepEqual(next, *current) {
		return &seen, &next, nil
	}
	changes := []Change{s.change(ctx, ChangeRenewed, next, "")}
	if seen.State != current.State {
		changes = append([]Change{s.change(ctx, ChangeType(seen.State), seen, seen.Reason)}, changes...)
	}
	if err := write(ctx, lease, &next, Release, changes...); err != nil {
		return &seen, nil, fmt.Errorf("write the expiry: %w", err)
	}
	return &seen, &next, nil
}

// expired returns the ErrExpired of a session.
func expired(session Session) error {
	return fmt.Errorf("%w at %s", ErrExpired, session.ExpiresAt.Format(time.RFC3339))
}

// notRunning returns the ErrNotRunning of a session, with its state and why.
func notRunning(session Session) error {
	return fmt.Errorf("%w: it is %s", ErrNotRunning, because(string(session.State), ": ", session.Reason))
}
