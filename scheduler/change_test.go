package scheduler_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// changes returns what is stored of the past, as "INDEX TYPE SESSION CALLER[: REASON]".
// The first transaction has the index 1.
func (w *world) changes() []string {
	changes, err := w.store.Changes(context.Background(), 0, 0)
	must.NoError(w.t, err)
	var lines []string
	transactions := map[uint64]int{}
	for _, c := range changes {
		if _, known := transactions[c.Index]; !known {
			transactions[c.Index] = len(transactions) + 1
		}
		line := fmt.Sprintf("%d %s %s %s", transactions[c.Index], c.Type, c.SessionID, c.Caller)
		if c.Reason != "" {
			line += ": " + c.Reason
		}
		lines = append(lines, w.name(line))
	}
	return lines
}

func TestChanges(t *testing.T) {
	do := func(use func(*world) error) func(*world) {
		return func(w *world) { must.NoError(w.t, use(w)) }
	}
	create := func(cmd scheduler.CreateCommand) func(*world) {
		return func(w *world) { _, _ = w.Create(t.Context(), cmd) }
	}
	renew := do(func(w *world) error { _, err := w.Renew(t.Context(), chatA, time.Hour); return err })
	remove := do(func(w *world) error { _, err := w.Delete(t.Context(), chatA); return err })
	cleanUp := do(func(w *world) error { _, err := w.CleanupExpired(t.Context()); return err })
	settle := do(func(w *world) error { return w.SettleInFlight(t.Context()) })
	other := createA
	other.AgentID = "agent-2"

	for _, tc := range []struct {
		name string
		do   []func(*world)
		want []string
	}{
		{"a create", []func(*world){create(createA)}, []string{"1 created s1 anonymous", "2 ready s1 anonymous"}},
		{"a reuse writes nothing", []func(*world){create(createA), create(createA)}, []string{"1 created s1 anonymous", "2 ready s1 anonymous"}},
		{
			"a conflict", []func(*world){create(createA), create(other)},
			[]string{"1 created s1 anonymous", "2 ready s1 anonymous", "3 conflict s1 anonymous: agent_id"},
		},
		{
			"a create that fails", []func(*world){fails("driver.create", runtime.ErrNotPlaced), create(createA)},
			[]string{"1 created s1 anonymous", "2 start_failed s1 anonymous: start the sandbox: not placed"},
		},
		{
			"a create that is not undone", []func(*world){abandonedStart, settle},
			[]string{"1 created s1 anonymous", "2 settled s1 anonymous"},
		},
		{
			"a create after one that is not undone", []func(*world){abandonedStart, create(createA)},
			[]string{"1 created s1 anonymous", "2 settled s1 anonymous: its create had not finished", "2 created s2 anonymous", "3 ready s2 anonymous"},
		},
		{
			"a renewal", []func(*world){create(createA), renew},
			[]string{"1 created s1 anonymous", "2 ready s1 anonymous", "3 renewed s1 anonymous"},
		},
		{
			"a renewal that finds the sandbox lost", []func(*world){create(createA), lost("node down"), renew},
			[]string{"1 created s1 anonymous", "2 ready s1 anonymous", "3 lost s1 anonymous: node down", "3 renewed s1 anonymous"},
		},
		{
			"a deletion", []func(*world){create(createA), remove, remove},
			[]string{"1 created s1 anonymous", "2 ready s1 anonymous", "3 deleted s1 anonymous"},
		},
		{
			"an expiry", []func(*world){create(createA), later(time.Hour), cleanUp},
			[]string{"1 created s1 anonymous", "2 ready s1 anonymous", "3 expired s1 anonymous"},
		},
		{
			"a replacement of a dead session", []func(*world){create(createA), killed("exit code 3"), create(createA)},
			[]string{"1 created s1 anonymous", "2 ready s1 anonymous", "3 replaced s1 anonymous: exit code 3", "3 created s2 anonymous", "4 ready s2 anonymous"},
		},
		{
			"a replacement of an expired session", []func(*world){create(createA), later(time.Hour), create(other)},
			[]string{"1 created s1 anonymous", "2 ready s1 anonymous", "3 replaced s1 anonymous: it had expired", "3 created s2 anonymous", "4 ready s2 anonymous"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			for _, step := range tc.do {
				step(w)
			}
			must.Eq(t, tc.want, w.changes())
		})
	}
}

func TestShares(t *testing.T) {
	shares := scheduler.NewShares(2, "followers", "the session already has %d")
	first, err := shares.Enter("a")
	must.NoError(t, err)
	_, err = shares.Enter("a")
	must.NoError(t, err)
	_, err = shares.Enter("a")
	must.ErrorIs(t, err, scheduler.ErrBusy)
	must.ErrorContains(t, err, "the session already has 2")
	_, err = shares.Enter("b")
	must.NoError(t, err)
	first()
	first() // frees its place only once
	_, err = shares.Enter("a")
	must.NoError(t, err)
	_, err = shares.Enter("a")
	must.ErrorIs(t, err, scheduler.ErrBusy)
}
