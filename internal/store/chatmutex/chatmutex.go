// Package chatmutex has one mutex per chat for the operations of one process.
//
// It is used in front of a lock that several processes share, because that lock
// cannot tell two holders in one process apart. It also saves requests for a lock
// that this process already holds. It does not know where records are stored.
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

// MaxWaiters is the maximum number of waiters for one chat.
const MaxWaiters = 512

// Mutex has one mutex per chat, with its waiters in the order in which they came.
// Its zero value is ready for use. It uses no memory for chats that nobody holds.
type Mutex struct {
	mu   sync.Mutex
	held map[uuid.UUID][]chan struct{} // the waiters of each held chat, in order
}

// Lock locks the chat's mutex and returns a function that unlocks it, which may be
// called more than once. It waits at most wait and then returns
// [scheduler.ErrLockTimeout]. With wait 0 it only tries. If [MaxWaiters] wait
// already, it returns [scheduler.ErrBusy].
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
	if !m.leave(chatID, turn) { // it got the mutex at the same moment
		unlock()
	}
	return nil, err
}

// enter returns nil if the chat was free and now is the caller's. Otherwise it
// returns a channel that is closed when the chat becomes the caller's.
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
		return nil, fmt.Errorf("%w: %d requests already wait for the chat in this replica", scheduler.ErrBusy, len(waiting))
	}
	turn := make(chan struct{})
	m.held[chatID] = append(waiting, turn)
	return turn, nil
}

// leave stops waiting. It returns false if the chat already became the caller's.
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

// pass gives the chat to the first waiter.
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
