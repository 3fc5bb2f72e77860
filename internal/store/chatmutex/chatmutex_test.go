package chatmutex

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

func TestOneAtATimeInOrderOfArrival(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m Mutex
		chat := uuid.New()
		release, err := m.Lock(t.Context(), chat, 0)
		must.NoError(t, err)

		var order []int // written by whoever holds the mutex
		var wg sync.WaitGroup
		for i := range 10 {
			wg.Go(func() {
				unlock, err := m.Lock(t.Context(), chat, time.Hour)
				must.NoError(t, err)
				order = append(order, i)
				unlock()
			})
			synctest.Wait()
		}
		must.SliceEmpty(t, order)
		release()
		wg.Wait()
		must.Eq(t, []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, order)
		must.MapEmpty(t, m.chats)
	})
}

func TestWaitIsLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m Mutex
		chat := uuid.New()
		release, err := m.Lock(t.Context(), chat, 0)
		must.NoError(t, err)

		_, err = m.Lock(t.Context(), chat, 0)
		must.ErrorIs(t, err, scheduler.ErrLockTimeout)

		began := time.Now()
		_, err = m.Lock(t.Context(), chat, 7*time.Second)
		must.ErrorIs(t, err, scheduler.ErrLockTimeout)
		must.Eq(t, 7*time.Second, time.Since(began))

		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		_, err = m.Lock(ctx, chat, time.Hour)
		must.ErrorIs(t, err, context.DeadlineExceeded)

		// Those who gave up are not given a turn.
		release()
		must.MapEmpty(t, m.chats)
	})
}

func TestTurnThatComesTooLateIsPassedOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m Mutex
		chat := uuid.New()
		release, err := m.Lock(t.Context(), chat, 0)
		must.NoError(t, err)

		// The mutex is given back in the very moment in which the waiter's limit
		// passes: whichever wins, nothing stays held.
		done := make(chan error)
		go func() {
			unlock, err := m.Lock(t.Context(), chat, time.Second)
			if err == nil {
				unlock()
			}
			done <- err
		}()
		<-time.After(time.Second)
		release()
		if err := <-done; err != nil {
			must.ErrorIs(t, err, scheduler.ErrLockTimeout)
		}
		must.MapEmpty(t, m.chats)
	})
}

func TestUnlockTwiceFreesOnce(t *testing.T) {
	var m Mutex
	chat := uuid.New()
	first, err := m.Lock(t.Context(), chat, 0)
	must.NoError(t, err)
	first()
	_, err = m.Lock(t.Context(), chat, 0)
	must.NoError(t, err)
	first()
	_, err = m.Lock(t.Context(), chat, 0)
	must.ErrorIs(t, err, scheduler.ErrLockTimeout)
}

func TestChatsDoNotWaitForEachOther(t *testing.T) {
	var m Mutex
	_, err := m.Lock(t.Context(), uuid.New(), 0)
	must.NoError(t, err)
	_, err = m.Lock(t.Context(), uuid.New(), 0)
	must.NoError(t, err)
}
