package scheduler

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/trace"

	"github.com/bivouac/bivouac/runtime"
)

// DeleteResult is the result of [Scheduler.Delete]. Found is false if the chat had no
// session. Then all other fields but ChatID are zero.
type DeleteResult struct {
	Found       bool
	ChatID      uuid.UUID
	SessionID   uuid.UUID
	ContainerID string
}

// Delete ends the chat's session and returns once nothing of its sandbox runs
// and its record is gone.
func (s *Scheduler) Delete(ctx context.Context, chatID uuid.UUID) (DeleteResult, error) {
	ctx, span := s.startSpan(ctx, "usecase.delete_sandbox", chatAttr(chatID))
	defer span.End()

	session, err := s.delete(ctx, chatID, span)
	err = s.shuttingDown(err)
	switch {
	case err != nil:
		spanError(span, err)
		count(ctx, s.metrics.delete, result("error"))
		args := []any{"chat_id", chatID.String()}
		if session != nil {
			args = logArgs(*session)
		}
		if !errors.Is(err, ErrInvalid) { // else anybody could fill the log
			s.Logger.Error("sandbox_delete_failed", append(args, "error", Kind(err), "detail", err)...)
		}
		return DeleteResult{}, err
	case session == nil:
		spanResult(span, "not_found")
		count(ctx, s.metrics.delete, result("not_found"))
		s.Logger.Info("sandbox_delete_not_found", "chat_id", chatID.String())
		return DeleteResult{ChatID: chatID}, nil
	}
	spanResult(span, "deleted")
	count(ctx, s.metrics.delete, result("deleted"))
	s.Logger.Info("sandbox_deleted", logArgs(*session)...)
	return DeleteResult{Found: true, ChatID: chatID, SessionID: session.SessionID, ContainerID: session.ContainerID}, nil
}

// delete returns the session that it found, also where it then failed.
func (s *Scheduler) delete(ctx context.Context, chatID uuid.UUID, span trace.Span) (*Session, error) {
	if err := checkChatID(chatID); err != nil {
		return nil, err
	}
	lease, err := s.lock(ctx, chatID, LockWait)
	if err != nil {
		return nil, fmt.Errorf("delete: %w", err)
	}
	defer s.release(ctx, lease)
	ctx, done := s.underLock(ctx, lease)
	defer done()
	reclaimed, err := s.reclaim(ctx, lease, chatID, s.chatFinders())
	session := lease.Session()
	if session != nil {
		spanSession(span, *session)
	}
	switch {
	case err != nil:
		return session, fmt.Errorf("delete: %w", err)
	case session == nil && len(reclaimed.ended) > 0:
		return reclaimed.ended[0].session(), nil // it had no record, and none could be made
	case session == nil:
		return nil, nil
	}
	found := *session

	driver, err := s.driver(found.Runtime)
	if err != nil {
		return &found, fmt.Errorf("delete: %w", err)
	}
	if err := s.end(ctx, lease, driver, runtime.Driver.Delete); err != nil {
		return &found, fmt.Errorf("delete: %w", err)
	}
	return &found, nil
}

// end stops the lease's sandbox by the given method of its driver and removes
// the record and the lock, in this order.
func (s *Scheduler) end(ctx context.Context, lease Lease, driver runtime.Driver, by ending) error {
	session := *lease.Session()
	known, err := isKnown(ctx, driver, session)
	if err != nil {
		return err
	}
	if session.State != StateCreating { // an intent to create says enough
		if err := markStopping(ctx, lease, known); err != nil {
			return err
		}
	}
	if err := endSandbox(ctx, lease, driver, by, session, known); err != nil {
		return err
	}
	if err := write(ctx, lease, nil, Release); err != nil {
		return fmt.Errorf("remove the record: %w", err)
	}
	return nil
}
