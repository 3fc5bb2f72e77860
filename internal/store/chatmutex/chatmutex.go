// Package chatmutex lets the operations of one process on one chat take turns.
//
// It stands in front of a lock that several processes share, where that lock
// cannot tell two holders in one process apart, and saves asking for a lock
// that this process holds anyway. It must never know where records live.
package chatmutex

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/scheduler"
)

// MaxWaiters is how many may wait for one chat.
const MaxWaiters = 512

// Mutex is one mutex per chat. Whoever came first gets it first. Its zero value
// is ready for use, and it keeps nothing of chats that nobody holds.
type Mutex struct {
	mu   sync.Mutex
	held map[uuid.UUID][]chan struct{} // who waits for each chat that is held, in order
}

// Lock takes the chat's mutex and returns what gives it back, which may be
// called more than once. It waits at most wait and then returns
// [scheduler.ErrLockTimeout]; with wait 0 it only tries. Where too many wait
// already it returns [scheduler.ErrBusy].
func (m *Mutex) Lock(ctx context.Context, chatID uuid.UUID, wait time.Duration) (unlock func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	turn, err := m.enter(chatID, wait)
	if err != nil {
		return nil, err
	}
	unlock = sync.OnceFunc(func() { m.pass(chatID) })
	if turn == nil {
		return unlock, nil
	}

	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-turn:
		return unlock, nil
	case <-timer.C:
		err = fmt.Errorf("%w: waited %v in this replica", scheduler.ErrLockTimeout, wait)
	case <-ctx.Done():
		err = ctx.Err()
	}
	if !m.leave(chatID, turn) { // its turn came in the same moment
		unlock()
	}
	return nil, err
}

// enter returns nil where the chat was free and is the caller's now, else a
// channel that is closed when it is the caller's turn.
func (m *Mutex) enter(chatID uuid.UUID, wait time.Duration) (chan struct{}, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	waiting, held := m.held[chatID]
	switch {
	case !held:
		if m.held == nil {
			m.held = make(map[uuid.UUID][]chan struct{})
		}
		m.held[chatID] = nil
		return nil, nil
	case wait <= 0:
		return nil, fmt.Errorf("%w: held in this replica", scheduler.ErrLockTimeout)
	case len(waiting) >= MaxWaiters:
		return nil, &scheduler.LimitError{Limit: "chat_waiters", Detail: fmt.Sprintf("%d wait for the chat in this replica", len(waiting))}
	}
	turn := make(chan struct{})
	m.held[chatID] = append(waiting, turn)
	return turn, nil
}

// leave gives up waiting, and says whether that was in time.
func (m *Mutex) leave(chatID uuid.UUID, turn chan struct{}) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := slices.Index(m.held[chatID], turn)
	if i < 0 {
		return false
	}
	m.held[chatID] = slices.Delete(m.held[chatID], i, i+1)
	return true
}

// pass hands the chat to whoever waits longest.
func (m *Mutex) pass(chatID uuid.UUID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	waiting := m.held[chatID]
	if len(waiting) == 0 {
		delete(m.held, chatID)
		return
	}
	close(waiting[0])
	m.held[chatID] = waiting[1:]
}
