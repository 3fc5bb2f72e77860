package scheduler

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

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
// and its record is gone. If the caller may not see the session, Delete finds none. If
// the caller may see but not delete it, Delete returns ErrPermissionDenied.
func (s *Scheduler) Delete(ctx context.Context, chatID uuid.UUID) (DeleteResult, error) {
	ctx, span := s.startSpan(ctx, "usecase.delete_sandbox", chatAttr(chatID))
	defer span.End()

	defer s.metrics.begin(ctx, "delete")()
	began := time.Now()
	session, err := s.delete(ctx, chatID)
	err = s.shuttingDown(err)
	event := Event{Type: EventDeleted, ChatID: chatID, Before: session, Err: err, Took: time.Since(began)}
	res := DeleteResult{ChatID: chatID}
	switch {
	case err != nil:
		event.Type, res = EventDeleteFailed, DeleteResult{}
	case session == nil:
		event.Type = EventDeleteNotFound
	default:
		res = DeleteResult{Found: true, ChatID: chatID, SessionID: session.SessionID, ContainerID: session.ContainerID}
	}
	s.journal.note(ctx, event)
	return res, err
}

// delete returns the session that it found, even if it then failed. Deletes of one chat
// that wait for another one in this replica need no lock to find that it left nothing.
func (s *Scheduler) delete(ctx context.Context, chatID uuid.UUID) (*Session, error) {
	if err := checkChatID(chatID); err != nil {
		return nil, err
	}
	caller, until := CallerFrom(ctx), time.Now().Add(LockWait)
	for ended := false; ; {
		switch none, err := s.hasNothing(ctx, caller, chatID, ended); {
		case err != nil:
			return nil, fmt.Errorf("delete: %w", err)
		case none:
			return nil, nil
		}
		leave, succeeded, err := s.deleting.enter(ctx, s.ending, chatID, until)
		switch {
		case err != nil:
			return nil, fmt.Errorf("delete: %w", err)
		case leave != nil:
			session, err := s.deleteAlone(ctx, caller, chatID, until)
			leave(err == nil)
			return session, err
		}
		ended = succeeded
	}
}

// hasNothing reports whether a chat has no session that the caller may see, and nothing of
// one runs. ended is whether another delete of the chat has just succeeded. Without that a
// chat without a record may still have a sandbox.
func (s *Scheduler) hasNothing(ctx context.Context, caller Caller, chatID uuid.UUID, ended bool) (bool, error) {
	if !ended {
		err := s.checkVisible(ctx, caller, chatID)
		if errors.Is(err, ErrNotFound) {
			return true, nil
		}
		return false, err
	}
	current, _, err := s.Store.Get(ctx, chatID, Block{})
	return err == nil && (current == nil || !caller.May(CapRead, current.AgentID)), err
}

// deleteAlone is a delete while no other one of the chat is in progress in this replica.
func (s *Scheduler) deleteAlone(ctx context.Context, caller Caller, chatID uuid.UUID, until time.Time) (*Session, error) {
	lease, err := s.lockChecked(ctx, caller, chatID, time.Until(until))
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("delete: %w", err)
	}
	defer s.release(ctx, lease)
	ctx, done := s.underLock(ctx, lease)
	defer done()
	if session := lease.Session(); session != nil {
		if err := caller.require(CapWrite, session.AgentID); err != nil {
			return nil, fmt.Errorf("delete: %w", err)
		}
	}
	reclaimed, err := s.reclaim(ctx, lease, chatID, s.chatFinders())
	session := lease.Session()
	if session != nil && !caller.May(CapWrite, session.AgentID) { // it was adopted just now
		return nil, nil
	}
	switch {
	case err != nil:
		return session, fmt.Errorf("delete: %w", err)
	case session == nil && len(reclaimed.ended) > 0 && caller.May(CapRead, reclaimed.ended[0].session().AgentID):
		return reclaimed.ended[0].session(), nil // it had no record and could not be adopted
	case session == nil:
		return nil, nil
	}
	found := *session

	driver, err := s.driver(found.Runtime)
	if err != nil {
		return &found, fmt.Errorf("delete: %w", err)
	}
	if err := s.end(ctx, lease, driver, runtime.Driver.Delete, ChangeDeleted); err != nil {
		return &found, fmt.Errorf("delete: %w", err)
	}
	return &found, nil
}

// end ends the lease's sandbox with the driver's method by. It then removes the record
// and the lock, in this order. what says why the session ends.
func (s *Scheduler) end(ctx context.Context, lease Lease, driver runtime.Driver, by ending, what ChangeType) error {
	session := *lease.Session()
	known, err := isKnown(ctx, driver, session)
	if isOthersSpare(session, err) {
		return s.remove(ctx, lease, session, what)
	}
	if err != nil {
		return err
	}
	if session.State != StateCreating { // an intent to create needs no intent to stop
		if err := markStopping(ctx, lease, known); err != nil {
			return err
		}
	}
	if err := endSandbox(ctx, lease, driver, by, session, known); err != nil {
		return err
	}
	return s.remove(ctx, lease, session, what)
}

// remove removes the record of the lease's session, which has ended, and the lock.
func (s *Scheduler) remove(ctx context.Context, lease Lease, session Session, what ChangeType) error {
	if err := write(ctx, lease, nil, Release, s.change(ctx, what, session, session.Reason)); err != nil { // safeguard: change of an end
		return fmt.Errorf("remove the record: %w", err)
	}
	return nil
}
