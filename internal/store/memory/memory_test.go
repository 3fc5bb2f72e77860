package memory

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/storetest"
	"github.com/bivouac/bivouac/scheduler"
)

func TestStoreContract(t *testing.T) { storetest.Stores(t, open) }

func TestLockContract(t *testing.T) { storetest.Locks(t, open) }

func TestChangesContract(t *testing.T) { storetest.Changes(t, open) }

func TestSparesContract(t *testing.T) { storetest.Spares(t, open) }

// cluster is a store with several lockers over it.
type cluster struct {
	store   *Store
	lockers []*Locker
}

func open(*testing.T) storetest.Cluster { return &cluster{store: NewStore()} }

func (c *cluster) Join(*testing.T) storetest.Replica {
	locker := NewLocker(c.store)
	c.lockers = append(c.lockers, locker)
	return replica{c.store, locker}
}

func (c *cluster) BreakLock(_ *testing.T, chatID uuid.UUID) {
	for _, locker := range c.lockers {
		for held := range locker.leases {
			if held.chatID == chatID {
				locker.End()
			}
		}
	}
}

func (c *cluster) Retain(retention scheduler.Retention) { c.store.Retain(retention) }

func (c *cluster) Damage(_ *testing.T, chatID uuid.UUID) { c.store.Damage(chatID) }

func (c *cluster) Outdate(_ *testing.T, chatID uuid.UUID) { c.store.Outdate(chatID) }

func (c *cluster) MustBeEmpty(t *testing.T) {
	t.Helper()
	must.MapEmpty(t, c.store.records)
	must.MapEmpty(t, c.store.spares)
	for _, locker := range c.lockers {
		must.MapEmpty(t, locker.leases)
	}
}

type replica struct {
	*Store
	*Locker
}

func (r replica) End(*testing.T) { r.Locker.End() }

func TestInBubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := NewStore()
		locker := NewLocker(store)
		chatID := uuid.New()

		// A lock is waited for as long as was asked, to the nanosecond.
		lease, err := locker.Lock(t.Context(), chatID, 0)
		must.NoError(t, err)
		began := time.Now()
		_, err = locker.Lock(t.Context(), chatID, 10*time.Second)
		must.ErrorIs(t, err, scheduler.ErrLockTimeout)
		must.Eq(t, 10*time.Second, time.Since(began))
		must.NoError(t, lease.Release(t.Context()))

		// A blocking read that names no time takes five minutes.
		_, index, err := store.Get(t.Context(), chatID, scheduler.Block{})
		must.NoError(t, err)
		began = time.Now()
		_, _, err = store.Get(t.Context(), chatID, scheduler.Block{Index: index})
		must.NoError(t, err)
		must.Eq(t, 5*time.Minute, time.Since(began))

		// And it ends with its caller.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, _, err = store.Get(ctx, chatID, scheduler.Block{Index: index})
		must.ErrorIs(t, err, context.DeadlineExceeded)
	})
}
