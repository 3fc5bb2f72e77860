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
	waiters int
}

// enter returns a function that the caller must call when its create has ended. If
// another create of the chat is in progress, enter waits for it and returns nil. It
// returns ErrLockTimeout if that create has not ended by until, ErrBusy if too many
// creates wait already, and the error of ctx or ending if that context ends.
func (c *creating) enter(ctx, ending context.Context, chatID uuid.UUID, until time.Time) (leave func(), err error) {
	other, err := c.register(chatID)
	if err != nil {
		return nil, err
	}
	if other == nil {
		return func() { c.finish(chatID) }, nil
	}
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	select {
	case <-other.done:
		return nil, nil
	case <-timer.C:
		err = fmt.Errorf("%w: waited %v for another create of the chat in this replica", ErrLockTimeout, LockWait)
	case <-ctx.Done():
		err = ctx.Err()
	case <-ending.Done():
		err = ending.Err()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	other.waiters--
	return nil, err
}

// register makes the caller's create the chat's first and returns nil. If there is one
// already, register counts the caller as a waiter and returns that create.
func (c *creating) register(chatID uuid.UUID) (*create, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	other, ok := c.chats[chatID]
	switch {
	case !ok:
		if c.chats == nil {
			c.chats = make(map[uuid.UUID]*create)
		}
		c.chats[chatID] = &create{done: make(chan struct{})}
		return nil, nil
	case other.waiters >= maxWaiters:
		return nil, &LimitError{"chat_waiters", fmt.Sprintf("%d wait for the chat in this replica", other.waiters)}
	}
	other.waiters++
	return other, nil
}

func (c *creating) finish(chatID uuid.UUID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.chats[chatID].done)
	delete(c.chats, chatID)
}
