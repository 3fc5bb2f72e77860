// Package storetest contains the contract test suites for [scheduler.Store] and
// [scheduler.Locker]. Every implementation passes all of them, so results of tests
// with one implementation hold for the others.
//
// The package must never know any implementation. What the contract cannot
// express, such as cutting off a replica, is part of [Cluster].
package storetest

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// Cluster is a set of replicas that share one new set of records.
type Cluster interface {
	// Join adds a replica. It leaves when the test ends.
	Join(t *testing.T) Replica

	// Retain sets how long changes are kept. It is called before the first Join.
	Retain(retention scheduler.Retention)

	// BreakLock takes the chat's lock away from its holder without telling it.
	BreakLock(t *testing.T, chatID uuid.UUID)

	// Damage makes the chat's existing record unreadable without telling
	// anyone. Its index entries stay as they are.
	Damage(t *testing.T, chatID uuid.UUID)

	// Outdate changes the chat's existing record so that only a newer version
	// may read it. Its index entries stay as they are.
	Outdate(t *testing.T, chatID uuid.UUID)

	// MustBeEmpty fails the test if records, locks or index entries of any chat
	// are left.
	MustBeEmpty(t *testing.T)
}

// Replica is one replica's view of the records.
type Replica interface {
	scheduler.Store
	scheduler.Locker

	// End takes all its locks from the replica, as happens to a replica that
	// was cut off for too long.
	End(t *testing.T)
}

// patience is the limit for what should happen at once, and the wait for what
// should not happen at all in a test.
const patience = time.Minute

// agentID is the agent of sessions in tests that do not depend on the agent.
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
		AccessToken:    runtime.Secret(strings.Repeat("5e", 32)),
	}
}

// lock takes the chat's lock and fails the test if that takes longer than
// patience.
func lock(t *testing.T, locker scheduler.Locker, chatID uuid.UUID) scheduler.Lease {
	t.Helper()
	lease, err := locker.Lock(t.Context(), chatID, patience)
	must.NoError(t, err)
	return lease
}

// write sets the chat's record to next, or removes it if next is nil.
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

// result is the result of a call in the background.
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

// await returns the result of a call in the background. The call must succeed
// within patience.
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
