package scheduler

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

// observe returns the session as its driver sees it now. If the driver cannot tell,
// observe returns the session as recorded: an unknown state does not mean dead.
func (s *Scheduler) observe(ctx context.Context, session Session) Session {
	if !session.mayChange() {
		return session
	}
	driver, err := s.driver(session.Runtime)
	if err != nil {
		return session
	}
	sandbox, err := driver.Inspect(ctx, session.SessionID.String())
	return seenAs(session, sandbox, err)
}

// mayChange reports whether the driver's view may change the recorded state. It may not
// while another operation works on the session, or once the sandbox is dead.
func (s Session) mayChange() bool { return s.State == StateRunning || s.State == StateLost }

// seenAs returns the session updated with the result of its driver's Inspect.
func seenAs(session Session, sandbox runtime.Sandbox, err error) Session {
	switch {
	case errors.Is(err, runtime.ErrNotFound):
		session.State, session.Reason = StateLost, "the runtime no longer knows the sandbox"
	case errors.Is(err, runtime.ErrConflict):
		session.State, session.Reason = StateLost, err.Error()
	case err != nil:
	case isOfAnotherChat(sandbox, session):
		session.State, session.Reason = StateLost, "the session is that of another chat: "+sandbox.ChatID
	case sandbox.State == runtime.StateStarting && sandbox.ContainerID == "": // safeguard: doubt about what is not seen to start
		// The driver's view is older than the record, which already has a container.
	case sandbox.ContainerID != session.ContainerID:
		session.State, session.Reason = StateLost, "another sandbox has taken its place: "+sandbox.ContainerID
	case sandbox.State == runtime.StateDead:
		session.State, session.Reason = StateDead, session.AccessToken.HideIn(sandbox.Reason)
	case sandbox.State == runtime.StateLost:
		session.State, session.Reason = StateLost, session.AccessToken.HideIn(sandbox.Reason)
	default:
		session.State, session.Reason = StateRunning, ""
		if sandbox.Endpoint.IsValid() { // the driver knows the current endpoint
			session.Endpoint = sandbox.Endpoint
		}
	}
	return session
}

// record writes that a session's sandbox has ended, is lost or is back, if the driver
// confirms it and the record does not say so yet. wait is how long it waits for the
// chat's lock.
func (s *Scheduler) record(ctx context.Context, changed runtime.Sandbox, wait time.Duration) error {
	chatID, err := s.chatOf(ctx, changed)
	if err != nil {
		return err
	}
	if chatID == uuid.Nil {
		return nil // not a sandbox of a session
	}
	known, _, err := s.Store.Get(ctx, chatID, Block{})
	if errors.Is(err, ErrNewerRecord) {
		return nil // a newer replica records it
	}
	if err != nil {
		return err
	}
	if known == nil || known.SessionID.String() != changed.SessionID {
		return nil
	}
	if s.observe(ctx, *known).State == known.State {
		return nil
	}
	lease, err := s.Locker.Lock(ctx, chatID, wait)
	if err != nil {
		return err
	}
	defer s.release(ctx, lease)
	ctx, done := s.underLock(ctx, lease)
	defer done()

	current := lease.Session()
	if current == nil || current.SessionID != known.SessionID {
		return nil
	}
	seen := s.observe(ctx, *current)
	if seen.State == current.State {
		return nil
	}
	event := Event{Type: EventType(seen.State), Before: current, After: &seen, Reason: seen.Reason}
	return s.attempt(ctx, event, func() error {
		return write(ctx, lease, &seen, Release, s.change(ctx, ChangeType(seen.State), seen, seen.Reason))
	})
}

// chatOf returns the chat whose session a sandbox is, or the nil UUID. The driver may know
// a claimed spare by its pool alone.
func (s *Scheduler) chatOf(ctx context.Context, sandbox runtime.Sandbox) (uuid.UUID, error) {
	if sandbox.ChatID != "" || sandbox.Pool == "" {
		chatID, _ := uuid.Parse(sandbox.ChatID)
		return chatID, nil
	}
	sessionID, err := uuid.Parse(sandbox.SessionID)
	if err != nil {
		return uuid.Nil, nil //nolint:nilerr // not a session of this Bivouac
	}
	spare, chatID, err := s.Store.FindSpare(ctx, sessionID)
	if spare != nil {
		s.filling.wake()
	}
	return chatID, err
}
