package scheduler

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

// Spare is the record of a sandbox that was started before a chat needs it. It has a
// session ID from the start, and becomes the sandbox of one session at most.
type Spare struct {
	SessionID   uuid.UUID
	Pool        string
	Runtime     string
	Variant     string // see [runtime.Info]
	State       SpareState
	ContainerID string // empty while starting
	AccessToken runtime.Secret
	CreatedAt   time.Time

	// Version is that of the record. The store sets it. 0: there is no record yet.
	Version uint64
}

// SpareState is the state of a spare.
type SpareState string

const (
	// SpareStarting is a spare whose sandbox may exist or not.
	SpareStarting SpareState = "starting"
	// SpareReady is a spare that a create may claim.
	SpareReady SpareState = "ready"
	// SpareEnding is a spare whose sandbox is being ended.
	SpareEnding SpareState = "ending"
)

func (s Spare) spec() runtime.Spec {
	return runtime.Spec{SessionID: s.SessionID.String(), Pool: s.Pool, CreatedAt: s.CreatedAt, AccessToken: s.AccessToken}
}

// startSpare starts a spare and records it. It is recorded before it is started, so that
// it is found if this replica dies.
func (s *Scheduler) startSpare(ctx context.Context, spare Spare) error {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	spare, err := s.Store.PutSpare(ctx, spare)
	if err != nil {
		return fmt.Errorf("record a spare: %w", err)
	}
	driver := s.Drivers[spare.Runtime]
	sandbox, err := driver.Create(ctx, spare.spec(), func(runtime.Stage) {})
	if err == nil {
		spare.State, spare.ContainerID = SpareReady, sandbox.ContainerID
		err = checkSpare(sandbox, spare)
	}
	if err == nil {
		_, err = s.Store.PutSpare(ctx, spare)
	}
	if err == nil {
		return nil
	}
	err = runtimeError(ctx, "start a spare", hidingToken(err, spare.AccessToken))
	if ctx.Err() != nil {
		return err
	}
	return errors.Join(err, s.endSpare(ctx, spare))
}

// checkSpare returns an error if the driver broke its contract with what it answered to
// the create of a spare.
func checkSpare(sandbox runtime.Sandbox, spare Spare) error {
	if sandbox.ChatID != "" || sandbox.Pool != spare.Pool {
		return fmt.Errorf("%w: runtime %s broke its contract: it answered for chat %q and pool %q", runtime.ErrUnavailable, spare.Runtime, sandbox.ChatID, sandbox.Pool)
	}
	sandbox.ChatID = uuid.Nil.String() // as of a session without a chat
	return checkStarted(sandbox, Session{SessionID: spare.SessionID, Runtime: spare.Runtime})
}

// endSpare ends a spare, unless it has been claimed. It is first recorded as ending, so
// that nobody claims it any more. If a chat has the sandbox, the record is from an old state
// of the store, and only that is removed. A sandbox that cannot be looked at is not ended.
func (s *Scheduler) endSpare(ctx context.Context, spare Spare) error {
	driver, err := s.driver(spare.Runtime)
	if err != nil {
		return err
	}
	spare, err = s.markEnding(ctx, spare)
	if err != nil {
		return fmt.Errorf("end a spare: %w", err)
	}
	limited, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	sandbox, err := driver.Inspect(limited, spare.SessionID.String())
	switch {
	case err == nil && sandbox.ChatID != "": // safeguard: look at a spare before its end
		return s.Store.RemoveSpare(ctx, spare)
	case err == nil, errors.Is(err, runtime.ErrNotFound), errors.Is(err, runtime.ErrConflict):
		err = driver.Delete(limited, spare.SessionID.String())
	}
	if err != nil {
		return runtimeError(ctx, "end a spare", hidingToken(err, spare.AccessToken))
	}
	return s.Store.RemoveSpare(ctx, spare)
}

// markEnding records that a spare is about to be ended.
func (s *Scheduler) markEnding(ctx context.Context, spare Spare) (Spare, error) {
	if spare.State == SpareEnding {
		return spare, nil
	}
	spare.State = SpareEnding
	return s.Store.PutSpare(ctx, spare) // safeguard: end of a spare that was claimed
}

// endStraySpare ends a sandbox that is a spare, but neither recorded as one nor claimed.
// Its record was removed by hand, or an old state of the store was restored. No later
// claim can name it, because a spare is recorded before it is started. It returns why it
// ended the sandbox, or nothing if that is not so any more.
func (s *Scheduler) endStraySpare(ctx context.Context, stray found) (stopped string, err error) {
	sessionID, err := uuid.Parse(stray.SessionID)
	if err != nil {
		return "", fmt.Errorf("%w: %q is no session's ID: Bivouac did not make this sandbox; end it in runtime %s, as container %s",
			ErrInvalid, stray.SessionID, stray.name, stray.ContainerID)
	}
	spare, chatID, err := s.Store.FindSpare(ctx, sessionID)
	if err != nil || spare != nil {
		return "", err
	}
	if chatID != uuid.Nil { // the store's index names it; the record may be gone
		session, _, err := s.Store.Get(ctx, chatID, Block{})
		switch {
		case errors.Is(err, ErrNewerRecord): // a newer replica looks after the chat
			return "", nil
		case err != nil || session != nil && session.SessionID == sessionID:
			return "", err
		}
	}
	stopped = "a spare of pool " + strings.ToValidUTF8(stray.Pool, "\uFFFD") + " that no record names"
	return stopped, s.attempt(ctx, Event{Type: EventOrphanStopped, Before: stray.session()}, func() error {
		limited, cancel := context.WithTimeout(ctx, stopLimit)
		defer cancel()
		return runtimeError(ctx, "end a spare without a record", stray.driver.Delete(limited, stray.SessionID))
	})
}
