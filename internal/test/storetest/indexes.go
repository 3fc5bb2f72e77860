package storetest

import (
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

// expired returns the chats whose sessions are expired at the given time.
func expired(t *testing.T, store scheduler.Store, at time.Time, limit int) []uuid.UUID {
	t.Helper()
	sessions, err := store.Expired(t.Context(), at, limit)
	must.NoError(t, err)
	return chats(sessions)
}

func chats(sessions []scheduler.Session) []uuid.UUID {
	var ids []uuid.UUID
	for _, session := range sessions {
		ids = append(ids, session.ChatID)
	}
	return ids
}

func expiredBoundary(t *testing.T, c Cluster) {
	a := c.Join(t)
	// In the middle of a minute, and at the beginning of one.
	for _, expiry := range []time.Time{now, now.Truncate(time.Minute)} {
		session := newSession()
		session.ExpiresAt = expiry
		put(t, a, session)
		must.SliceEmpty(t, expired(t, a, expiry.Add(-time.Nanosecond), 10))
		must.Eq(t, []uuid.UUID{session.ChatID}, expired(t, a, expiry, 10))
		must.Eq(t, []uuid.UUID{session.ChatID}, expired(t, c.Join(t), expiry.Add(24*time.Hour), 10))
		write(t, a, session.ChatID, nil)
		must.SliceEmpty(t, expired(t, a, expiry, 10))
	}
	c.MustBeEmpty(t)
}

func expiredOrder(t *testing.T, c Cluster) {
	a := c.Join(t)
	var want []uuid.UUID
	for _, age := range []time.Duration{0, 400, 1, 0, 86400, 61, 3} {
		session := newSession()
		session.ExpiresAt = now.Add(-age*time.Second - time.Duration(len(want))*time.Millisecond)
		put(t, a, session)
		want = append(want, session.ChatID)
	}
	want = []uuid.UUID{want[4], want[1], want[5], want[6], want[2], want[3], want[0]}

	must.Eq(t, want, expired(t, a, now, 10))
	must.Eq(t, want[:3], expired(t, a, now, 3))
	must.Eq(t, want[:1], expired(t, a, now.Add(time.Hour), 1))
	must.SliceEmpty(t, expired(t, a, now, 0))

	// Sessions that are not cleaned up are returned again; the rest follow when
	// others are removed.
	write(t, a, want[0], nil)
	write(t, a, want[1], nil)
	must.Eq(t, want[2:4], expired(t, a, now, 2))
	must.Eq(t, want[2:], expired(t, c.Join(t), now, 10))
}

func renewedIsNotExpired(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	session := newSession()
	session.ExpiresAt = now
	put(t, a, session)
	must.Eq(t, []uuid.UUID{session.ChatID}, expired(t, b, now, 10))

	for _, extension := range []time.Duration{time.Second, time.Minute, time.Hour} {
		session.ExpiresAt = now.Add(extension)
		put(t, a, session)
		must.SliceEmpty(t, expired(t, b, session.ExpiresAt.Add(-1), 10))
		must.Eq(t, []uuid.UUID{session.ChatID}, expired(t, b, session.ExpiresAt, 10))
	}
}

func count(t *testing.T, store scheduler.Store) int {
	t.Helper()
	n, err := store.Count(t.Context())
	must.NoError(t, err)
	return n
}

// countsByAgent counts the records of the AI agents with a prefix, as they come and go.
func countsByAgent(t *testing.T, c Cluster) {
	replica := c.Join(t)
	store, locker := scheduler.Store(replica), scheduler.Locker(replica)
	expect := func(want map[string]int) {
		t.Helper()
		for prefix, n := range want {
			got, err := store.CountAgents(t.Context(), prefix)
			must.NoError(t, err)
			must.Eq(t, n, got, must.Sprintf("prefix %q", prefix))
		}
	}
	expect(map[string]int{"": 0, "support-": 0})
	var support scheduler.Session
	for _, agent := range []string{"support-1", "support-1", "support-2", "support", "sales-1", "sup/port-1"} {
		session := newSession()
		session.AgentID = agent
		put(t, locker, session)
		if agent == "support-2" {
			support = session
		}
	}
	intent := newSession()
	intent.AgentID, intent.State, intent.ContainerID = "support-3", scheduler.StateCreating, ""
	put(t, locker, intent)
	expect(map[string]int{"": 7, "support-": 4, "support": 5, "support-1": 2, "s": 7, "sup/": 1, "other": 0})

	write(t, locker, support.ChatID, nil)
	expect(map[string]int{"": 6, "support-": 3, "support-2": 0})
	again := newSession()
	again.AgentID = "support-2"
	put(t, locker, again)
	expect(map[string]int{"": 7, "support-": 4, "support-2": 1})
}

func intentsAreNotSessions(t *testing.T, c Cluster) {
	a := c.Join(t)
	session := newSession()
	session.ExpiresAt = now
	want := map[scheduler.State]int{
		scheduler.StateCreating: 0, scheduler.StateRunning: 1, scheduler.StateStopping: 1,
		scheduler.StateDead: 1, scheduler.StateLost: 1,
	}
	for state, n := range want {
		session.State = state
		put(t, a, session)
		must.Eq(t, n, count(t, a))
		must.Len(t, n, expired(t, a, now, 10))
	}
	write(t, a, session.ChatID, nil)
	must.Eq(t, 0, count(t, a))
	for n := range 3 {
		put(t, a, newSession())
		must.Eq(t, n+1, count(t, a))
	}
}

func inFlight(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	session := newSession()
	want := map[scheduler.State]bool{
		scheduler.StateCreating: true, scheduler.StateRunning: false, scheduler.StateStopping: true,
		scheduler.StateDead: false, scheduler.StateLost: false,
	}
	put(t, a, newSession())
	for state, flies := range want {
		session.State = state
		put(t, a, session)
		got, err := b.InFlight(t.Context())
		must.NoError(t, err)
		if flies {
			must.Eq(t, []scheduler.Session{session}, got)
		} else {
			must.SliceEmpty(t, got)
		}
	}
}
