package simulate

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/nomad"
	"github.com/bivouac/bivouac/scheduler"
)

// Steps are the effects that a replica has when it fills a pool and claims spares. Each has
// a point before it and one after it, at which a test can kill the replica.
const (
	recordSpare  = "record the spare"
	startSpare   = "start the spare"
	recordReady  = "record that it is ready"
	recordClaim  = "remove its record and write the intent"
	claimSpare   = "claim it from the runtime"
	saveSession  = "save the session"
	deleteFailed = "end the spare that could not be claimed"
	writeCold    = "write the intent without a spare"
	recordEnding = "record that it is being ended"
	deleteSpare  = "end the spare"
	removeSpare  = "remove its record"
)

// steppingStore passes the points of a store.
type steppingStore struct {
	turns
	w *world
	r *replica
}

func (s steppingStore) PutSpare(ctx context.Context, spare scheduler.Spare) (scheduler.Spare, error) {
	step := map[scheduler.SpareState]string{
		scheduler.SpareStarting: recordSpare, scheduler.SpareReady: recordReady, scheduler.SpareEnding: recordEnding,
	}[spare.State]
	return around(s.w, s.r, step, func() (scheduler.Spare, error) { return s.turns.PutSpare(ctx, spare) })
}

func (s steppingStore) RemoveSpare(ctx context.Context, spare scheduler.Spare) error {
	return s.w.around(s.r, removeSpare, func() error { return s.turns.RemoveSpare(ctx, spare) })
}

func (s steppingStore) Lock(ctx context.Context, chatID uuid.UUID, wait time.Duration) (scheduler.Lease, error) {
	lease, err := s.turns.Lock(ctx, chatID, wait)
	if err != nil {
		return nil, err
	}
	return steppingLease{lease, s.w, s.r}, nil
}

// steppingLease passes the points of a lease.
type steppingLease struct {
	scheduler.Lease
	w *world
	r *replica
}

func (l steppingLease) Claim(ctx context.Context, next *scheduler.Session, spare scheduler.Spare, changes ...scheduler.Change) error {
	return l.w.around(l.r, recordClaim, func() error { return l.Lease.Claim(ctx, next, spare, changes...) })
}

func (l steppingLease) Write(ctx context.Context, next *scheduler.Session, then scheduler.Then, changes ...scheduler.Change) error {
	step := ""
	if next != nil && next.State == scheduler.StateRunning {
		step = saveSession
	} else if now := l.Session(); next != nil && now != nil && now.Warm && !next.Warm {
		step = writeCold
	}
	return l.w.around(l.r, step, func() error { return l.Lease.Write(ctx, next, then, changes...) })
}

// steppingDriver passes the points of a driver.
type steppingDriver struct {
	*nomad.Driver
	w *world
	r *replica
}

func (d steppingDriver) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	step := ""
	if spec.Pool != "" {
		step = startSpare
	}
	return around(d.w, d.r, step, func() (runtime.Sandbox, error) { return d.Driver.Create(ctx, spec, progress) })
}

func (d steppingDriver) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	return around(d.w, d.r, claimSpare, func() (runtime.Sandbox, error) { return d.Driver.Claim(ctx, spec) })
}

func (d steppingDriver) Delete(ctx context.Context, sessionID string) error {
	step := deleteFailed
	if _, isSpare := d.w.spareRecords()[sessionID]; isSpare {
		step = deleteSpare
	}
	return d.w.around(d.r, step, func() error { return d.Driver.Delete(ctx, sessionID) })
}

// around passes the points before and after an effect of a replica.
func around[T any](w *world, r *replica, step string, effect func() (T, error)) (T, error) {
	w.pass(r, step+":before")
	value, err := effect()
	if err == nil {
		w.pass(r, step+":after")
	}
	return value, err
}

func (w *world) around(r *replica, step string, effect func() error) error {
	_, err := around(w, r, step, func() (struct{}, error) { return struct{}{}, effect() })
	return err
}

// pass kills the replica, once, if it is to be killed at this point.
func (w *world) pass(r *replica, point string) {
	w.mu.Lock()
	is := w.killAt == point && !w.killed
	w.killed = w.killed || is
	w.mu.Unlock()
	if is {
		w.killedAt = w.now()
		w.note("%s is killed at %s", r.name, point)
		r.crash()
	}
}

// TestReplicaKilledBetweenTheStepsOfAFillOrAClaim shows that the other replica settles what
// a replica leaves behind that is killed before or after any effect of a fill or a claim: it
// leaves no sandbox and no record, it fills the pool, and the chat gets one sandbox.
func TestReplicaKilledBetweenTheStepsOfAFillOrAClaim(t *testing.T) {
	templates := prepare(t)
	create := request{kind: "create", agent: "agent-1", after: 5 * time.Second}
	// Something has to end a spare, or to make a claim fail.
	dies := fault{kind: "spare dies", at: 2 * time.Second, lasts: time.Second}
	silent := fault{kind: "spare does not answer", at: 2 * time.Second, lasts: time.Second}
	steps := []struct {
		name string
		with []fault
	}{
		{recordSpare, nil}, {startSpare, nil}, {recordReady, nil},
		{recordClaim, nil}, {claimSpare, nil}, {saveSession, nil},
		{deleteFailed, []fault{silent}}, {writeCold, []fault{silent}},
		{recordEnding, []fault{dies}}, {deleteSpare, []fault{dies}}, {removeSpare, []fault{dies}},
	}
	var table strings.Builder
	out := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(out, "killed\tsettled after")
	for _, step := range steps {
		for _, when := range []string{"before", "after"} {
			point := step.name + ":" + when
			t.Run(point, func(t *testing.T) {
				drawFrom(t, 1)
				var w *world
				synctest.Test(t, func(t *testing.T) {
					w = run(t, plan{
						seed: 1, hosts: 2, chats: 1, expire: 2, nodes: 1, capacity: 20, pool: 1, ttl: 20 * time.Minute,
						cleanupInterval: 10 * time.Second, skews: make([]time.Duration, 2),
						callers: [][]request{{create}}, faults: step.with, calm: 5 * time.Second, killAt: point, again: true,
					}, templates)
				})
				_, _ = fmt.Fprintf(out, "%s %s\t%.1f s\n", when, step.name, (w.settledAt - w.killedAt).Seconds())
				if len(w.violations) > 0 {
					t.Log(strings.Join(w.lines(true), "\n"))
				}
				must.SliceEmpty(t, w.violations)
				must.SliceEmpty(t, w.checkHistory())
				must.True(t, w.killed, must.Sprint("the point was not passed"))
				must.LessEq(t, settleLimit, w.settledAt-w.killedAt)
			})
		}
	}
	_ = out.Flush() // it writes to memory
	t.Logf("\n%s", table.String())
}
