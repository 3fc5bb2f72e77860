// Package storetest holds the contract suites for [scheduler.Store] and
// [scheduler.Locker]. Every implementation passes both, so that what is tested
// over one of them holds over the others.
//
// The package must never know of any implementation: what cannot be done
// through the contract, such as cutting a replica off, a [Cluster] does.
package storetest

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// Cluster is some replicas on one fresh set of records.
type Cluster interface {
	// Join adds a replica. It leaves when the test ends.
	Join(t *testing.T) Replica

	// BreakLock takes the chat's lock away from whoever holds it, behind the
	// holder's back.
	BreakLock(t *testing.T, chatID uuid.UUID)

	// Damage makes the chat's record, which is there, one that cannot be
	// understood, behind everybody's back. Its index entries stay as they are.
	Damage(t *testing.T, chatID uuid.UUID)

	// Outdate makes the chat's record, which is there, one that only a newer version
	// may read. Its index entries stay as they are.
	Outdate(t *testing.T, chatID uuid.UUID)

	// MustBeEmpty fails the test where anything is left of any chat: records,
	// locks or index entries.
	MustBeEmpty(t *testing.T)
}

// Replica is one replica's view of the records.
type Replica interface {
	scheduler.Store
	scheduler.Locker

	// End takes from the replica all locks that it holds, as happens to one
	// that was cut off for too long.
	End(t *testing.T)
}

// patience bounds what should happen at once, and what should not happen in a
// test at all.
const patience = time.Minute

// agentID is whose sessions are, where that makes no difference.
const agentID = "agent-1"

// now is a fixed time in the middle of a minute.
var now = time.Date(2031, time.March, 5, 14, 7, 30, 0, time.UTC)

// newSession returns a running session of a new chat that expires in half an hour.
func newSession() scheduler.Session {
	return scheduler.Session{
		SessionID:      uuid.New(),
		ChatID:         uuid.New(),
		AgentID:        agentID,
		VolumeHostPath: "/srv/volumes/a b\"${c}",
		Runtime:        "process",
		ContainerID:    "container-1",
		Endpoint:       runtime.Endpoint{IP: netip.MustParseAddr("10.0.0.7"), Port: 20123},
		CreatedAt:      now,
		ExpiresAt:      now.Add(30*time.Minute + 123456789*time.Nanosecond),
		State:          scheduler.StateRunning,
		Owner:          "team-a",
		Labels:         map[string]string{"ticket": "4711", "example.com/tier": "", "text": "ä \"${c}\" <&>"},
	}
}

// lock takes the chat's lock, which must not take long.
func lock(t *testing.T, locker scheduler.Locker, chatID uuid.UUID) scheduler.Lease {
	t.Helper()
	lease, err := locker.Lock(t.Context(), chatID, patience)
	must.NoError(t, err)
	return lease
}

// write makes next the chat's record, or removes it where next is nil.
func write(t *testing.T, locker scheduler.Locker, chatID uuid.UUID, next *scheduler.Session) {
	t.Helper()
	must.NoError(t, lock(t, locker, chatID).Write(t.Context(), next, scheduler.Release))
}

// put records the session.
func put(t *testing.T, locker scheduler.Locker, session scheduler.Session) {
	t.Helper()
	write(t, locker, session.ChatID, &session)
}

// get reads the chat's record without waiting.
func get(t *testing.T, store scheduler.Store, chatID uuid.UUID) *scheduler.Session {
	t.Helper()
	session, index, err := store.Get(t.Context(), chatID, scheduler.Block{})
	must.NoError(t, err)
	must.Positive(t, index)
	return session
}

// result is what a call in the background came to.
type result[T any] struct {
	value T
	err   error
}

// background runs call and returns a channel with its result.
func background[T any](t *testing.T, call func(ctx context.Context) (T, error)) <-chan result[T] {
	t.Helper()
	done := make(chan result[T], 1)
	go func() {
		value, err := call(t.Context())
		done <- result[T]{value, err}
	}()
	return done
}

// await returns what a call in the background came to, which must be soon and
// no error.
func await[T any](t *testing.T, done <-chan result[T]) T {
	t.Helper()
	select {
	case got := <-done:
		must.NoError(t, got.err)
		return got.value
	case <-time.After(patience):
		t.Fatal("nothing happened")
		panic("unreachable")
	}
}

func mustBeClosed(t *testing.T, lost <-chan struct{}) {
	t.Helper()
	select {
	case <-lost:
	case <-time.After(patience):
		t.Fatal("the lease was not told that its lock is lost")
	}
}

func mustBeOpen(t *testing.T, lost <-chan struct{}) {
	t.Helper()
	select {
	case <-lost:
		t.Fatal("the lease was told that its lock is lost")
	default:
	}
}
