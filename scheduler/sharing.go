package scheduler

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"
)

// maxWaiters is how many operations may wait for another one of the same kind and chat.
const maxWaiters = 512

// sharing makes the operations of one kind on one chat in this replica wait for the first
// of them. Without it each of them would take the chat's lock in turn, only to find that
// the session already exists, or no longer does. The zero value is ready for use.
type sharing struct {
	mu    sync.Mutex
	chats map[uuid.UUID]*operation // the first operation of each chat
}

// operation is an operation that is in progress.
type operation struct {
	done      chan struct{}
	succeeded bool // set before done is closed
	waiters   Places
}

// enter returns a function that the caller must call when its operation has ended, with
// whether it succeeded. If another operation on the chat is in progress, enter waits for it
// and returns nil, and whether that one succeeded. It returns ErrLockTimeout if that one
// has not ended by until, ErrBusy if too many operations wait already, and the error of ctx
// or ending if that context ends.
func (s *sharing) enter(ctx, ending context.Context, chatID uuid.UUID, until time.Time) (leave func(bool), succeeded bool, err error) {
	other := s.register(chatID)
	if other == nil {
		return func(succeeded bool) { s.finish(chatID, succeeded) }, false, nil
	}
	stopWaiting, err := other.waiters.Enter()
	if err != nil {
		return nil, false, err
	}
	defer stopWaiting()
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	select {
	case <-other.done:
		return nil, other.succeeded, nil
	case <-timer.C:
		return nil, false, fmt.Errorf("%w: waited %v for another request of this kind for the chat in this replica", ErrLockTimeout, LockWait)
	case <-ctx.Done():
		return nil, false, ctx.Err()
	case <-ending.Done():
		return nil, false, ending.Err()
	}
}

// register returns the chat's operation that is in progress. If there is none, it makes the
// caller's the one and returns nil.
func (s *sharing) register(chatID uuid.UUID) *operation {
	s.mu.Lock()
	defer s.mu.Unlock()
	if other := s.chats[chatID]; other != nil {
		return other
	}
	if s.chats == nil {
		s.chats = make(map[uuid.UUID]*operation)
	}
	s.chats[chatID] = &operation{
		done:    make(chan struct{}),
		waiters: NewPlaces(maxWaiters, "chat_waiters", "%d requests already wait for the chat in this replica"),
	}
	return nil
}

func (s *sharing) finish(chatID uuid.UUID, succeeded bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.chats[chatID].succeeded = succeeded
	close(s.chats[chatID].done)
	delete(s.chats, chatID)
}
