package scheduler

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/attribute"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/runtime"
)

const (
	// maxCleanup bounds one pass of CleanupExpired. The next pass takes the rest.
	maxCleanup = 4096
	// cleaners is how many chats a pass works on at a time. Each makes one runtime
	// request at a time. A runtime such as Nomad gets at most 32 requests at a time, so
	// the other half is left for callers.
	cleaners = 16
	// cleanupWait is how long a pass waits for the lock of a chat. It is longer than
	// another replica usually takes to end a session, but no longer than that, because
	// other sessions wait behind this one.
	cleanupWait = 5 * time.Second
)

// CleanupResult is the result of a pass of [Scheduler.CleanupExpired].
type CleanupResult struct {
	Cleaned    []Session // as they were before
	ErrorCount int       // expired sessions that could not be cleaned up
}

// CleanupExpired ends the sessions that have expired. It reads each record again under
// its lock, because the session may have been renewed or replaced in the meantime. If one
// cannot be ended, the others still are, and the next pass tries it again. CleanupExpired
// returns an error only if the pass could not begin.
func (s *Scheduler) CleanupExpired(ctx context.Context) (CleanupResult, error) {
	ctx, span := s.startSpan(ctx, "usecase.cleanup_expired_sandboxes")
	defer span.End()
	if err := CallerFrom(ctx).MayOperate(LevelWrite); err != nil {
		return CleanupResult{}, fmt.Errorf("cleanup: %w", err)
	}

	expired, err := s.Store.Expired(ctx, s.Now(), maxCleanup)
	if err != nil {
		err = fmt.Errorf("cleanup: list expired: %w", err)
		s.journal.note(ctx, Event{Type: EventCleanupFailed, Err: err, Reason: "list_expired"})
		return CleanupResult{}, err
	}
	span.SetAttributes(attribute.Int("sandbox.expired_count", len(expired)))

	cleaned := make([]*Session, len(expired))
	failed := make([]bool, len(expired))
	var g, held errgroup.Group
	g.SetLimit(cleaners)
	held.SetLimit(maxHeld)
	// Replicas that begin at the same time start with different sessions.
	random := uuid.New()
	first := int(binary.BigEndian.Uint16(random[:])) % max(1, len(expired))
	for n := range expired {
		i := (first + n) % len(expired)
		session := expired[i]
		if ctx.Err() != nil { // the pass was cancelled: skip the rest
			failed[i] = true
			continue
		}
		g.Go(func() error {
			var err error
			cleaned[i], err = s.cleanupOne(ctx, session, 0)
			failed[i] = err != nil
			if errors.Is(err, errHeld) { // wait for its lock beside the others
				held.Go(func() error {
					cleaned[i], err = s.cleanupOne(ctx, session, cleanupWait)
					failed[i] = err != nil
					return nil
				})
			}
			return nil
		})
	}
	_ = g.Wait() // its functions return no error: one failure must not end the pass
	_ = held.Wait()

	var res CleanupResult
	for i := range expired {
		if cleaned[i] != nil {
			res.Cleaned = append(res.Cleaned, *cleaned[i])
		}
		if failed[i] {
			res.ErrorCount++
		}
	}
	span.SetAttributes(
		attribute.Int("sandbox.cleaned_count", len(res.Cleaned)),
		attribute.Int("sandbox.error_count", res.ErrorCount))
	if ctx.Err() == nil {
		s.metrics.passSucceeded(ctx, "cleanup")
	}
	if res.ErrorCount == 0 {
		traceResult(ctx, "completed")
	} else {
		traceResult(ctx, "completed_with_errors")
	}
	return res, nil
}

// errHeld is returned by cleanupOne if it was not to wait for the chat's lock.
var errHeld = errors.New("the chat's lock is held")

// cleanupOne returns the session that it ended, or nil if the session no longer needed
// to be ended. wait is how long it waits for the chat's lock. With 0 it does nothing and
// returns errHeld if somebody holds the lock.
func (s *Scheduler) cleanupOne(ctx context.Context, session Session, wait time.Duration) (*Session, error) {
	lease, lockErr := s.Locker.Lock(ctx, session.ChatID, wait)
	if wait == 0 && errors.Is(lockErr, ErrLockTimeout) {
		return nil, errHeld
	}
	ctx, span := s.startSpan(ctx, "usecase.cleanup_expired_sandbox", chatAttr(session.ChatID),
		attribute.String("session.id", session.SessionID.String()),
		attribute.String("container.id", session.ContainerID))
	defer span.End()

	cleaned, err := s.endIfExpired(ctx, session, lease, lockErr)
	switch {
	case err != nil:
		s.journal.note(ctx, Event{Type: EventExpireFailed, Before: &session, Err: err})
	case cleaned == nil:
		traceResult(ctx, "skipped")
	}
	return cleaned, err
}

func (s *Scheduler) endIfExpired(ctx context.Context, listed Session, lease Lease, lockErr error) (*Session, error) {
	if lockErr != nil {
		return nil, fmt.Errorf("cleanup: %w", lockErr)
	}
	defer s.release(ctx, lease)
	ctx, done := s.underLock(ctx, lease)
	defer done()

	isDue := func() bool {
		current := lease.Session()
		return current != nil && current.SessionID == listed.SessionID && current.Expired(s.Now()) // safeguard: re-check in cleanup
	}
	if !isDue() {
		return nil, nil
	}
	if _, err := s.reclaim(ctx, lease, listed.ChatID, s.chatFinders()); err != nil {
		return nil, fmt.Errorf("cleanup: %w", err)
	}
	if !isDue() {
		return nil, nil
	}
	current := lease.Session()
	found := *current
	driver, err := s.driver(found.Runtime)
	if err != nil {
		return nil, fmt.Errorf("cleanup: %w", err)
	}
	err = s.attempt(ctx, Event{Type: EventExpired, Before: &found}, func() error {
		return s.end(ctx, lease, driver, runtime.Driver.Stop, ChangeExpired)
	})
	if err != nil {
		return nil, fmt.Errorf("cleanup: %w", err)
	}
	return &found, nil
}
