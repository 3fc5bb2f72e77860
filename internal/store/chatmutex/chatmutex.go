// Package chatmutex has one mutex per chat for the operations of one process.
//
// It is used in front of a lock that several processes share, because that lock
// cannot tell two holders in one process apart. It also saves requests for a lock
// that this process already holds. It does not know where records are stored.
package chatmutex

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/semaphore"

	"github.com/bivouac/bivouac/scheduler"
)

// MaxWaiters is the maximum number of waiters for one chat.
const MaxWaiters = 512

// Mutex has one mutex per chat, whose waiters get it in the order in which they came. Its
// zero value is ready for use. It uses no memory for chats that nobody holds.
type Mutex struct {
	mu    sync.Mutex
	chats map[uuid.UUID]*chat // those that somebody holds
}

type chat struct {
	turn  *semaphore.Weighted // one, in order of arrival
	users int                 // the holder and the waiters
}

// Lock locks the chat's mutex and returns a function that unlocks it, which may be
// called more than once. It waits at most wait and then returns
// [scheduler.ErrLockTimeout]. With wait 0 it only tries. If [MaxWaiters] wait
// already, it returns [scheduler.ErrBusy].
func (m *Mutex) Lock(ctx context.Context, chatID uuid.UUID, wait time.Duration) (unlock func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c, err := m.enter(chatID)
	if err != nil {
		return nil, err
	}
	limited, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if !c.turn.TryAcquire(1) && c.turn.Acquire(limited, 1) != nil {
		m.leave(chatID)
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%w: waited %v in this replica", scheduler.ErrLockTimeout, wait)
	}
	return sync.OnceFunc(func() {
		c.turn.Release(1)
		m.leave(chatID)
	}), nil
}

// enter makes the caller a user of the chat.
func (m *Mutex) enter(chatID uuid.UUID) (*chat, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.chats == nil {
		m.chats = make(map[uuid.UUID]*chat)
	}
	c := m.chats[chatID]
	if c == nil {
		c = &chat{turn: semaphore.NewWeighted(1)}
		m.chats[chatID] = c
	}
	if waiting := c.users - 1; waiting >= MaxWaiters {
		return nil, &scheduler.LimitError{Limit: "chat_waiters", Detail: fmt.Sprintf("%d requests already wait for the chat in this replica", waiting)}
	}
	c.users++
	return c, nil
}

func (m *Mutex) leave(chatID uuid.UUID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.chats[chatID].users--; m.chats[chatID].users == 0 {
		delete(m.chats, chatID)
	}
}
