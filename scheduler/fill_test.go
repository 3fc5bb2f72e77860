package scheduler_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

func TestPool_isFilled(t *testing.T) {
	inBubbleWith(t, pooled(6), func(t *testing.T, w *world) {
		defer run(t, w.Scheduler)()
		pass(2 * time.Second)
		must.Eq(t, ready(6), w.spares())
		must.Eq(t, 6, w.runningSpares())
		status, err := w.Pools(t.Context())
		must.NoError(t, err)
		must.Eq(t, []scheduler.PoolStatus{{Pool: scheduler.Pool{Name: "p", Runtime: "fake", Size: 6}, Ready: 6}}, status)
	})
}

func TestPool_is_refilled_within_a_second(t *testing.T) {
	inBubbleWith(t, pooled(2), func(t *testing.T, w *world) {
		c := w.peerConfig()
		pooled(2)(&c)
		other, err := scheduler.New(c)
		must.NoError(t, err)
		defer run(t, w.Scheduler)()
		pass(time.Second)
		defer run(t, other)()
		pass(time.Second)
		for i, replica := range []*scheduler.Scheduler{w.Scheduler, other} { // one of them leads
			got, err := replica.Create(t.Context(), createOf([]uuid.UUID{chatA, chatB}[i]))
			must.NoError(t, err)
			must.True(t, got.Session.Warm)
			pass(400 * time.Millisecond)
			must.Eq(t, ready(1), w.spares()) // no start slows creates that come at once
			pass(500 * time.Millisecond)
			must.Eq(t, ready(2), w.spares())
		}
	})
}

func TestPool_replaces(t *testing.T) {
	tests := map[string]struct {
		happens func(w *world, spare uuid.UUID)
		told    string // in the event of its end
	}{
		"a spare on a node that is drained": {func(w *world, spare uuid.UUID) {
			w.driver.Edit(spare.String(), func(s *runtime.Sandbox) { s.Reason = "its node is drained" })
		}, "its node is drained"},
		"a spare that died":               {func(w *world, spare uuid.UUID) { w.driver.Kill(spare.String(), "out of memory") }, "it is dead: out of memory"},
		"a spare that is lost":            {func(w *world, spare uuid.UUID) { w.driver.Lose(spare.String(), "node down") }, "it is lost: node down"},
		"a spare of another variant":      {func(w *world, _ uuid.UUID) { w.driver.SetVariant("2") }, "sandboxes of its pool are now started in another way"},
		"a spare that the runtime forgot": {func(w *world, spare uuid.UUID) { w.driver.Forget(spare.String()) }, "sandbox not found"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			inBubbleWith(t, pooled(1), func(t *testing.T, w *world) {
				defer run(t, w.Scheduler)()
				pass(time.Second)
				before := w.onlySpare()
				tt.happens(w, before)
				pass(15 * time.Second)
				after := w.onlySpare()
				must.NotEq(t, before, after)
				events := slices.Sorted(slices.Values(w.spareEvents(t.Context())))
				must.SliceLen(t, 3, events)
				must.StrHasPrefix(t, "spare_ended "+tt.told, events[0])
				must.Eq(t, []string{"spare_ready ", "spare_ready "}, events[1:])
				got, err := w.Create(t.Context(), createA)
				must.NoError(t, err)
				must.Eq(t, after, got.Session.SessionID)
			})
		})
	}
}

func TestPool_ends(t *testing.T) {
	leftBehind := func(state scheduler.SpareState) func(w *world) {
		return func(w *world) {
			spare, err := w.store.PutSpare(context.Background(), scheduler.Spare{SessionID: uuid.New(), Pool: "p", Runtime: "fake", Variant: "1", State: state, CreatedAt: time.Now()})
			must.NoError(w.t, err)
			w.driver.Plant(runtime.Spec{SessionID: spare.SessionID.String(), Pool: "p", CreatedAt: time.Now()})
		}
	}
	tests := map[string]struct {
		size   int
		before func(w *world)
	}{
		"what a dead leader was starting": {1, leftBehind(scheduler.SpareStarting)},
		"what a dead leader was ending":   {1, leftBehind(scheduler.SpareEnding)},
		"a spare without a record": {1, func(w *world) {
			w.driver.Plant(runtime.Spec{SessionID: uuid.NewString(), Pool: "p", CreatedAt: time.Now()})
		}},
		"spares of a pool that has become smaller": {1, func(w *world) {
			c := w.peerConfig()
			pooled(5)(&c)
			larger, err := scheduler.New(c)
			must.NoError(w.t, err)
			ctx, cancel := context.WithCancel(context.Background())
			var done sync.WaitGroup
			done.Go(func() { larger.Run(ctx) })
			pass(2 * time.Second)
			cancel()
			done.Wait()
			must.Eq(w.t, 5, w.runningSpares())
		}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			inBubbleWith(t, pooled(tt.size), func(t *testing.T, w *world) {
				tt.before(w)
				defer run(t, w.Scheduler)()
				pass(3 * time.Minute)
				must.Eq(t, ready(tt.size), w.spares())
				must.Eq(t, tt.size, w.runningSpares())
			})
		})
	}
}

// A spare that is too much is ended, and no other, however long its end takes.
func TestPool_keeps_its_spares_while_another_one_ends(t *testing.T) {
	inBubbleWith(t, pooled(1), func(t *testing.T, w *world) {
		stop := run(t, w.Scheduler)
		pass(time.Second)
		stop()
		tooMany, err := w.store.PutSpare(t.Context(), scheduler.Spare{
			SessionID: uuid.New(), Pool: "p", Runtime: "fake", Variant: "1", State: scheduler.SpareReady, CreatedAt: time.Now(),
		})
		must.NoError(t, err)
		tooMany.ContainerID = w.driver.Plant(runtime.Spec{SessionID: tooMany.SessionID.String(), Pool: "p", CreatedAt: time.Now()}).ContainerID
		_, err = w.store.PutSpare(t.Context(), tooMany)
		must.NoError(t, err)
		release := make(chan struct{})
		created := 0
		w.driver.Intercept(func(ctx context.Context, call fakeruntime.Call) error {
			switch {
			case call.Op == fakeruntime.OpDelete && call.Moment == fakeruntime.Before:
				select {
				case <-release:
				case <-ctx.Done():
				}
			case call.Op == fakeruntime.OpCreate && call.Moment == fakeruntime.Before:
				created++
			}
			return nil
		})
		defer run(t, w.Scheduler)()
		pass(30 * time.Second)
		must.Eq(t, []string{"ending 1", "ready 1"}, w.spares())
		close(release)
		pass(30 * time.Second)
		must.Eq(t, ready(1), w.spares())
		must.Eq(t, 0, created)
	})
}

// Spares that cannot be ended are tried again after a pause, and delay no others.
func TestPool_is_filled_while_spares_cannot_be_ended(t *testing.T) {
	hang := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	fail := func(context.Context) error { return fmt.Errorf("%w: no rights", runtime.ErrUnavailable) }
	for name, end := range map[string]func(context.Context) error{"that hang": hang, "that fail": fail} {
		t.Run(name, func(t *testing.T) {
			inBubbleWith(t, pooled(2), func(t *testing.T, w *world) {
				const stuck = 12
				tries := map[string]int{}
				var mu sync.Mutex
				for range stuck {
					spare, err := w.store.PutSpare(t.Context(), scheduler.Spare{
						SessionID: uuid.New(), Pool: "p", Runtime: "fake", Variant: "1", State: scheduler.SpareEnding, CreatedAt: time.Now(),
					})
					must.NoError(t, err)
					tries[spare.SessionID.String()] = 0
					w.driver.Plant(runtime.Spec{SessionID: spare.SessionID.String(), Pool: "p", CreatedAt: time.Now()})
				}
				w.driver.Intercept(func(ctx context.Context, call fakeruntime.Call) error {
					if call.Op != fakeruntime.OpDelete || call.Moment != fakeruntime.Before {
						return nil
					}
					mu.Lock()
					tries[call.SessionID]++
					mu.Unlock()
					return end(ctx)
				})
				stop := run(t, w.Scheduler)
				defer func() { stop() }()
				pass(time.Second)
				must.Eq(t, append(slices.Repeat([]string{"ending 1"}, stuck), ready(2)...), w.spares())

				pass(10 * time.Minute)
				mu.Lock()
				defer mu.Unlock()
				for id, n := range tries {
					must.Between(t, 1, n, 121, must.Sprint(id))
				}
			})
		})
	}
}

// storeThatIsBehind answers the first reads with spares as they were.
type storeThatIsBehind struct {
	scheduler.Store
	spares []scheduler.Spare
	reads  atomic.Int32
}

func (s *storeThatIsBehind) Spares(ctx context.Context, block scheduler.Block) ([]scheduler.Spare, uint64, error) {
	if s.reads.Add(1) <= 3 {
		return s.spares, 1, nil
	}
	return s.Store.Spares(ctx, block)
}

// A leader may decide to end a spare that a create claims at the same time.
func TestPool_ends_no_spare_that_was_claimed(t *testing.T) {
	inBubbleWith(t, pooled(1), func(t *testing.T, w *world) {
		stop := run(t, w.Scheduler)
		pass(time.Second)
		stop()
		before, _, err := w.store.Spares(t.Context(), scheduler.Block{})
		must.NoError(t, err)
		got, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.True(t, got.Session.Warm)

		w.driver.SetVariant("2")
		c := w.peerConfig()
		pooled(1)(&c)
		c.Store = &storeThatIsBehind{Store: c.Store, spares: before}
		late, err := scheduler.New(c)
		must.NoError(t, err)
		defer run(t, late)()
		pass(time.Second)
		running := w.driver.Running()
		must.True(t, slices.ContainsFunc(running, func(s runtime.Sandbox) bool { return s.SessionID == got.Session.SessionID.String() }))
	})
}

func TestPool_that_is_no_longer_configured_is_emptied(t *testing.T) {
	inBubbleWith(t, pooled(3), func(t *testing.T, w *world) {
		stop := run(t, w.Scheduler)
		pass(2 * time.Second)
		stop()
		without, err := scheduler.New(w.peerConfig())
		must.NoError(t, err)
		defer run(t, without)()
		pass(2 * time.Minute)
		must.SliceEmpty(t, w.spares())
		must.Eq(t, 0, w.runningSpares())
	})
}

// A start that is under way makes a pool look full. Its failure must not end the pause.
func TestPool_whose_starts_fail_late_pauses(t *testing.T) {
	for _, size := range []int{1, 3} {
		inBubbleWith(t, pooled(size), func(t *testing.T, w *world) {
			var tries atomic.Int32
			w.driver.Intercept(func(_ context.Context, call fakeruntime.Call) error {
				if call.Op == fakeruntime.OpCreate && call.Moment == fakeruntime.Before && int(tries.Add(1)) >= size {
					pass(2 * time.Second)
					return fmt.Errorf("%w: no room", runtime.ErrNotPlaced)
				}
				return nil
			})
			defer run(t, w.Scheduler)()
			pass(time.Hour)
			rest := slices.DeleteFunc(w.spares(), func(s string) bool { return s == "starting 1" }) // one may be tried now
			must.SliceLen(t, size-1, slices.DeleteFunc(rest, func(s string) bool { return s == "ending 1" }))
			must.LessEq(t, 100, tries.Load(), must.Sprint("it pauses"))
			must.Greater(t, 50, tries.Load(), must.Sprint("it goes on trying"))
		})
	}
}

// readsSpares counts the reads of all spares that do not wait for a change.
type readsSpares struct {
	scheduler.Store
	n *atomic.Int32
}

func (r readsSpares) Spares(ctx context.Context, block scheduler.Block) ([]scheduler.Spare, uint64, error) {
	if block == (scheduler.Block{}) {
		r.n.Add(1)
	}
	return r.Store.Spares(ctx, block)
}

func TestPool_that_is_not_there_is_looked_for_once_a_minute(t *testing.T) {
	var reads atomic.Int32
	inBubbleWith(t, func(c *scheduler.Config) { c.Store = readsSpares{c.Store, &reads} }, func(t *testing.T, w *world) {
		defer run(t, w.Scheduler)()
		pass(time.Minute)
		reads.Store(0)
		pass(10 * time.Minute)
		must.Between(t, 10, reads.Load(), 25, must.Sprint("the filler and the comparison read them once a minute"))
	})
}

// Spares without a record are ended beside each other: one whose end hangs delays no other.
func TestPool_ends_strays_beside_one_that_hangs(t *testing.T) {
	inBubbleWith(t, pooled(1), func(t *testing.T, w *world) {
		const strays = 20
		hung := uuid.NewString()
		for i := range strays {
			id := uuid.NewString()
			if i == strays/2 {
				id = hung
			}
			w.driver.Plant(runtime.Spec{SessionID: id, Pool: "p", CreatedAt: time.Now()})
		}
		w.driver.Intercept(func(ctx context.Context, call fakeruntime.Call) error {
			if call.Op == fakeruntime.OpDelete && call.SessionID == hung {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		})
		defer run(t, w.Scheduler)()
		pass(100 * time.Second)
		must.Eq(t, 1+1, w.runningSpares()) // that of the pool, and the one that hangs
	})
}

// A runtime that hangs costs a pass one question, and does not keep another pool empty.
func TestPool_is_filled_beside_one_whose_runtime_hangs(t *testing.T) {
	var hanging *fakeruntime.Driver
	twoPools := func(c *scheduler.Config) {
		pooled(2)(c)
		hanging = fakeruntime.New("hangs")
		c.Drivers = map[string]runtime.Driver{"fake": c.Drivers["fake"], "hangs": hanging}
		c.Pools = append(c.Pools, scheduler.Pool{Name: "q", Runtime: "hangs", Size: 20})
	}
	inBubbleWith(t, twoPools, func(t *testing.T, w *world) {
		defer run(t, w.Scheduler)()
		pass(10 * time.Second)
		must.Eq(t, ready(22), w.spares())
		hanging.Intercept(func(ctx context.Context, call fakeruntime.Call) error {
			if call.Op == fakeruntime.OpInspect {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		})
		for _, chat := range []uuid.UUID{chatA, chatB} {
			_, err := w.Create(t.Context(), createOf(chat))
			must.NoError(t, err)
		}
		pass(20 * time.Second)
		must.Eq(t, ready(22), w.spares())
	})
}

func TestPool_that_cannot_be_filled(t *testing.T) {
	inBubbleWith(t, pooled(2), func(t *testing.T, w *world) {
		var tries atomic.Int32
		w.driver.Intercept(func(_ context.Context, call fakeruntime.Call) error {
			if call.Op == fakeruntime.OpCreate && call.Moment == fakeruntime.Before {
				tries.Add(1)
				return fmt.Errorf("%w: no such image", runtime.ErrNotReady)
			}
			return nil
		})
		defer run(t, w.Scheduler)()
		pass(time.Hour)
		must.LessEq(t, 200, tries.Load(), must.Sprint("it pauses"))
		must.Greater(t, 50, tries.Load(), must.Sprint("it goes on trying"))
		must.SliceEmpty(t, w.spares())
		err := w.Health(t.Context())
		must.ErrorContains(t, err, `pool "p" cannot be filled`)
		must.ErrorContains(t, err, "no such image")
		told := w.spareEvents(t.Context())
		must.Eq(t, int(tries.Load()), len(told))
		must.StrHasPrefix(t, "spare_failed ", told[0])
		must.StrContains(t, told[0], "no such image")
		ofOneAgent := scheduler.Caller{Name: "a", Policies: []*scheduler.Policy{{
			Agents: []scheduler.AgentRule{{Prefix: createA.AgentID, Capabilities: scheduler.CapRead}},
		}}}
		must.SliceEmpty(t, w.spareEvents(scheduler.WithCaller(t.Context(), ofOneAgent)))

		w.driver.Intercept(nil)
		pass(2 * time.Minute)
		must.Eq(t, ready(2), w.spares())
		must.NoError(t, w.Health(t.Context()))
	})
}
