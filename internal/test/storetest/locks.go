package storetest

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/store/chatmutex"
	"github.com/bivouac/bivouac/scheduler"
)

// Locks runs the contract of [scheduler.Locker] and [scheduler.Lease]. open
// returns a fresh cluster.
func Locks(t *testing.T, open func(t *testing.T) Cluster) {
	tests := []struct {
		name string
		test func(t *testing.T, c Cluster)
	}{
		{"the lock of a chat is held by one at a time", exclusion},
		{"a lock is taken together with the current record", lockReadsRecord},
		{"chats do not wait for each other", chatsAreIndependent},
		{"with wait 0 a held lock is only tried", tryOnly},
		{"waiting for a lock is limited", waitLimit},
		{"the waiter gets the lock when its holder releases it", releaseWakes},
		{"the waiter gets the lock with the last write", writeWithReleaseWakes},
		{"the waiter gets the lock when its holder is cut off", endWakes},
		{"a replica that was cut off loses its leases and takes new ones", endLosesLeases},
		{"a late holder changes nothing", lateHolder},
		{"a lock taken away in mid-hold fails the next write", brokenLock},
		{"a write that fails keeps the lock", failedWriteKeepsLock},
		{"a write for another chat is refused", foreignRecord},
		{"after release a lease does nothing", releasedLease},
		{"a lease knows its own writes", leaseKnowsItsWrites},
		{"a caller who gives up holds nothing", givingUp},
		{"a damaged record is taken over under its lock", damagedIsReplaced},
		{"a damaged record is removed under its lock", damagedIsRemoved},
		{"a record that is well is no other for the lock of damaged ones", damagedLockOfAWellRecord},
		{"too many waiters are turned away", tooManyWaiters},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { tt.test(t, open(t)) })
	}
}

func exclusion(t *testing.T, c Cluster) {
	chatID := uuid.New()
	var holders atomic.Int32
	var wg sync.WaitGroup
	for range 2 {
		replica := c.Join(t)
		for range 4 { // several in one replica, too
			wg.Go(func() {
				for range 5 {
					lease, err := replica.Lock(t.Context(), chatID, patience)
					if !mustAll(t, err) {
						return
					}
					if holders.Add(1) != 1 {
						t.Error("two hold the lock")
					}
					session := newSession()
					session.ChatID = chatID
					if before := lease.Session(); before != nil {
						session.ExpiresAt = before.ExpiresAt.Add(time.Second)
					} else {
						session.ExpiresAt = now.Add(time.Second)
					}
					err = lease.Write(t.Context(), &session, scheduler.Keep)
					holders.Add(-1)
					if !mustAll(t, err, lease.Release(t.Context())) {
						return
					}
				}
			})
		}
	}
	wg.Wait()
	// Each of the 40 continued from the one before.
	must.Eq(t, now.Add(40*time.Second), get(t, c.Join(t), chatID).ExpiresAt)
}

// mustAll reports errors in a goroutine that must not end the test.
func mustAll(t *testing.T, errs ...error) bool {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Error(err)
			return false
		}
	}
	return true
}

func lockReadsRecord(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	session := newSession()

	lease := lock(t, a, session.ChatID)
	must.Nil(t, lease.Session())
	must.NoError(t, lease.Write(t.Context(), &session, scheduler.Release))

	lease = lock(t, b, session.ChatID)
	must.Eq(t, &session, lease.Session())
	must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))

	lease = lock(t, a, session.ChatID)
	must.Nil(t, lease.Session())
	must.NoError(t, lease.Release(t.Context()))
	c.MustBeEmpty(t)
}

func chatsAreIndependent(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	for _, replica := range []Replica{a, a, b} {
		lease, err := replica.Lock(t.Context(), uuid.New(), 0)
		must.NoError(t, err)
		defer func() { must.NoError(t, lease.Release(t.Context())) }()
	}
}

func tryOnly(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	chatID := uuid.New()
	lease := lock(t, a, chatID)
	for _, replica := range []Replica{a, b} {
		_, err := replica.Lock(t.Context(), chatID, 0)
		must.ErrorIs(t, err, scheduler.ErrLockTimeout)
	}
	must.NoError(t, lease.Release(t.Context()))
	for _, replica := range []Replica{a, b} {
		lease, err := replica.Lock(t.Context(), chatID, 0)
		must.NoError(t, err)
		must.NoError(t, lease.Release(t.Context()))
	}
}

func waitLimit(t *testing.T, c Cluster) {
	const wait = 50 * time.Millisecond
	a, b := c.Join(t), c.Join(t)
	chatID := uuid.New()
	lease := lock(t, a, chatID)
	for _, replica := range []Replica{a, b} {
		began := time.Now()
		_, err := replica.Lock(t.Context(), chatID, wait)
		must.ErrorIs(t, err, scheduler.ErrLockTimeout)
		must.GreaterEq(t, wait, time.Since(began))
	}
	mustBeOpen(t, lease.Lost())
	must.NoError(t, lease.Release(t.Context()))
}

// waiters starts one waiter for the chat's lock in each replica.
func waiters(t *testing.T, chatID uuid.UUID, replicas ...Replica) []<-chan result[scheduler.Lease] {
	var all []<-chan result[scheduler.Lease]
	for _, replica := range replicas {
		all = append(all, background(t, func(ctx context.Context) (scheduler.Lease, error) {
			lease, err := replica.Lock(ctx, chatID, patience)
			if err != nil {
				return nil, err
			}
			return lease, lease.Release(ctx)
		}))
	}
	return all
}

func releaseWakes(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	chatID := uuid.New()
	lease := lock(t, a, chatID)
	waiting := waiters(t, chatID, a, b, b)
	must.NoError(t, lease.Release(t.Context()))
	for _, w := range waiting {
		await(t, w)
	}
	c.MustBeEmpty(t)
}

func writeWithReleaseWakes(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	session := newSession()
	lease := lock(t, a, session.ChatID)
	waiting := waiters(t, session.ChatID, a, b)
	must.NoError(t, lease.Write(t.Context(), &session, scheduler.Release))
	for _, w := range waiting {
		must.Eq(t, &session, await(t, w).Session())
	}
}

func endWakes(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	chatID := uuid.New()
	_ = lock(t, a, chatID) // never released
	waiting := waiters(t, chatID, b)
	a.End(t)
	await(t, waiting[0])
}

func endLosesLeases(t *testing.T, c Cluster) {
	a := c.Join(t)
	first, second := newSession(), newSession()
	put(t, a, first)
	one, two := lock(t, a, first.ChatID), lock(t, a, second.ChatID)
	mustBeOpen(t, one.Lost())

	a.End(t)
	mustBeClosed(t, one.Lost())
	mustBeClosed(t, two.Lost())
	must.NoError(t, one.Release(t.Context()))
	must.NoError(t, two.Release(t.Context()))

	lease := lock(t, a, first.ChatID)
	mustBeOpen(t, lease.Lost())
	must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))
	c.MustBeEmpty(t)
}

func lateHolder(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	session := newSession()
	put(t, a, session)
	late := lock(t, a, session.ChatID)
	a.End(t)

	// This holds while the lock is free again and after another replica has
	// used it.
	dead := session
	dead.State = scheduler.StateDead
	must.ErrorIs(t, late.Write(t.Context(), &dead, scheduler.Keep), scheduler.ErrLockLost)
	must.Eq(t, &session, get(t, b, session.ChatID))

	renewed := session
	renewed.ExpiresAt = now.Add(time.Hour)
	put(t, b, renewed)
	must.ErrorIs(t, late.Write(t.Context(), nil, scheduler.Release), scheduler.ErrLockLost)
	must.Eq(t, &renewed, get(t, b, session.ChatID))
	must.NoError(t, late.Release(t.Context()))
}

func brokenLock(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	session := newSession()
	put(t, a, session)
	late := lock(t, a, session.ChatID)
	c.BreakLock(t, session.ChatID)

	other := lock(t, b, session.ChatID)
	must.ErrorIs(t, late.Write(t.Context(), nil, scheduler.Release), scheduler.ErrLockLost)
	mustBeClosed(t, late.Lost())
	must.NoError(t, late.Release(t.Context())) // this must not release the other lease's lock
	must.NoError(t, other.Write(t.Context(), nil, scheduler.Release))
	c.MustBeEmpty(t)
}

func failedWriteKeepsLock(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	session := newSession()
	lease := lock(t, a, session.ChatID)

	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	must.ErrorIs(t, lease.Write(canceled, &session, scheduler.Release), context.Canceled)
	must.Nil(t, lease.Session())
	must.Nil(t, get(t, b, session.ChatID))
	_, err := b.Lock(t.Context(), session.ChatID, 0)
	must.ErrorIs(t, err, scheduler.ErrLockTimeout)

	must.NoError(t, lease.Write(t.Context(), &session, scheduler.Release))
	must.Eq(t, &session, get(t, b, session.ChatID))
}

func foreignRecord(t *testing.T, c Cluster) {
	a := c.Join(t)
	foreign := newSession()
	lease := lock(t, a, uuid.New())
	must.ErrorIs(t, lease.Write(t.Context(), &foreign, scheduler.Keep), scheduler.ErrInvalid)
	must.NoError(t, lease.Release(t.Context()))
	c.MustBeEmpty(t)
}

func releasedLease(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	session := newSession()
	released, written := lock(t, a, uuid.New()), lock(t, a, session.ChatID)
	must.NoError(t, released.Release(t.Context()))
	must.NoError(t, written.Write(t.Context(), &session, scheduler.Release))

	// Another now holds the lock; the old lease must not touch it.
	held := lock(t, a, session.ChatID)
	must.NoError(t, released.Release(t.Context()))
	must.NoError(t, written.Release(t.Context()))
	must.ErrorIs(t, written.Write(t.Context(), nil, scheduler.Release), scheduler.ErrLockLost)
	for _, replica := range []Replica{a, b} {
		_, err := replica.Lock(t.Context(), session.ChatID, 0)
		must.ErrorIs(t, err, scheduler.ErrLockTimeout)
	}
	must.NoError(t, held.Write(t.Context(), nil, scheduler.Release))
	c.MustBeEmpty(t)
}

func leaseKnowsItsWrites(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	session := newSession()
	lease := lock(t, a, session.ChatID)
	for _, state := range []scheduler.State{
		scheduler.StateCreating, scheduler.StateRunning, scheduler.StateRunning, scheduler.StateStopping,
	} {
		next := session
		next.State = state
		must.NoError(t, lease.Write(t.Context(), &next, scheduler.Keep))
		must.Eq(t, &next, lease.Session())
		must.Eq(t, &next, get(t, b, session.ChatID))

		// Changes to the caller's copy do not affect the record.
		lease.Session().Reason = "scribbled over"
		next.Reason = "scribbled over"
		must.Eq(t, "", lease.Session().Reason)
	}
	for range 2 { // removing a missing record is no error
		must.NoError(t, lease.Write(t.Context(), nil, scheduler.Keep))
		must.Nil(t, lease.Session())
		must.Nil(t, get(t, b, session.ChatID))
	}
	must.NoError(t, lease.Write(t.Context(), &session, scheduler.Keep))
	must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))
	c.MustBeEmpty(t)
}

func givingUp(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	chatID := uuid.New()
	lease := lock(t, a, chatID)

	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, replica := range []Replica{a, b} {
		_, err := replica.Lock(canceled, chatID, patience)
		must.ErrorIs(t, err, context.Canceled)

		soon, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		_, err = replica.Lock(soon, chatID, patience)
		must.ErrorIs(t, err, context.DeadlineExceeded)
	}
	must.NoError(t, lease.Release(t.Context()))
	for _, replica := range []Replica{a, b} {
		must.NoError(t, lock(t, replica, chatID).Release(t.Context()))
	}
	c.MustBeEmpty(t)
}

func tooManyWaiters(t *testing.T, c Cluster) {
	a := c.Join(t)
	chatID := uuid.New()
	lease := lock(t, a, chatID)

	// All but one of these wait until they are stopped.
	ctx, stop := context.WithCancel(t.Context())
	turnedAway := make(chan error, chatmutex.MaxWaiters+1)
	var wg sync.WaitGroup
	for range chatmutex.MaxWaiters + 1 {
		wg.Go(func() {
			_, err := a.Lock(ctx, chatID, patience)
			turnedAway <- err
		})
	}
	must.ErrorIs(t, <-turnedAway, scheduler.ErrBusy)
	stop()
	wg.Wait()
	for range chatmutex.MaxWaiters {
		must.ErrorIs(t, <-turnedAway, context.Canceled)
	}
	must.NoError(t, lease.Release(t.Context()))
	c.MustBeEmpty(t)
}
