package storetest

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

// Spares runs the contract of spares of a [scheduler.Store] and of [scheduler.Lease]'s
// Claim. open returns a fresh cluster.
func Spares(t *testing.T, open func(t *testing.T) Cluster) {
	tests := []struct {
		name string
		test func(t *testing.T, c Cluster)
	}{
		{"a spare is read as it was written", sparesAreRead},
		{"a spare is written over and removed by its version only", spareVersions},
		{"a read waits for a change of any spare", sparesBlock},
		{"a claim removes the spare and writes the intent in one step", claims},
		{"a spare that is no longer as it was cannot be claimed, and nothing is written", failedClaim},
		{"many chats that claim one spare: one gets it", claimRace},
		{"a late holder claims nothing", lateClaim},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { tt.test(t, open(t)) })
	}
}

func newSpare() scheduler.Spare {
	session := newSession()
	return scheduler.Spare{
		SessionID: session.SessionID, Pool: "small", Runtime: session.Runtime, Variant: "v1", State: scheduler.SpareReady,
		ContainerID: session.ContainerID, AccessToken: session.AccessToken, CreatedAt: now,
	}
}

func putSpare(t *testing.T, store scheduler.Store, spare scheduler.Spare) scheduler.Spare {
	t.Helper()
	written, err := store.PutSpare(t.Context(), spare)
	must.NoError(t, err)
	must.NotEq(t, spare.Version, written.Version)
	spare.Version = written.Version
	must.Eq(t, spare, written)
	return written
}

func spares(t *testing.T, store scheduler.Store) []scheduler.Spare {
	t.Helper()
	all, _, err := store.Spares(t.Context(), scheduler.Block{})
	must.NoError(t, err)
	return all
}

// warm returns the intent of a chat for the spare.
func warm(spare scheduler.Spare) scheduler.Session {
	session := newSession()
	session.SessionID, session.AccessToken, session.Warm = spare.SessionID, spare.AccessToken, true
	session.State, session.ContainerID = scheduler.StateCreating, ""
	return session
}

func sparesAreRead(t *testing.T, c Cluster) {
	writer, reader := c.Join(t), c.Join(t)
	must.SliceEmpty(t, spares(t, reader))
	one, two := putSpare(t, writer, newSpare()), putSpare(t, writer, newSpare())
	must.SliceContainsAll(t, spares(t, reader), []scheduler.Spare{one, two})
	found, chatID, err := reader.FindSpare(t.Context(), one.SessionID)
	must.NoError(t, err)
	must.Eq(t, one, *found)
	must.Eq(t, uuid.Nil, chatID)
	found, chatID, err = reader.FindSpare(t.Context(), uuid.New())
	must.NoError(t, err)
	must.Nil(t, found)
	must.Eq(t, uuid.Nil, chatID)
	for _, spare := range []scheduler.Spare{one, two} {
		must.NoError(t, writer.RemoveSpare(t.Context(), spare))
	}
	must.SliceEmpty(t, spares(t, reader))
	c.MustBeEmpty(t)
}

func spareVersions(t *testing.T, c Cluster) {
	store := c.Join(t)
	first := putSpare(t, store, newSpare())
	second := first
	second.State = scheduler.SpareEnding
	second = putSpare(t, store, second)

	other := first
	other.ContainerID = "another"
	_, err := store.PutSpare(t.Context(), other)
	must.ErrorIs(t, err, scheduler.ErrSpareTaken)
	other.Version = 0
	_, err = store.PutSpare(t.Context(), other)
	must.ErrorIs(t, err, scheduler.ErrSpareTaken)
	must.ErrorIs(t, store.RemoveSpare(t.Context(), first), scheduler.ErrSpareTaken)
	must.Eq(t, []scheduler.Spare{second}, spares(t, store))

	must.NoError(t, store.RemoveSpare(t.Context(), second))
	must.NoError(t, store.RemoveSpare(t.Context(), second), must.Sprint("it is gone, which was the aim"))
	_, err = store.PutSpare(t.Context(), second)
	must.ErrorIs(t, err, scheduler.ErrSpareTaken)
}

func sparesBlock(t *testing.T, c Cluster) {
	writer, reader := c.Join(t), c.Join(t)
	spare := putSpare(t, writer, newSpare())
	for _, change := range []func(){
		func() { putSpare(t, writer, newSpare()) },
		func() { must.NoError(t, writer.RemoveSpare(t.Context(), spare)) },
	} {
		before, index, err := reader.Spares(t.Context(), scheduler.Block{})
		must.NoError(t, err)
		must.NotEq(t, 0, index)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		changed := make(chan []scheduler.Spare, 1)
		go func() {
			defer close(changed)
			for ctx.Err() == nil { // it may return early
				now, next, err := reader.Spares(ctx, scheduler.Block{Index: index, Wait: patience})
				if err == nil && len(now) != len(before) {
					changed <- now
					return
				}
				index = next
			}
		}()
		change()
		_, ok := <-changed
		cancel()
		must.True(t, ok)
	}
}

func claims(t *testing.T, c Cluster) {
	one, two := c.Join(t), c.Join(t)
	spare := putSpare(t, one, newSpare())
	session := warm(spare)
	lease := lock(t, one, session.ChatID)
	must.NoError(t, lease.Claim(t.Context(), &session, spare, changeOf(scheduler.ChangeCreated, session)))
	must.Eq(t, session, *lease.Session())
	must.SliceEmpty(t, spares(t, two))
	must.Eq(t, session, *get(t, two, session.ChatID))
	must.SliceLen(t, 1, read(t, two, 0))
	found, chatID, err := two.FindSpare(t.Context(), spare.SessionID)
	must.NoError(t, err)
	must.Nil(t, found)
	must.Eq(t, session.ChatID, chatID)

	session.State = scheduler.StateRunning
	must.NoError(t, lease.Write(t.Context(), &session, scheduler.Keep))
	_, chatID, err = two.FindSpare(t.Context(), spare.SessionID)
	must.NoError(t, err)
	must.Eq(t, session.ChatID, chatID)

	must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))
	_, chatID, err = two.FindSpare(t.Context(), spare.SessionID)
	must.NoError(t, err)
	must.Eq(t, uuid.Nil, chatID)
	c.MustBeEmpty(t)
}

func failedClaim(t *testing.T, c Cluster) {
	store := c.Join(t)
	stale := putSpare(t, store, newSpare())
	stands := stale
	stands.State = scheduler.SpareEnding
	stands = putSpare(t, store, stands)
	gone := putSpare(t, store, newSpare())
	must.NoError(t, store.RemoveSpare(t.Context(), gone))
	for _, spare := range []scheduler.Spare{stale, gone} {
		session := warm(spare)
		lease := lock(t, store, session.ChatID)
		err := lease.Claim(t.Context(), &session, spare, changeOf(scheduler.ChangeCreated, session))
		must.ErrorIs(t, err, scheduler.ErrSpareTaken)
		must.Nil(t, lease.Session())
		must.Nil(t, get(t, store, session.ChatID))
		must.Eq(t, []scheduler.Spare{stands}, spares(t, store))
		must.SliceEmpty(t, read(t, store, 0))

		// The lease goes on.
		session.Warm = false
		must.NoError(t, lease.Write(t.Context(), &session, scheduler.Keep))
		must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))
	}
}

func claimRace(t *testing.T, c Cluster) {
	replicas := []Replica{c.Join(t), c.Join(t)}
	spare := putSpare(t, replicas[0], newSpare())
	var won atomic.Int32
	var wg sync.WaitGroup
	for i := range 8 {
		replica := replicas[i%2]
		wg.Go(func() {
			session := warm(spare)
			lease, err := replica.Lock(t.Context(), session.ChatID, patience)
			if !mustAll(t, err) {
				return
			}
			err = lease.Claim(t.Context(), &session, spare)
			if err == nil {
				won.Add(1)
			} else if !errors.Is(err, scheduler.ErrSpareTaken) {
				t.Error(err)
			}
			mustAll(t, lease.Release(t.Context()))
		})
	}
	wg.Wait()
	must.Eq(t, 1, won.Load())
	must.SliceEmpty(t, spares(t, replicas[0]))
}

func lateClaim(t *testing.T, c Cluster) {
	replica := c.Join(t)
	spare := putSpare(t, replica, newSpare())
	session := warm(spare)
	lease := lock(t, replica, session.ChatID)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	replica.End(t)
	must.ErrorIs(t, lease.Claim(ctx, &session, spare), scheduler.ErrLockLost)
	must.Eq(t, []scheduler.Spare{spare}, spares(t, c.Join(t)))
}
