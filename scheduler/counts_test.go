package scheduler_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

func TestCounts(t *testing.T) {
	w := newWorld(t)
	other := createB
	other.AgentID = "agent-2"
	w.given(created(createA), created(other), created(createC), abandonedStop)

	for _, tc := range []struct {
		name, agent string
		ctx         context.Context
		want        scheduler.Counts
	}{
		{"all sessions", "", t.Context(), scheduler.Counts{"running": 2, "stopping": 1, "creating": 0, "dead": 0, "lost": 0}},
		{"those of one AI agent", "agent-1", t.Context(), scheduler.Counts{"running": 1, "stopping": 1, "creating": 0, "dead": 0, "lost": 0}},
		{"none of an AI agent without sessions", "agent-3", t.Context(), scheduler.Counts{"running": 0, "stopping": 0, "creating": 0, "dead": 0, "lost": 0}},
		{"those that the caller may see", "", as(t, rule("agent-2", scheduler.CapRead)), scheduler.Counts{"running": 1, "stopping": 0, "creating": 0, "dead": 0, "lost": 0}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, at, err := w.Counts(tc.ctx, tc.agent)
			must.NoError(t, err)
			must.Eq(t, tc.want, got)
			must.False(t, at.IsZero())
		})
	}
	t.Run("not those of an AI agent that the caller may not see", func(t *testing.T) {
		_, _, err := w.Counts(as(t, rule("agent-2", scheduler.CapRead)), "agent-1")
		must.ErrorIs(t, err, scheduler.ErrPermissionDenied)
	})
}

func TestCounts_readAllRecordsOnceInFiveSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.effects.fail("scan", scheduler.ErrUnavailable)
		_, _, err := w.Counts(t.Context(), "")
		must.ErrorIs(t, err, scheduler.ErrUnavailable, must.Sprint("a failure is not remembered"))
		w.effects.heal()

		_, first, err := w.Counts(t.Context(), "")
		must.NoError(t, err)
		w.given(created(createA))
		counts, at, err := w.Counts(t.Context(), "")
		must.NoError(t, err)
		must.Eq(t, first, at)
		must.Eq(t, 0, counts["running"])

		<-time.After(5 * time.Second)
		counts, at, err = w.Counts(t.Context(), "")
		must.NoError(t, err)
		must.Eq(t, 5*time.Second, at.Sub(first))
		must.Eq(t, 1, counts["running"])
	})
}

func TestCounts_endWithTheCaller(t *testing.T) {
	w := newWorld(t)
	gone, leave := context.WithCancel(t.Context())
	leave()
	_, _, err := w.Counts(gone, "")
	must.ErrorIs(t, err, context.Canceled)
}

// slowScans is a store that takes a second to read all records.
type slowScans struct {
	scheduler.Store
	reads *int
}

func (s slowScans) Scan(ctx context.Context, shard int) (scheduler.Part, int, error) {
	*s.reads++
	time.Sleep(time.Second)
	return s.Store.Scan(ctx, shard)
}

func TestCounts_takeASmallShareOfTheTime(t *testing.T) {
	reads := 0
	inBubbleWith(t, func(c *scheduler.Config) { c.Store = slowScans{c.Store, &reads} }, func(t *testing.T, w *world) {
		for range 15 { // within 20 seconds
			_, _, err := w.Counts(t.Context(), "")
			must.NoError(t, err)
			pass(time.Second)
		}
		first := reads
		pass(6 * time.Second)
		_, _, err := w.Counts(t.Context(), "")
		must.NoError(t, err)
		must.Eq(t, 2*first, reads)
	})
}
