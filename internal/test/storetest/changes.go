package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

// Changes runs the contract of what [scheduler.Store] and [scheduler.Lease] say about
// changes. open returns a fresh cluster.
func Changes(t *testing.T, open func(t *testing.T) Cluster) {
	tests := []struct {
		name string
		test func(t *testing.T, c Cluster)
	}{
		{"changes are read as they were written, by every replica", changesAreRead},
		{"a change without a record is stored", changesWithoutARecord},
		{"a write that fails stores no change", failedWriteStoresNoChange},
		{"a reader goes on where another one ended", readersGoOn},
		{"a reader waits for a change", readerWaits},
		{"a reader that waits ends with its time or its caller", readerEnds},
		{"an index of another store is refused", foreignChangesIndex},
		{"all readers see what many replicas write in one order", oneOrder},
		{"the last changes are kept, and a gap is told", lastAreKept},
		{"changes are dropped with their age, and a gap is told", oldAreDropped},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { tt.test(t, open(t)) })
	}
}

// changeOf returns a change of a session as a store returns it, without its index.
func changeOf(what scheduler.ChangeType, session scheduler.Session) scheduler.Change {
	return scheduler.Change{
		Type: what, Time: now.Add(time.Nanosecond), ChatID: session.ChatID, SessionID: session.SessionID,
		AgentID: session.AgentID, Runtime: session.Runtime, Reason: "exit code 1 <&> \"ä\"", Caller: "token/ci", RequestID: "request-1",
	}
}

// read returns the changes after an index that are there now.
func read(t *testing.T, store scheduler.Store, after uint64) []scheduler.Change {
	t.Helper()
	changes, err := store.Changes(t.Context(), after, 0)
	must.NoError(t, err)
	return changes
}

// unindexed returns the changes without their indexes.
func unindexed(changes []scheduler.Change) []scheduler.Change {
	changes = slices.Clone(changes)
	for i := range changes {
		changes[i].Index = 0
	}
	return changes
}

// note stores n changes of a session, with reasons from "1" on.
func note(t *testing.T, r Replica, session scheduler.Session, at time.Time, n int) {
	t.Helper()
	for i := range n {
		change := changeOf(scheduler.ChangeConflict, session)
		change.Reason, change.Time = fmt.Sprint(i+1), at
		must.NoError(t, r.NoteChange(t.Context(), change))
	}
}

func changesAreRead(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	must.SliceEmpty(t, read(t, b, 0))
	session := newSession()
	created, ready := changeOf(scheduler.ChangeCreated, session), changeOf(scheduler.ChangeReady, session)
	deleted := changeOf(scheduler.ChangeDeleted, session)
	replaced := changeOf(scheduler.ChangeReplaced, newSession())
	long, local := ready, ready.Time.In(time.FixedZone("", 3600))
	long.Time, long.Reason = local, "\xff"+strings.Repeat("ä", 4096)
	ready.Reason = "\uFFFD" + strings.Repeat("ä", 2046)

	lease := lock(t, a, session.ChatID)
	must.NoError(t, lease.Write(t.Context(), &session, scheduler.Keep, replaced, created))
	must.NoError(t, lease.Write(t.Context(), &session, scheduler.Release, long))
	put(t, a, session) // without a change
	must.NoError(t, lock(t, b, session.ChatID).Write(t.Context(), nil, scheduler.Release, deleted))

	got := read(t, a, 0)
	must.Eq(t, []scheduler.Change{replaced, created, ready, deleted}, unindexed(got))
	must.Positive(t, got[0].Index)
	must.Eq(t, got[0].Index, got[1].Index)
	must.Less(t, got[2].Index, got[1].Index)
	must.Less(t, got[3].Index, got[2].Index)
	must.Eq(t, got, read(t, b, 0))
	must.Eq(t, got[2:], read(t, b, got[0].Index))
	must.SliceEmpty(t, read(t, b, got[3].Index))
	c.MustBeEmpty(t)
}

func changesWithoutARecord(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	session := newSession()
	conflict, orphan := changeOf(scheduler.ChangeConflict, session), changeOf(scheduler.ChangeOrphanStopped, session)
	must.NoError(t, a.NoteChange(t.Context(), conflict))
	for _, then := range []scheduler.Then{scheduler.Keep, scheduler.Release} {
		lease := lock(t, a, session.ChatID)
		must.NoError(t, lease.Write(t.Context(), nil, then, orphan))
		must.NoError(t, lease.Release(t.Context()))
	}
	got := read(t, b, 0)
	must.Eq(t, []scheduler.Change{conflict, orphan, orphan}, unindexed(got))
	must.Less(t, got[1].Index, got[0].Index)
	must.Less(t, got[2].Index, got[1].Index)
	c.MustBeEmpty(t)
}

func failedWriteStoresNoChange(t *testing.T, c Cluster) {
	a := c.Join(t)
	session := newSession()
	created := changeOf(scheduler.ChangeCreated, session)

	lease := lock(t, a, session.ChatID)
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	must.ErrorIs(t, lease.Write(canceled, &session, scheduler.Keep, created), context.Canceled)
	must.ErrorIs(t, a.NoteChange(canceled, created), context.Canceled)
	foreign := newSession()
	must.ErrorIs(t, lease.Write(t.Context(), &foreign, scheduler.Keep, created), scheduler.ErrInvalid)
	c.BreakLock(t, session.ChatID)
	must.ErrorIs(t, lease.Write(t.Context(), &session, scheduler.Keep, created), scheduler.ErrLockLost)
	must.ErrorIs(t, lease.Write(t.Context(), &session, scheduler.Release, created), scheduler.ErrLockLost)
	must.SliceEmpty(t, read(t, a, 0))
	must.Nil(t, get(t, a, session.ChatID))
}

func readersGoOn(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	note(t, a, newSession(), now, 5)
	all := read(t, a, 0)
	must.Len(t, 5, all)
	for i, change := range all {
		for _, r := range []Replica{a, b} {
			rest := read(t, r, change.Index)
			must.Eq(t, len(all)-1-i, len(rest))
			must.SliceContainsAll(t, all[i+1:], rest)
		}
	}
	late := c.Join(t)
	must.Eq(t, all[3:], read(t, late, all[2].Index))
	must.Eq(t, all, read(t, late, 0))
}

func readerWaits(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	session := newSession()
	changes := []scheduler.Change{changeOf(scheduler.ChangeCreated, session), changeOf(scheduler.ChangeRenewed, session), changeOf(scheduler.ChangeConflict, session)}
	var last uint64
	for i, change := range changes {
		waiting := background(t, func(ctx context.Context) ([]scheduler.Change, error) {
			return b.Changes(ctx, last, patience)
		})
		if i < 2 {
			must.NoError(t, lock(t, a, session.ChatID).Write(t.Context(), &session, scheduler.Release, change))
		} else {
			must.NoError(t, a.NoteChange(t.Context(), change))
		}
		got := await(t, waiting)
		must.Eq(t, []scheduler.Change{change}, unindexed(got))
		last = got[0].Index
	}
}

func readerEnds(t *testing.T, c Cluster) {
	a := c.Join(t)
	note(t, a, newSession(), now, 1)
	for _, after := range []uint64{read(t, a, 0)[0].Index, read(t, a, 0)[0].Index} { // a second wait, too
		changes, err := a.Changes(t.Context(), after, shortWait)
		must.NoError(t, err)
		must.SliceEmpty(t, changes)
		ctx, cancel := context.WithTimeout(t.Context(), shortWait)
		defer cancel()
		_, err = a.Changes(ctx, after, patience)
		must.ErrorIs(t, err, context.DeadlineExceeded)
	}
}

func foreignChangesIndex(t *testing.T, c Cluster) {
	a := c.Join(t)
	for range 2 { // of an empty store, and of one with changes
		_, err := a.Changes(t.Context(), 1<<50, patience)
		must.ErrorIs(t, err, scheduler.ErrIndexTooOld)
		note(t, a, newSession(), now, 1)
	}
}

// follow returns all changes after an index, up to n of them, as a reader gets them.
func follow(ctx context.Context, store scheduler.Store, after uint64, n int) ([]scheduler.Change, error) {
	var seen []scheduler.Change
	for len(seen) < n {
		more, err := store.Changes(ctx, after, patience)
		if err != nil {
			return seen, err
		}
		if len(more) == 0 {
			return seen, errors.New("nothing happened")
		}
		seen = append(seen, more...)
		after = seen[len(seen)-1].Index
	}
	return seen, nil
}

// oneOrder checks that several readers see the same changes in the same order, while two
// replicas write so much that the store has to organize what it keeps many times.
func oneOrder(t *testing.T, c Cluster) {
	const chats, writes = 12, 30
	c.Retain(scheduler.Retention{Max: chats * writes})
	writers := []Replica{c.Join(t), c.Join(t)}
	first := newSession()
	must.NoError(t, lock(t, writers[0], first.ChatID).Write(t.Context(), nil, scheduler.Release, changeOf(scheduler.ChangeCreated, first)))
	begin := read(t, writers[1], 0)[0]

	var readers []<-chan result[[]scheduler.Change]
	for _, store := range []Replica{writers[0], c.Join(t), c.Join(t)} {
		for _, after := range []uint64{0, begin.Index} {
			n := chats * writes
			if after == 0 {
				n++
			}
			readers = append(readers, background(t, func(ctx context.Context) ([]scheduler.Change, error) {
				return follow(ctx, store, after, n)
			}))
		}
	}
	var wg sync.WaitGroup
	for i := range chats {
		session, replica := newSession(), writers[i%2]
		wg.Go(func() {
			for n := range writes {
				change := changeOf(scheduler.ChangeRenewed, session)
				change.Reason = fmt.Sprint(n)
				lease, err := replica.Lock(t.Context(), session.ChatID, patience)
				if err == nil {
					err = lease.Write(t.Context(), &session, scheduler.Release, change)
				}
				if !mustAll(t, err) {
					return
				}
			}
		})
	}
	wg.Wait()
	for _, reader := range readers {
		got := await(t, reader)
		if got[0].ChatID == first.ChatID {
			must.Eq(t, begin, got[0])
			got = got[1:]
		}
		next := map[uuid.UUID]int{}
		for _, change := range got {
			must.Eq(t, fmt.Sprint(next[change.ChatID]), change.Reason)
			next[change.ChatID]++
		}
		must.MapLen(t, chats, next)
		must.Eq(t, chats*writes, len(got))
		must.Eq(t, read(t, writers[1], begin.Index), got)
	}
}

func lastAreKept(t *testing.T, c Cluster) {
	const most, n = 16, 100
	c.Retain(scheduler.Retention{Max: most})
	a, b := c.Join(t), c.Join(t)
	session := newSession()
	var all []scheduler.Change
	var last uint64
	for len(all) < n { // a reader that is fast enough misses nothing
		note(t, a, session, now, most/4)
		all = append(all, read(t, b, last)...)
		last = all[len(all)-1].Index
	}
	must.Len(t, n, all)
	for i, change := range all {
		must.Eq(t, fmt.Sprint(i%(most/4)+1), change.Reason)
	}
	awaitTooOld(t, a, all[0].Index)
	for _, r := range []Replica{a, b, c.Join(t)} {
		kept := read(t, r, 0)
		must.GreaterEq(t, most, len(kept))
		must.Eq(t, all[n-len(kept):], kept)
		_, err := r.Changes(t.Context(), all[0].Index, patience)
		must.ErrorIs(t, err, scheduler.ErrIndexTooOld)
		must.Eq(t, all[n-most:], read(t, r, all[n-most-1].Index))
	}
}

func oldAreDropped(t *testing.T, c Cluster) {
	c.Retain(scheduler.Retention{Age: 2 * time.Second})
	a := c.Join(t)
	session := newSession()
	note(t, a, session, time.Now().Add(-time.Hour), 3)
	old := read(t, a, 0)
	for stands := old; len(stands) > 0 && stands[0].Index == old[0].Index; stands = read(t, a, 0) {
		note(t, a, session, time.Now(), 1) // something goes on
	}
	awaitTooOld(t, a, old[0].Index)
	_, err := c.Join(t).Changes(t.Context(), old[0].Index, patience)
	must.ErrorIs(t, err, scheduler.ErrIndexTooOld)
}

// awaitTooOld waits until an index is too old.
func awaitTooOld(t *testing.T, store scheduler.Store, after uint64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		_, err := store.Changes(ctx, after, 0)
		if errors.Is(err, scheduler.ErrIndexTooOld) {
			return
		}
		must.NoError(t, err)
	}
}
