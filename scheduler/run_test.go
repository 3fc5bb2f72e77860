package scheduler_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// inBubble runs a test in synctest's time. A goroutine that is left behind at
// the end of such a test is a failure of it.
func inBubble(t *testing.T, test func(*testing.T, *world)) {
	t.Helper()
	inBubbleWith(t, func(*scheduler.Config) {}, test)
}

func inBubbleWith(t *testing.T, configure func(*scheduler.Config), test func(*testing.T, *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		test(t, newWorld(t, func(c *scheduler.Config) { c.Now = time.Now }, configure))
	})
}

// run starts the background work of a replica. The function returned ends it
// and returns once it is quiet.
func run(t *testing.T, s *scheduler.Scheduler) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	quiet := make(chan struct{})
	go func() {
		defer close(quiet)
		s.Run(ctx)
	}()
	return func() {
		cancel()
		<-quiet
	}
}

// pass lets time pass, and what is due by then be done.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// warnings returns the warnings and errors logged since the last look.
func (w *world) warnings() []string {
	var names []string
	for _, line := range w.seen.takeLogs() {
		if level, rest, _ := strings.Cut(line, " "); level == "warn" || level == "error" {
			names = append(names, w.name(rest))
		}
	}
	return names
}

func TestRun_cleansUpAtItsInterval(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		short := createA
		short.TTL = 20 * time.Second
		w.given(created(short))
		stop := run(t, w.Scheduler) // passes at 0, 15 and 30 seconds

		pass(30*time.Second - 1)
		must.Eq(t, []string{"chat-a s1"}, w.running())
		pass(1)
		must.SliceEmpty(t, w.running())
		must.SliceEmpty(t, w.records())

		stop()
		must.SliceEmpty(t, w.warnings())
	})
}

func TestRun_cleansUpAtOnceWhenItStarts(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA))
		pass(defaultTTL)
		stop := run(t, w.Scheduler)
		pass(0)
		must.SliceEmpty(t, w.running())
		stop()
	})
}

func TestRun_settlesWhatAnotherReplicaLeft(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		stop := run(t, w.Scheduler)
		pass(time.Second)
		abandonedStart(w)
		must.Eq(t, []string{"chat-a s1"}, w.running())

		pass(4 * time.Second)

		must.SliceEmpty(t, w.records())
		must.SliceEmpty(t, w.running())
		stop()
	})
}

func TestRun_notesWhatHappensToSandboxes(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA))
		id := w.standing(chatA).SessionID.String()
		stop := run(t, w.Scheduler)
		pass(0)
		w.seen.takeLogs()

		w.driver.Lose(id, "node down")
		synctest.Wait()
		must.Eq(t, []string{"chat-a s1 lost node down"}, w.reasons())

		w.driver.Regain(id)
		synctest.Wait()
		must.Eq(t, []string{"chat-a s1 running"}, w.reasons())

		w.driver.Kill(id, "exit code 137: OOM killed")
		synctest.Wait()
		must.Eq(t, []string{"chat-a s1 dead exit code 137: OOM killed"}, w.reasons())

		named := []string{"", "", ""}
		for i, line := range w.seen.takeLogs() {
			named[i] = w.name(line)
		}
		const session = " chat_id=chat-a session_id=s1 container_id=container-1 reason="
		must.Eq(t, []string{
			"info sandbox_lost" + session + "node down",
			"info sandbox_running" + session,
			"info sandbox_dead" + session + "exit code 137: OOM killed",
		}, named)
		stop()
	})
}

// reasons returns each record's chat, session, state and reason.
func (w *world) reasons() []string {
	page, err := w.store.List(context.Background(), scheduler.Query{PerPage: scheduler.MaxPerPage})
	must.NoError(w.t, err)
	var lines []string
	for _, s := range page.Sessions {
		lines = append(lines, w.name(strings.TrimSpace(s.ChatID.String()+" "+s.SessionID.String()+" "+string(s.State)+" "+s.Reason)))
	}
	return lines
}

func TestRun_aDeathIsNotNotedOnTheStrengthOfDoubt(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA))
		id := w.standing(chatA).SessionID.String()
		stop := run(t, w.Scheduler)
		pass(0)

		w.effects.fail("driver.inspect", runtime.ErrUnavailable)
		w.driver.Kill(id, "exit code 1")
		pass(time.Second)
		must.Eq(t, []string{"chat-a s1 running"}, w.reasons())

		w.effects.heal()
		pass(time.Minute)
		must.Eq(t, []string{"chat-a s1 dead exit code 1"}, w.reasons(), must.Sprint("reconciling found it"))
		stop()
	})
}

func TestRun_whatASuccessorsSandboxDoesIsNotNotedOnIt(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA))
		first := w.standing(chatA).SessionID.String()
		stop := run(t, w.Scheduler)
		pass(0)
		w.driver.Kill(first, "exit code 1")
		synctest.Wait()
		_, err := w.Create(t.Context(), createA)
		must.NoError(t, err)

		w.driver.Kill(first, "exit code 2")
		synctest.Wait()

		must.Eq(t, []string{"chat-a s2 running"}, w.reasons())
		stop()
	})
}

func TestRun_goesOnAfterFailures(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA))
		for _, name := range []string{"list expired", "list in flight", "lock"} {
			w.effects.fail(name, scheduler.ErrUnavailable)
		}
		stop := run(t, w.Scheduler)
		pass(0)
		warned := w.warnings()
		slices.Sort(warned)
		must.Eq(t, []string{
			"lead_failed error=store_unavailable",
			"sandbox_cleanup_failed error=store_unavailable",
			"settle_failed error=store_unavailable",
		}, warned)

		w.effects.heal()
		pass(defaultTTL + 15*time.Second)
		must.SliceEmpty(t, w.records())
		must.SliceEmpty(t, w.warnings())
		stop()
	})
}

// An outage is told of when it begins and then once a minute, and tried again
// with growing pauses; once it is over, all goes on soon.
func TestRun_anOutageDoesNotFillTheLog(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA))
		for _, name := range []string{"list expired", "list in flight", "lock"} {
			w.effects.fail(name, scheduler.ErrUnavailable)
		}
		stop := run(t, w.Scheduler)
		pass(10*time.Minute + time.Second)
		told := make(map[string]int)
		for _, warning := range w.warnings() {
			told[warning]++
		}
		must.MapContainsKey(t, told, "lead_failed error=store_unavailable")
		must.LessEq(t, 11, told["lead_failed error=store_unavailable"])
		must.LessEq(t, 11, told["settle_failed error=store_unavailable"])
		locks := 0
		for _, effect := range w.effects.taken() {
			if effect == "lock" {
				locks++
			}
		}
		must.LessEq(t, 90, locks) // once every 7.5 s at most

		w.effects.heal()
		w.driver.Plant(orphanOf(chatA))
		pass(15*time.Second + time.Minute)
		must.Eq(t, []string{"chat-a s1"}, w.running(), must.Sprint("it leads again"))
		stop()
	})
}

// faltering is a driver whose first watch fails.
type faltering struct {
	*fakeruntime.Driver
	failed bool
}

func (f *faltering) Watch(ctx context.Context, changed func(runtime.Sandbox)) error {
	if !f.failed {
		f.failed = true
		return runtime.ErrUnavailable
	}
	return f.Driver.Watch(ctx, changed)
}

func TestRun_watchesAgainAfterAWatchThatFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *scheduler.Config) {
			c.Now = time.Now
			c.Drivers = map[string]runtime.Driver{"fake": &faltering{Driver: c.Drivers["fake"].(*fakeruntime.Driver)}}
		})
		w.given(created(createA))
		stop := run(t, w.Scheduler)
		pass(time.Second)
		must.Eq(t, []string{"watch_failed runtime=fake error=runtime_unavailable"}, w.warnings())

		w.driver.Kill(w.standing(chatA).SessionID.String(), "exit code 1")
		synctest.Wait()

		must.Eq(t, []string{"chat-a s1 dead exit code 1"}, w.reasons())
		stop()
	})
}

func TestRun_endsQuietly(t *testing.T) {
	for _, after := range []time.Duration{0, 1, 5 * time.Second, 15 * time.Second, time.Minute} {
		inBubble(t, func(t *testing.T, w *world) {
			w.given(created(createA))
			ctx, cancel := context.WithTimeout(t.Context(), after) // also in the moment of a pass
			defer cancel()
			w.Run(ctx)
			must.Eq(t, context.DeadlineExceeded, ctx.Err())
			must.SliceEmpty(t, w.warnings())
			must.Eq(t, []string{"chat-a s1"}, w.running())
			lease, err := w.locker.Lock(t.Context(), uuid.Nil, 0)
			must.NoError(t, err, must.Sprint("it no longer leads"))
			must.NoError(t, lease.Release(t.Context()))
		})
	}
}

// What has begun under a lock is finished before Run returns.
func TestRun_waitsForWhatItBegan(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA))
		pass(defaultTTL)
		w.effects.before("driver.stop", func() { time.Sleep(10 * time.Second) })
		stop := run(t, w.Scheduler)
		pass(time.Second)
		began := time.Now()

		stop()

		must.Eq(t, 9*time.Second, time.Since(began))
		must.SliceEmpty(t, w.records())
		must.SliceEmpty(t, w.running())
		must.SliceEmpty(t, w.warnings())
	})
}

// What a dead replica left in flight is as much as one may start at a time. Each
// of it is settled for itself, also where all are slow to end.
func TestRun_settlesAllThatADeadReplicaLeft(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		const starting = 128
		w.effects.fail("driver.delete", runtime.ErrUnavailable)
		w.effects.failAfter("driver.create", runtime.ErrNotReady)
		for range starting {
			_, err := w.Create(t.Context(), someCreate())
			must.ErrorIs(t, err, runtime.ErrNotReady)
		}
		w.effects.heal()
		w.effects.before("driver.delete", func() { time.Sleep(20 * time.Second) })
		must.Len(t, starting, w.running())

		stop := run(t, w.Scheduler)
		pass(21 * time.Second)

		must.SliceEmpty(t, w.running())
		must.SliceEmpty(t, w.records())
		stop()
	})
}

func TestRun_aReplicaThatEndsDoesNotComplainOfLocksItWaitedFor(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA))
		pass(defaultTTL)
		lease, err := w.peer().locker.Lock(t.Context(), chatA, 0)
		must.NoError(t, err)
		stop := run(t, w.Scheduler)
		pass(time.Second)
		stop()
		must.SliceEmpty(t, w.warnings())
		must.NoError(t, lease.Release(t.Context()))
	})
}
