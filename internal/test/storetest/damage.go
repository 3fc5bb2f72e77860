package storetest

import (
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

func damagedIsToldOf(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	well, spoiled := newSession(), newSession()
	put(t, a, well)
	put(t, a, spoiled)
	c.Damage(t, spoiled.ChatID)

	_, _, err := b.Get(t.Context(), spoiled.ChatID, scheduler.Block{})
	must.ErrorIs(t, err, scheduler.ErrDamaged)
	_, err = b.Lock(t.Context(), spoiled.ChatID, 0)
	must.ErrorIs(t, err, scheduler.ErrDamaged)
	_, err = b.Lock(t.Context(), spoiled.ChatID, 0)
	must.ErrorIs(t, err, scheduler.ErrDamaged, must.Sprint("the one before holds nothing"))

	page, err := b.List(t.Context(), scheduler.Query{PerPage: scheduler.MaxPerPage})
	must.NoError(t, err)
	must.Eq(t, []scheduler.Session{well}, page.Sessions)
	must.Len(t, 1, page.Damaged)
	must.Eq(t, spoiled.ChatID, page.Damaged[0].ChatID)
	must.ErrorIs(t, page.Damaged[0].Err, scheduler.ErrDamaged)
}

func newerIsToldOf(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	well, newer := newSession(), newSession()
	well.State, newer.State = scheduler.StateStopping, scheduler.StateStopping
	put(t, a, well)
	put(t, a, newer)
	c.Outdate(t, newer.ChatID)

	_, _, err := b.Get(t.Context(), newer.ChatID, scheduler.Block{})
	must.ErrorIs(t, err, scheduler.ErrNewerRecord)
	for range 2 { // the failed call before took no lock
		_, err = b.Lock(t.Context(), newer.ChatID, 0)
		must.ErrorIs(t, err, scheduler.ErrNewerRecord)
		_, err = b.LockDamaged(t.Context(), newer.ChatID, 0)
		must.ErrorIs(t, err, scheduler.ErrNewerRecord, must.Sprint("it is not damaged"))
	}

	page, err := b.List(t.Context(), scheduler.Query{PerPage: scheduler.MaxPerPage})
	must.NoError(t, err)
	must.Eq(t, []scheduler.Session{well}, page.Sessions)
	must.Len(t, 1, page.Damaged)
	must.Eq(t, newer.ChatID, page.Damaged[0].ChatID)
	must.ErrorIs(t, page.Damaged[0].Err, scheduler.ErrNewerRecord)
	must.Eq(t, []uuid.UUID{well.ChatID}, expired(t, b, well.ExpiresAt, 10))
	inFlight, err := b.InFlight(t.Context())
	must.NoError(t, err)
	must.Eq(t, []scheduler.Session{well}, inFlight)
}

// lockDamaged takes the lock of a chat whose record cannot be parsed.
func lockDamaged(t *testing.T, locker scheduler.Locker, chatID uuid.UUID) scheduler.Lease {
	t.Helper()
	lease, err := locker.LockDamaged(t.Context(), chatID, patience)
	must.NoError(t, err)
	must.Nil(t, lease.Session())
	return lease
}

func damagedIsReplaced(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	session := newSession()
	put(t, a, session)
	c.Damage(t, session.ChatID)

	lease := lockDamaged(t, a, session.ChatID)
	_, err := b.LockDamaged(t.Context(), session.ChatID, 0)
	must.ErrorIs(t, err, scheduler.ErrLockTimeout, must.Sprint("it is the chat's lock"))
	renewed := session
	renewed.ExpiresAt = now.Add(2 * time.Hour)
	must.NoError(t, lease.Write(t.Context(), &renewed, scheduler.Keep))
	must.Eq(t, &renewed, lease.Session())
	must.NoError(t, lease.Release(t.Context()))

	must.Eq(t, &renewed, get(t, b, session.ChatID))
	must.Eq(t, []uuid.UUID{session.ChatID}, expired(t, b, renewed.ExpiresAt, 10))
	write(t, b, session.ChatID, nil)
	mustNotBeIndexed(t, b, session)
	c.MustBeEmpty(t)
}

func damagedIsRemoved(t *testing.T, c Cluster) {
	a := c.Join(t)
	session := newSession()
	session.State = scheduler.StateStopping
	put(t, a, session)
	c.Damage(t, session.ChatID)

	lease := lockDamaged(t, a, session.ChatID)
	must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))

	must.Nil(t, get(t, a, session.ChatID))
	mustNotBeIndexed(t, a, session)
	c.MustBeEmpty(t)
}

// mustNotBeIndexed reads every index. Index entries of the damaged record lead
// nowhere, and reading removes them.
func mustNotBeIndexed(t *testing.T, store scheduler.Store, session scheduler.Session) {
	t.Helper()
	inFlight, err := store.InFlight(t.Context())
	must.NoError(t, err)
	must.SliceEmpty(t, inFlight)
	must.SliceEmpty(t, expired(t, store, session.ExpiresAt.Add(24*time.Hour), 10))
	page, err := store.List(t.Context(), scheduler.Query{AgentID: session.AgentID, PerPage: 10})
	must.NoError(t, err)
	must.SliceEmpty(t, page.Sessions)
}

func damagedLockOfAWellRecord(t *testing.T, c Cluster) {
	a := c.Join(t)
	session := newSession()
	put(t, a, session)
	lease, err := a.LockDamaged(t.Context(), session.ChatID, patience)
	must.NoError(t, err)
	must.Eq(t, &session, lease.Session())
	must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))
	lease, err = a.LockDamaged(t.Context(), session.ChatID, patience)
	must.NoError(t, err)
	must.Nil(t, lease.Session())
	must.NoError(t, lease.Release(t.Context()))
	c.MustBeEmpty(t)
}
