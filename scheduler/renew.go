package scheduler

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/trace"
)

// Renew sets the session's expiry to ttl from now, or to the default TTL from now if ttl
// is 0. It never makes the expiry earlier. It returns ErrNotFound if the chat has no
// session, ErrExpired if the session has expired, and ErrNotRunning if the sandbox has
// ended.
func (s *Scheduler) Renew(ctx context.Context, chatID uuid.UUID, ttl time.Duration) (Session, error) {
	ctx, span := s.startSpan(ctx, "usecase.renew_sandbox", chatAttr(chatID))
	defer span.End()

	session, err := s.renew(ctx, chatID, ttl, span)
	err = s.shuttingDown(err)
	if err != nil {
		err = fmt.Errorf("renew: %w", err)
		spanError(span, err)
		count(ctx, s.metrics.renew, result("error"))
		if !errors.Is(err, ErrInvalid) { // else anybody could fill the log
			s.Logger.Warn("sandbox_renew_failed", "chat_id", chatID.String(), "error", Kind(err), "detail", err)
		}
		return Session{}, err
	}
	spanResult(span, "renewed")
	count(ctx, s.metrics.renew, result("renewed"))
	s.Logger.Info("sandbox_renewed", logArgs(session, "expires_at", session.ExpiresAt)...)
	return session, nil
}

func (s *Scheduler) renew(ctx context.Context, chatID uuid.UUID, ttl time.Duration, span trace.Span) (Session, error) {
	if err := checkChatID(chatID); err != nil {
		return Session{}, err
	}
	if err := s.checkTTL(ttl); err != nil {
		return Session{}, err
	}
	ttl = cmp.Or(ttl, s.TTL)
	lease, err := s.lock(ctx, chatID, LockWait)
	if err != nil {
		return Session{}, err
	}
	defer s.release(ctx, lease)
	ctx, done := s.underLock(ctx, lease)
	defer done()

	current := lease.Session()
	if current == nil || current.State == StateCreating {
		return Session{}, ErrNotFound
	}
	next := s.observe(ctx, *current)
	spanSession(span, next)
	now := s.now()
	switch {
	case next.Expired(now):
		return Session{}, fmt.Errorf("%w at %s", ErrExpired, next.ExpiresAt.Format(time.RFC3339))
	case next.State == StateDead || next.State == StateStopping:
		why := string(next.State)
		if next.Reason != "" {
			why += ": " + next.Reason
		}
		return Session{}, fmt.Errorf("%w: it is %s", ErrNotRunning, why)
	}
	if later := now.Add(ttl); later.After(next.ExpiresAt) {
		next.ExpiresAt = later
	}
	if next == *current {
		return next, nil
	}
	if err := write(ctx, lease, &next, Release); err != nil {
		return Session{}, fmt.Errorf("write the expiry: %w", err)
	}
	return next, nil
}
