package scheduler_test

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// blocked has calls of the driver take until release is called.
func (w *world) blocked(ops ...fakeruntime.Op) (release func()) {
	free := make(chan struct{})
	w.driver.Intercept(func(ctx context.Context, call fakeruntime.Call) error {
		for _, op := range ops {
			if call.Op == op && call.Moment == fakeruntime.Before {
				select {
				case <-free:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}
		return nil
	})
	return sync.OnceFunc(func() { close(free) })
}

func TestCreate_sandboxesThatAreSlowToStopTakeNoPlaceOfAStart(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		// Given as many dead sandboxes as there are places for starts, which take
		// their time to be stopped when they are replaced.
		p := w.peer()
		var commands []scheduler.CreateCommand
		for range 128 {
			cmd := someCreate()
			created, err := p.Create(t.Context(), cmd)
			must.NoError(t, err)
			w.driver.Kill(created.Session.SessionID.String(), "its node is lost")
			commands = append(commands, cmd)
		}
		release := w.blocked(fakeruntime.OpStop)
		var callers sync.WaitGroup
		for _, cmd := range commands {
			callers.Go(func() {
				_, err := p.Create(t.Context(), cmd)
				must.NoError(t, err)
			})
		}
		synctest.Wait()

		// Then another chat's create does not wait for them, and one more of theirs
		// is refused.
		_, err := p.Create(t.Context(), createA)
		must.NoError(t, err)
		w.driver.Kill(w.standing(chatA).SessionID.String(), "its node is lost")
		_, err = p.Create(t.Context(), createA)
		must.ErrorIs(t, err, scheduler.ErrBusy)
		release()
		callers.Wait()
	})
}

func TestCreate_waitersTakeNoLockToLearnThatTheSessionStands(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		release := w.blocked(fakeruntime.OpCreate)
		var callers sync.WaitGroup
		for range 100 {
			callers.Go(func() {
				_, err := w.Create(t.Context(), createA)
				must.NoError(t, err)
			})
		}
		synctest.Wait()
		release()
		callers.Wait()

		locks := 0
		for _, name := range w.effects.taken() {
			if name == "lock" {
				locks++
			}
		}
		must.Eq(t, 1, locks)
	})
}

func TestDelete_waitersTakeNoLockToLearnThatTheSessionIsGone(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA))
		release := w.blocked(fakeruntime.OpDelete)
		var found atomic.Int32
		var callers sync.WaitGroup
		w.effects.taken()
		for range 100 {
			callers.Go(func() {
				res, err := w.Delete(t.Context(), chatA)
				must.NoError(t, err)
				if res.Found {
					found.Add(1)
				}
			})
		}
		synctest.Wait()
		release()
		callers.Wait()

		must.Eq(t, 1, found.Load())
		count := map[string]int{}
		for _, name := range w.effects.taken() {
			count[name]++
		}
		must.Eq(t, 1, count["lock"])
		must.Eq(t, 99, count["get"])
	})
}

func TestDelete_waitersTryForThemselves(t *testing.T) {
	// second deletes the session beside another delete, which takes a second and then
	// returns an error or nil. It returns how long the second delete took.
	second := func(t *testing.T, w *world, caller context.Context, first error) (res scheduler.DeleteResult, took time.Duration) {
		var calls atomic.Int32
		w.driver.Intercept(func(_ context.Context, call fakeruntime.Call) error {
			ends := call.Op == fakeruntime.OpDelete || call.Op == fakeruntime.OpStop
			if !ends || call.Moment != fakeruntime.Before || calls.Add(1) > 1 {
				return nil
			}
			time.Sleep(time.Second)
			return first
		})
		var callers sync.WaitGroup
		callers.Go(func() {
			_, err := w.Delete(t.Context(), chatA)
			must.ErrorIs(t, err, first)
		})
		synctest.Wait()
		began := time.Now()
		res, err := w.Delete(caller, chatA)
		took = time.Since(began)
		must.NoError(t, err)
		callers.Wait()
		return res, took
	}

	t.Run("after_a_failure", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			w.given(created(createA))
			res, _ := second(t, w, t.Context(), runtime.ErrUnavailable)
			must.True(t, res.Found)
			must.SliceEmpty(t, w.running())
			must.SliceEmpty(t, w.records())
		})
	})

	t.Run("after_a_failure_of_a_chat_without_a_record", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			orphan := w.driver.Plant(orphanOf(chatA))
			w.driver.Edit(orphan.SessionID, func(s *runtime.Sandbox) { s.AgentID = "" }) // it cannot be adopted
			res, _ := second(t, w, t.Context(), runtime.ErrUnavailable)
			must.True(t, res.Found)
			must.SliceEmpty(t, w.running())
		})
	})

	t.Run("if_the_chat_has_a_session_again", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			w.given(created(createA))
			w.effects.before("get", func() { // when the waiter looks
				w.effects.heal()
				w.given(created(createA))
			})
			res, _ := second(t, w, t.Context(), nil)
			must.True(t, res.Found)
			must.SliceEmpty(t, w.running())
			must.SliceEmpty(t, w.records())
		})
	})

	t.Run("and_do_not_wait_if_they_may_not_see_the_session", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			w.given(created(createA))
			res, took := second(t, w, as(t, rule("agent-2", scheduler.CapRead|scheduler.CapWrite)), nil)
			must.False(t, res.Found)
			must.Eq(t, 0, took)
		})
	})
}

func TestCreate_waitersTryForThemselvesAfterAFailure(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		failures := 1
		w.driver.Intercept(func(_ context.Context, call fakeruntime.Call) error {
			if call.Op == fakeruntime.OpCreate && call.Moment == fakeruntime.Before {
				time.Sleep(time.Second)
				if failures--; failures >= 0 {
					return runtime.ErrNotPlaced
				}
			}
			return nil
		})
		results := make(map[string]int)
		var mu sync.Mutex
		var callers sync.WaitGroup
		p := w.peer()
		for range 3 {
			callers.Go(func() {
				res, err := p.Create(t.Context(), createA)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					results[scheduler.Kind(err)]++
					return
				}
				results[string(res.Result)]++
			})
		}
		callers.Wait()
		must.Eq(t, map[string]int{"not_placed": 1, "created": 1, "reused": 1}, results)
	})
}

func TestCreate_aDriverThatAnswersForAnotherChatIsNotBelieved(t *testing.T) {
	w := newWorld(t, func(c *scheduler.Config) {
		c.Drivers["fake"] = strayDriver{c.Drivers["fake"]}
	})
	_, err := w.Create(t.Context(), createA)
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	must.ErrorContains(t, err, chatB.String())
	must.SliceEmpty(t, w.records())
	must.SliceEmpty(t, w.running())
}

// strayDriver answers a create for another chat than it was asked for.
type strayDriver struct{ runtime.Driver }

func (d strayDriver) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	sandbox, err := d.Driver.Create(ctx, spec, progress)
	sandbox.ChatID = chatB.String()
	return sandbox, err
}

func TestRun_deathsAreNotedWhileOtherChatsAreHeld(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		// Given more chats than there are workers, whose locks are held while their
		// sandboxes die.
		var held []scheduler.Lease
		var sessions []scheduler.Session
		for range 20 {
			cmd := someCreate()
			created, err := w.Create(t.Context(), cmd)
			must.NoError(t, err)
			sessions = append(sessions, created.Session)
		}
		w.given(created(createA))
		stop := run(t, w.Scheduler)
		defer stop()
		synctest.Wait()
		for _, session := range sessions {
			lease, err := w.locker.Lock(t.Context(), session.ChatID, 0)
			must.NoError(t, err)
			held = append(held, lease)
			w.driver.Kill(session.SessionID.String(), "exit code 1")
		}
		synctest.Wait()

		// When one more sandbox dies, it is noted within a second.
		w.driver.Kill(w.standing(chatA).SessionID.String(), "exit code 2")
		pass(time.Second)
		must.Eq(t, scheduler.StateDead, w.standing(chatA).State)

		// And so are the others once their locks are free.
		for _, lease := range held {
			must.NoError(t, lease.Release(t.Context()))
		}
		pass(time.Second)
		for _, session := range sessions {
			must.Eq(t, scheduler.StateDead, w.standing(session.ChatID).State)
		}
	})
}

func TestEnd(t *testing.T) {
	// undo is what the caller of End leaves for undoing.
	const undo = 8 * time.Second
	end := func(t *testing.T, w *world) (done func()) {
		ctx, cancel := context.WithTimeout(t.Context(), undo)
		w.End(ctx)
		return cancel
	}

	t.Run("a start under way is undone, and its caller told why", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			w.blocked(fakeruntime.OpCreate)
			failed := make(chan error, 1)
			go func() {
				_, err := w.Create(t.Context(), createA)
				failed <- err
			}()
			synctest.Wait()
			defer end(t, w)()
			err := <-failed
			must.ErrorIs(t, err, scheduler.ErrShuttingDown)
			must.Eq(t, "shutting_down", scheduler.Kind(err))
			must.SliceEmpty(t, w.records())
			must.SliceEmpty(t, w.running())
		})
	})

	t.Run("what is not undone in time is left to another replica, with its lock free", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			w.blocked(fakeruntime.OpCreate, fakeruntime.OpDelete)
			failed := make(chan error, 1)
			go func() {
				_, err := w.Create(t.Context(), createA)
				failed <- err
			}()
			synctest.Wait()
			began := time.Now()
			defer end(t, w)()
			must.ErrorIs(t, <-failed, scheduler.ErrShuttingDown)
			must.Eq(t, undo, time.Since(began))
			must.Eq(t, scheduler.StateCreating, w.standing(chatA).State)

			w.driver.Intercept(w.effects.intercept)
			_, err := w.peer().Create(t.Context(), createA)
			must.NoError(t, err)
			must.Eq(t, undo, time.Since(began))
		})
	})

	t.Run("who waits for a lock or for another create waits no longer", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			lease, err := w.locker.Lock(t.Context(), chatA, 0)
			must.NoError(t, err)
			failed := make(chan error, 4)
			for range 2 {
				go func() {
					_, err := w.Create(t.Context(), createA)
					failed <- err
				}()
			}
			go func() {
				_, err := w.Delete(t.Context(), chatA)
				failed <- err
			}()
			go func() {
				_, err := w.Renew(t.Context(), chatA, time.Minute)
				failed <- err
			}()
			synctest.Wait()
			began := time.Now()
			defer end(t, w)()
			for range cap(failed) {
				must.ErrorIs(t, <-failed, scheduler.ErrShuttingDown)
			}
			must.Eq(t, 0, time.Since(began))
			must.NoError(t, lease.Release(t.Context()))
		})
	})

	t.Run("an existing session is still reported", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		w.End(ctx)
		res, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultReused, res.Result)
		_, err = w.Create(t.Context(), someCreate())
		must.ErrorIs(t, err, scheduler.ErrShuttingDown)
	})
}
