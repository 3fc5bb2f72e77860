package scheduler_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

func pooled(size int) func(*scheduler.Config) {
	return func(c *scheduler.Config) {
		c.Pools = []scheduler.Pool{{Name: "p", Runtime: "fake", Size: size}}
	}
}

// spares returns the recorded spares as "STATE VARIANT", sorted.
func (w *world) spares() []string {
	spares, _, err := w.store.Spares(context.Background(), scheduler.Block{})
	must.NoError(w.t, err)
	var lines []string
	for _, spare := range spares {
		lines = append(lines, fmt.Sprintf("%s %s", spare.State, spare.Variant))
	}
	slices.Sort(lines)
	return lines
}

// onlySpare returns the ID of the only spare.
func (w *world) onlySpare() uuid.UUID {
	spares, _, err := w.store.Spares(context.Background(), scheduler.Block{})
	must.NoError(w.t, err)
	must.SliceLen(w.t, 1, spares)
	return spares[0].SessionID
}

// fill has the leader fill a pool of one spare, and returns the spare's ID. Nobody leads then.
func (w *world) fill(t *testing.T) uuid.UUID {
	stop := run(t, w.Scheduler)
	pass(time.Second)
	stop()
	return w.onlySpare()
}

// runningSpares counts the sandboxes that run for no chat.
func (w *world) runningSpares() int {
	n := 0
	for _, sandbox := range w.driver.Running() {
		if sandbox.ChatID == "" {
			n++
		}
	}
	return n
}

// spareEvents returns what a caller is told of spares, as "TYPE REASON".
func (w *world) spareEvents(ctx context.Context) []string {
	var lines []string
	for batch, err := range w.Events(ctx, scheduler.EventQuery{After: new(uint64)}) {
		must.NoError(w.t, err)
		for _, c := range batch.Changes {
			if c.Pool == "p" {
				lines = append(lines, string(c.Type)+" "+c.Reason)
			}
		}
	}
	return lines
}

// ready is what spares returns of n spares that may be claimed.
func ready(n int) []string { return slices.Repeat([]string{"ready 1"}, n) }

func TestCreate_claims_a_spare(t *testing.T) {
	inBubbleWith(t, pooled(1), func(t *testing.T, w *world) {
		spare := w.fill(t)
		w.given()

		got, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultCreated, got.Result)
		must.True(t, got.Session.Warm)
		must.Eq(t, spare, got.Session.SessionID)
		must.Eq(t, time.Now().UTC().Add(defaultTTL), got.Session.ExpiresAt)
		must.SliceEmpty(t, w.spares())
		must.Eq(t, []string{"chat-a s1"}, w.running())

		again, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultReused, again.Result)
		must.Eq(t, got.Session, again.Session)

		// The pool is empty now: that is a cold start, and no error.
		cold, err := w.Create(t.Context(), createOf(chatB))
		must.NoError(t, err)
		must.False(t, cold.Session.Warm)
	})
}

// A driver may know a claimed spare by its pool alone, as that of a plugin may.
func TestWarmSession_of_a_driver_that_knows_no_chat(t *testing.T) {
	inBubbleWith(t, pooled(1), func(t *testing.T, w *world) {
		defer run(t, w.Scheduler)()
		pass(time.Second)
		id := w.onlySpare().String()
		_, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		w.driver.Edit(id, func(s *runtime.Sandbox) { *s = forgetful(*s) })

		pass(5 * time.Minute)
		again, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultReused, again.Result)

		w.driver.Kill(id, "killed by signal 9")
		pass(0)
		must.Eq(t, scheduler.StateDead, w.standing(chatA).State)
	})
}

// forgetful returns the sandbox as a driver reports it that cannot describe it anew.
func forgetful(s runtime.Sandbox) runtime.Sandbox {
	s.ChatID, s.AgentID, s.VolumeHostPath, s.Owner, s.Labels = "", "", "", "", nil
	s.CreatedAt, s.ExpiresAt = time.Time{}, time.Time{}
	return s
}

func TestPool_gives_each_spare_once(t *testing.T) {
	inBubbleWith(t, pooled(20), func(t *testing.T, w *world) {
		stop := run(t, w.Scheduler)
		pass(5 * time.Second)
		stop()
		must.Eq(t, ready(20), w.spares())
		var replicas []*scheduler.Scheduler
		for range 3 {
			c := w.peerConfig()
			pooled(20)(&c)
			c.CleanupInterval = time.Hour
			replica, err := scheduler.New(c)
			must.NoError(t, err)
			stop := run(t, replica)
			defer stop()
			replicas = append(replicas, replica)
		}
		pass(time.Second)

		var mu sync.Mutex
		chatOf := map[uuid.UUID]uuid.UUID{}
		warm := 0
		var creates sync.WaitGroup
		for i := range 60 {
			creates.Go(func() {
				cmd := createOf(uuid.New())
				got, err := replicas[i%3].Create(t.Context(), cmd)
				mu.Lock()
				defer mu.Unlock()
				must.NoError(t, err)
				_, twice := chatOf[got.Session.SessionID]
				must.False(t, twice)
				chatOf[got.Session.SessionID] = cmd.ChatID
				if got.Session.Warm {
					warm++
				}
			})
		}
		creates.Wait()
		must.GreaterEq(t, 20, warm, must.Sprint("all spares were there from the beginning"))
		must.Eq(t, 1, w.driver.MostPerChat())
	})
}

func TestCreate_starts_cold_if_the_claim_fails(t *testing.T) {
	for name, interceptor := range map[string]fakeruntime.Interceptor{
		"before": fakeruntime.Fail(fakeruntime.OpClaim, fakeruntime.Before, runtime.ErrNotReady),
		"after":  fakeruntime.Fail(fakeruntime.OpClaim, fakeruntime.After, runtime.ErrUnavailable),
		"taken":  fakeruntime.Fail(fakeruntime.OpClaim, fakeruntime.Before, runtime.ErrConflict),
		"hanging": func(ctx context.Context, call fakeruntime.Call) error {
			if call.Op == fakeruntime.OpClaim {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubbleWith(t, pooled(1), func(t *testing.T, w *world) {
				spare := w.fill(t)
				w.driver.Intercept(interceptor)
				got, err := w.Create(t.Context(), createA)
				must.NoError(t, err)
				must.False(t, got.Session.Warm)
				must.NotEq(t, spare, got.Session.SessionID)
				must.Eq(t, 1, len(w.driver.Running()), must.Sprint("the spare is gone"))
				must.SliceEmpty(t, w.spares())

				changes, err := w.store.Changes(t.Context(), 0, 0)
				must.NoError(t, err)
				var types []string
				for _, change := range changes {
					types = append(types, string(change.Type))
				}
				must.Eq(t, []string{"spare_ready", "created", "start_failed", "created", "ready"}, types)
			})
		})
	}
}

// loseAnswer is a locker whose leases lose the answer to the intent of a cold create.
type loseAnswer struct {
	scheduler.Locker
	applied bool // whether the write was made nevertheless
}

func (l loseAnswer) Lock(ctx context.Context, chatID uuid.UUID, wait time.Duration) (scheduler.Lease, error) {
	lease, err := l.Locker.Lock(ctx, chatID, wait)
	return losingLease{lease, l.applied}, err
}

type losingLease struct {
	scheduler.Lease
	applied bool
}

func (l losingLease) Write(ctx context.Context, next *scheduler.Session, then scheduler.Then, changes ...scheduler.Change) error {
	if next == nil || next.Warm || next.State != scheduler.StateCreating {
		return l.Lease.Write(ctx, next, then, changes...)
	}
	if l.applied {
		if err := l.Lease.Write(ctx, next, then, changes...); err != nil {
			return err
		}
	}
	return scheduler.ErrUnavailable
}

func TestCreate_that_cannot_record_its_cold_start_tells_of_recorded_sessions_only(t *testing.T) {
	for _, applied := range []bool{false, true} {
		t.Run(fmt.Sprint("the write was applied: ", applied), func(t *testing.T) {
			losing := func(c *scheduler.Config) {
				pooled(1)(c)
				c.Locker = loseAnswer{c.Locker, applied}
			}
			inBubbleWith(t, losing, func(t *testing.T, w *world) {
				defer run(t, w.Scheduler)()
				pass(time.Second)
				w.driver.Intercept(fakeruntime.Fail(fakeruntime.OpClaim, fakeruntime.Before, runtime.ErrNotReady))
				_, err := w.Create(t.Context(), createA)
				must.ErrorIs(t, err, scheduler.ErrUnavailable)
				pass(time.Minute)
				_, _, err = w.Get(t.Context(), chatA, scheduler.Block{})
				must.ErrorIs(t, err, scheduler.ErrNotFound)

				changes, err := w.store.Changes(t.Context(), 0, 0)
				must.NoError(t, err)
				told := map[uuid.UUID]string{}
				for _, change := range changes {
					if change.ChatID == chatA {
						told[change.SessionID] += string(change.Type) + " "
					}
				}
				want := []string{"created settled "}
				if applied {
					want = append(want, "created start_failed ")
				}
				must.Eq(t, want, slices.Sorted(maps.Values(told)))
			})
		})
	}
}

func TestCreate_that_dies_after_its_claim_leaves_nothing(t *testing.T) {
	inBubbleWith(t, pooled(1), func(t *testing.T, w *world) {
		defer run(t, w.Scheduler)()
		pass(time.Second)
		lease, err := w.peer().locker.Lock(t.Context(), chatA, 0)
		must.NoError(t, err)
		spares, _, err := w.store.Spares(t.Context(), scheduler.Block{})
		must.NoError(t, err)
		intent := scheduler.Session{
			SessionID: spares[0].SessionID, ChatID: chatA, AgentID: "agent-1", VolumeHostPath: "/data/a", Runtime: "fake",
			State: scheduler.StateCreating, Warm: true, CreatedAt: time.Now(), ExpiresAt: time.Now().Add(time.Hour),
		}
		must.NoError(t, lease.Claim(t.Context(), &intent, spares[0]))
		must.NoError(t, lease.Release(t.Context()))
		pass(10 * time.Second)
		must.SliceEmpty(t, w.records())
		must.Eq(t, []string{"ready 1"}, w.spares())
		must.NotEq(t, spares[0].SessionID, w.onlySpare())
		must.Eq(t, 1, len(w.driver.Running()))
	})
}

// storeWithLeftover is a store whose index still names the chat of a warm session whose
// record somebody removed.
type storeWithLeftover struct {
	scheduler.Store
	chat uuid.UUID
}

func (s storeWithLeftover) FindSpare(context.Context, uuid.UUID) (*scheduler.Spare, uuid.UUID, error) {
	return nil, s.chat, nil
}

func TestClaimed_spare_whose_record_was_removed_is_ended(t *testing.T) {
	inBubbleWith(t, pooled(1), func(t *testing.T, w *world) {
		c := w.peerConfig()
		c.Store = storeWithLeftover{c.Store, chatA}
		replica, err := scheduler.New(c)
		must.NoError(t, err)
		w.driver.Plant(runtime.Spec{SessionID: uuid.NewString(), Pool: "p", CreatedAt: time.Now()})
		defer run(t, replica)()
		pass(3 * time.Minute)
		must.Eq(t, 0, w.runningSpares())
	})
}

func TestNew_checks_pools(t *testing.T) {
	for want, pool := range map[string]scheduler.Pool{
		"not a valid name":      {Name: "P", Runtime: "fake", Size: 1},
		"size is 0":             {Name: "p", Runtime: "fake"},
		"size is 1001":          {Name: "p", Runtime: "fake", Size: 1001},
		`unknown runtime "nix"`: {Name: "p", Runtime: "nix", Size: 1},
	} {
		c := newWorld(t).config()
		c.Pools = []scheduler.Pool{pool}
		_, err := scheduler.New(c)
		must.ErrorIs(t, err, scheduler.ErrInvalid)
		must.ErrorContains(t, err, want)
	}
	c := newWorld(t).config()
	c.Pools = []scheduler.Pool{{Name: "a", Runtime: "fake", Size: 1}, {Name: "b", Runtime: "fake", Size: 1}}
	_, err := scheduler.New(c)
	must.ErrorContains(t, err, "has another pool")
	must.True(t, errors.Is(err, scheduler.ErrInvalid))
}
