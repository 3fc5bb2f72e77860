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
	"github.com/bivouac/bivouac/scheduler"
)

// Time in these tests is synctest's: it moves when everybody waits.

func TestCreate_concurrentCreatesOfOneChatShareOneStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		replicas := []peer{w.peer(), w.peer(), w.peer()}
		w.driver.Intercept(func(_ context.Context, call fakeruntime.Call) error {
			if call.Op == fakeruntime.OpCreate && call.Moment == fakeruntime.Before {
				time.Sleep(time.Second) // the start takes its time
			}
			return nil
		})

		const callers = 100
		results := make([]scheduler.CreateResult, callers)
		errs := make([]error, callers)
		var g sync.WaitGroup
		for i := range callers {
			g.Go(func() { results[i], errs[i] = replicas[i%len(replicas)].Create(t.Context(), createA) })
		}
		g.Wait()

		count := make(map[scheduler.Result]int)
		for i, res := range results {
			must.NoError(t, errs[i])
			must.Eq(t, w.standing(chatA), res.Session)
			count[res.Result]++
		}
		must.Eq(t, map[scheduler.Result]int{scheduler.ResultCreated: 1, scheduler.ResultReused: callers - 1}, count)
		must.Eq(t, 1, w.driver.Created())
	})
}

func TestCreate_waitsForTheChatsLockOnlySoLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		lease, err := w.locker.Lock(t.Context(), chatA, 0)
		must.NoError(t, err)
		began := time.Now()

		_, err = w.Create(t.Context(), createA)
		must.ErrorIs(t, err, scheduler.ErrLockTimeout)
		must.Eq(t, scheduler.LockWait, time.Since(began))

		must.NoError(t, lease.Release(t.Context()))
		_, err = w.Create(t.Context(), createA)
		must.NoError(t, err)
	})
}

// A driver that never answers does not hold its chat for ever: the operation
// ends by its own limit, and is undone.
func TestCreate_aDriverThatNeverAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.effects.hook(effect{Name: "driver.create"}, hook{after: func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		}})
		began := time.Now()

		_, err := w.Create(t.Context(), createA)

		must.ErrorIs(t, err, context.DeadlineExceeded)
		must.Eq(t, 5*time.Minute, time.Since(began))
		must.SliceEmpty(t, w.records())
		must.SliceEmpty(t, w.running())
	})
}

// All use cases at once, over several replicas that lose their locks in between:
// whatever comes of it, no chat ever has two sandboxes, and nothing stays behind.
func TestReplicas_neverGiveAChatTwoSandboxes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *scheduler.Config) { c.Now = time.Now })
		w.driver.Intercept(func(ctx context.Context, call fakeruntime.Call) error {
			if call.Op != fakeruntime.OpInspect {
				time.Sleep(time.Second)
			}
			return nil
		})
		var turn atomic.Int64
		var g sync.WaitGroup
		for range 4 {
			other := w.peer()
			for range 3 {
				g.Go(func() {
					for range 40 {
						ctx := t.Context()
						cmd := []scheduler.CreateCommand{createA, createB}[turn.Add(1)%2]
						cmd.TTL = 10 * time.Second
						switch turn.Add(1) % 5 {
						case 0, 1, 2:
							_, _ = other.Create(ctx, cmd)
						case 3:
							_, _ = other.Delete(ctx, cmd.ChatID)
						case 4:
							_ = other.SettleInFlight(ctx)
							_, _ = other.CleanupExpired(ctx)
						}
						if turn.Add(1)%7 == 0 {
							other.locker.End()
						}
					}
				})
			}
		}
		g.Wait()
		must.Eq(t, 1, w.driver.MostPerChat())
		must.Greater(t, 10, w.driver.Created())

		time.Sleep(time.Minute)
		must.NoError(t, w.SettleInFlight(t.Context()))
		_, err := w.CleanupExpired(t.Context())
		must.NoError(t, err)
		must.SliceEmpty(t, w.records())
		must.SliceEmpty(t, w.running())
	})
}

func TestDelete_aSandboxThatDoesNotEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA))
		w.effects.hook(effect{Name: "driver.delete"}, hook{before: func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		}})
		began := time.Now()

		_, err := w.Delete(t.Context(), chatA)

		must.ErrorIs(t, err, context.DeadlineExceeded)
		must.Eq(t, time.Minute, time.Since(began))
		must.Eq(t, []string{"chat-a s1 stopping container-1 12:30:00"}, w.records())

		began = time.Now()
		must.NoError(t, w.SettleInFlight(t.Context()))
		must.Eq(t, 30*time.Second, time.Since(began), must.Sprint("settling does not wait for it as long"))

		w.effects.heal()
		must.NoError(t, w.SettleInFlight(t.Context()))
		must.SliceEmpty(t, w.records())
		must.SliceEmpty(t, w.running())
	})
}
