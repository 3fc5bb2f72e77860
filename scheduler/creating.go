package scheduler

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"
)

// maxWaiters is how many creates may wait for another create of the same chat.
const maxWaiters = 512

// creating makes the creates of one chat in this replica wait for the first of them.
// Without it each of them would take the chat's lock in turn, only to find that the
// session already exists. The zero value is ready for use.
type creating struct {
	mu    sync.Mutex
	chats map[uuid.UUID]*create // the first create of each chat
}

// create is a create that is in progress.
type create struct {
	done    chan struct{}
	waiters Places
}

// enter returns a function that the caller must call when its create has ended. If
// another create of the chat is in progress, enter waits for it and returns nil. It
// returns ErrLockTimeout if that create has not ended by until, ErrBusy if too many
// creates wait already, and the error of ctx or ending if that context ends.
func (c *creating) enter(ctx, ending context.Context, chatID uuid.UUID, until time.Time) (leave func(), err error) {
	other := c.register(chatID)
	if other == nil {
		return func() { c.finish(chatID) }, nil
	}
	stopWaiting, err := other.waiters.Enter()
	if err != nil {
		return nil, err
	}
	defer stopWaiting()
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	select {
	case <-other.done:
		return nil, nil
	case <-timer.C:
		return nil, fmt.Errorf("%w: waited %v for another create of the chat in this replica", ErrLockTimeout, LockWait)
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-ending.Done():
		return nil, ending.Err()
	}
}

// register returns the chat's create that is in progress. If there is none, it makes the
// caller's the one and returns nil.
func (c *creating) register(chatID uuid.UUID) *create {
	c.mu.Lock()
	defer c.mu.Unlock()
	if other := c.chats[chatID]; other != nil {
		return other
	}
	if c.chats == nil {
		c.chats = make(map[uuid.UUID]*create)
	}
	c.chats[chatID] = &create{make(chan struct{}), NewPlaces(maxWaiters, "chat_waiters", "%d requests already wait for the chat in this replica")}
	return nil
}

func (c *creating) finish(chatID uuid.UUID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.chats[chatID].done)
	delete(c.chats, chatID)
}
