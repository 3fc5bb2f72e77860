package scheduler_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

var (
	createB = scheduler.CreateCommand{ChatID: chatB, AgentID: "agent-1", VolumeHostPath: "/data/b"}
	createC = scheduler.CreateCommand{ChatID: chatC, AgentID: "agent-1", VolumeHostPath: "/data/c"}
)

// cleanupSpans are those of a pass that found chat A's session s1, in the order
// of their ends.
func cleanupSpans(result, failed string) []span {
	one := span{
		Name:  "usecase.cleanup_expired_sandbox",
		Attrs: attrs{"chat.id": "chat-a", "session.id": "s1", "container.id": "container-1", "sandbox.result": result},
		Error: failed,
	}
	pass := attrs{"sandbox.expired_count": "1", "sandbox.cleaned_count": "0", "sandbox.error_count": "0", "sandbox.result": "completed"}
	switch result {
	case "cleaned":
		pass["sandbox.cleaned_count"] = "1"
	case "error":
		one.Attrs["error.type"] = failed
		pass["sandbox.error_count"], pass["sandbox.result"] = "1", "completed_with_errors"
	}
	return []span{one, {Name: "usecase.cleanup_expired_sandboxes", Attrs: pass}}
}

func cleanupResult(w *world, res scheduler.CleanupResult) string {
	var result string
	for _, s := range res.Cleaned {
		result += w.describe(s) + "; "
	}
	return result + "errors " + itoa(res.ErrorCount)
}

func TestCleanupExpired(t *testing.T) {
	expired := []func(*world){created(createA), later(defaultTTL)}
	and := func(more ...func(*world)) []func(*world) { return slices.Concat(expired, more) }

	cleaned := func(record string, effects ...string) outcome {
		return outcome{
			Result:  record + "; errors 0",
			Effects: slices.Concat([]string{"list expired", "lock"}, effects),
			Spans:   cleanupSpans("cleaned", ""),
			Metrics: []string{"sandbox.active.count 0", "sandbox.cleanup.total{result=cleaned} 1"},
			Logs:    []string{"info sandbox_cleaned chat_id=chat-a session_id=s1 container_id=container-1"},
		}
	}
	standing, alive := []string{"chat-a s1 running container-1 12:30:00"}, []string{"chat-a s1"}
	stopping := []string{"chat-a s1 stopping container-1 12:30:00"}
	failed := func(kind string, records, running []string, effects ...string) outcome {
		return outcome{
			Result:  "errors 1",
			Effects: slices.Concat([]string{"list expired", "lock"}, effects),
			Spans:   cleanupSpans("error", kind),
			Metrics: []string{"sandbox.active.count 1", "sandbox.cleanup.error.total{error.type=" + kind + "} 1"},
			Logs:    []string{"error sandbox_clean_failed chat_id=chat-a session_id=s1 container_id=container-1 error=" + kind},
			Records: records,
			Running: running,
		}
	}

	for _, tc := range []struct {
		name  string
		given []func(*world)
		want  outcome
	}{{
		name:  "a session at its expiry, not only after it",
		given: expired,
		want:  cleaned(standing[0], "driver.find", "driver.inspect", "write stopping", "driver.stop", "remove + release"),
	}, {
		name:  "one whose sandbox is dead",
		given: and(killed("exit code 1")),
		want:  cleaned(standing[0], "driver.find", "driver.inspect", "write stopping", "driver.stop", "remove + release"),
	}, {
		name:  "one that somebody began to stop",
		given: and(abandonedStop),
		want:  cleaned(stopping[0], "driver.find", "driver.inspect", "driver.stop", "remove + release"),
	}, {
		name:  "none before its expiry",
		given: []func(*world){created(createA), later(defaultTTL - 1)},
		want: outcome{
			Result:  "errors 0",
			Effects: []string{"list expired"},
			Spans: []span{{Name: "usecase.cleanup_expired_sandboxes", Attrs: attrs{
				"sandbox.expired_count": "0", "sandbox.cleaned_count": "0", "sandbox.error_count": "0", "sandbox.result": "completed",
			}}},
			Metrics: []string{"sandbox.active.count 1"},
			Records: standing,
			Running: alive,
		},
	}, {
		name:  "not where what expired cannot be listed",
		given: and(fails("list expired", scheduler.ErrUnavailable)),
		want: outcome{
			Result:  "error store_unavailable",
			Effects: []string{"list expired"},
			Spans: []span{{
				Name:  "usecase.cleanup_expired_sandboxes",
				Attrs: attrs{"sandbox.result": "error", "error.type": "store_unavailable"},
				Error: "store_unavailable",
			}},
			Metrics: []string{
				"sandbox.active.count 1",
				"sandbox.cleanup.error.total{error.type=store_unavailable reason=list_expired} 1",
			},
			Logs:    []string{"error sandbox_cleanup_failed error=store_unavailable"},
			Records: standing,
			Running: alive,
		},
	}, {
		name:  "not where the lock does not come free",
		given: and(fails("lock", scheduler.ErrLockTimeout)),
		want:  failed("lock_timeout", standing, alive, "lock"),
	}, {
		name:  "not where the intent to stop cannot be written",
		given: and(fails("write stopping", scheduler.ErrUnavailable)),
		want:  failed("store_unavailable", standing, alive, "driver.find", "driver.inspect", "write stopping", "release"),
	}, {
		name:  "not where the sandbox cannot be stopped: its record stays",
		given: and(fails("driver.stop", runtime.ErrUnavailable)),
		want:  failed("runtime_unavailable", stopping, alive, "driver.find", "driver.inspect", "write stopping", "driver.stop", "release"),
	}, {
		name:  "not where the lock is lost before the stop",
		given: and(lockLost("driver.stop")),
		want:  failed("lock_lost", stopping, alive, "driver.find", "driver.inspect", "write stopping", "driver.stop", "release"),
	}, {
		name:  "not where the record cannot be removed",
		given: and(fails("remove + release", scheduler.ErrUnavailable)),
		want:  failed("store_unavailable", stopping, nil, "driver.find", "driver.inspect", "write stopping", "driver.stop", "remove + release", "release"),
	}} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.given(tc.given...)
			res, err := w.CleanupExpired(t.Context())
			must.Eq(t, tc.want, w.outcome(cleanupResult(w, res), err))
			if tc.want.Records != nil && w.standing(chatA).Expired(w.clock.Now()) {
				w.effects.heal()
				_, err = w.CleanupExpired(t.Context())
				must.NoError(t, err, must.Sprint("the next pass tries again"))
				must.SliceEmpty(t, w.records())
				must.SliceEmpty(t, w.running())
			}
		})
	}
}

// What happens to a session between being listed and being locked is seen.
func TestCleanupExpired_looksAgainUnderTheLock(t *testing.T) {
	for _, tc := range []struct {
		name    string
		between func(*testing.T, *world, peer)
		active  string
		records []string
		running []string
	}{{
		name: "it was renewed",
		between: func(t *testing.T, w *world, other peer) {
			w.clock.advance(-1)
			_, err := other.Renew(t.Context(), chatA, time.Hour)
			must.NoError(t, err)
			w.clock.advance(1)
		},
		active:  "sandbox.active.count 1",
		records: []string{"chat-a s1 running container-1 13:29:59"},
		running: []string{"chat-a s1"},
	}, {
		name: "it was replaced",
		between: func(t *testing.T, _ *world, other peer) {
			res, err := other.Create(t.Context(), createA)
			must.NoError(t, err)
			must.Eq(t, scheduler.ResultReplaced, res.Result)
		},
		active:  "sandbox.active.count 1",
		records: []string{"chat-a unwritten running container-2 13:00:00"},
		running: []string{"chat-a unwritten"},
	}, {
		name: "it was replaced, and its successor has expired too: that one is the next pass's",
		between: func(t *testing.T, w *world, other peer) {
			short := createA
			short.TTL = scheduler.MinTTL
			_, err := other.Create(t.Context(), short)
			must.NoError(t, err)
			w.clock.advance(scheduler.MinTTL)
		},
		active:  "sandbox.active.count 1",
		records: []string{"chat-a unwritten running container-2 12:30:05"},
		running: []string{"chat-a unwritten"},
	}, {
		name: "it was deleted",
		between: func(t *testing.T, _ *world, other peer) {
			_, err := other.Delete(t.Context(), chatA)
			must.NoError(t, err)
		},
		active: "sandbox.active.count 0",
	}} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.given(created(createA), later(defaultTTL))
			other := w.peer()
			w.effects.before("lock", func() { tc.between(t, w, other) })

			res, err := w.CleanupExpired(t.Context())

			must.NoError(t, err)
			must.Zero(t, res.ErrorCount)
			w.clock.advance(time.Minute) // by when the gauge has what the peer changed
			got := w.outcome("", nil)
			must.SliceEmpty(t, res.Cleaned)
			must.Eq(t, cleanupSpans("skipped", ""), got.Spans)
			must.Eq(t, []string{tc.active}, got.Metrics, must.Sprint("a skip is not counted"))
			must.SliceEmpty(t, got.Logs)
			must.Eq(t, tc.records, got.Records)
			must.Eq(t, tc.running, got.Running)
		})
	}
}

func TestCleanupExpired_oneFailureDoesNotKeepTheOthersFromBeingCleanedUp(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA), created(createB), created(createC), later(defaultTTL))
	w.effects.hook(effect{chatB, "driver.stop"}, hook{before: func(context.Context) error { return runtime.ErrUnavailable }})

	res, err := w.CleanupExpired(t.Context())

	must.NoError(t, err)
	must.Eq(t, "chat-a s1 running container-1 12:30:00; chat-c s3 running container-3 12:30:00; errors 1", cleanupResult(w, res))
	got := w.outcome("", nil)
	pass := got.Spans[slices.IndexFunc(got.Spans, func(s span) bool { return s.Name == "usecase.cleanup_expired_sandboxes" })]
	must.Eq(t, attrs{
		"sandbox.expired_count": "3", "sandbox.cleaned_count": "2", "sandbox.error_count": "1", "sandbox.result": "completed_with_errors",
	}, pass.Attrs)
	must.Eq(t, []string{
		"sandbox.active.count 1",
		"sandbox.cleanup.error.total{error.type=runtime_unavailable} 1",
		"sandbox.cleanup.total{result=cleaned} 2",
	}, got.Metrics)
	must.Eq(t, []string{"chat-b s2 stopping container-2 12:30:00"}, got.Records)
	must.Eq(t, []string{"chat-b s2"}, got.Running)
}

func TestCleanupExpired_isNoFailureWhereItsCallerLeaves(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA), created(createB), created(createC), later(defaultTTL))
	ctx, leave := context.WithCancel(t.Context())
	w.effects.before("lock", leave)

	res, err := w.CleanupExpired(ctx)

	must.NoError(t, err)
	must.Eq(t, "errors 3", cleanupResult(w, res))
	got := w.outcome("", nil)
	must.Eq(t, []string{"sandbox.active.count 3"}, got.Metrics)
	must.SliceEmpty(t, got.Logs)
	must.Len(t, 3, got.Records)
}

func TestCleanupExpired_asksForWhatExpiredAndNothingElse(t *testing.T) {
	w := newWorld(t)
	for range 200 {
		_, err := w.Create(t.Context(), someCreate())
		must.NoError(t, err)
	}
	short := createA
	short.TTL = time.Minute
	w.given(created(short), later(time.Minute))

	_, err := w.CleanupExpired(t.Context())

	must.NoError(t, err)
	must.Eq(t, []string{"list expired", "lock", "driver.find", "driver.inspect", "write stopping", "driver.stop", "remove + release"},
		w.effects.taken(), must.Sprint("its cost does not grow with what lives"))
}

// Chats whose locks are held must not delay the cleanup of others.
func TestCleanupExpired_waitsForNoLockBeforeTheOthersAreCleanedUp(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		for range 100 {
			chat := uuid.New()
			w.given(created(createOf(chat)))
			lease, err := w.peer().locker.Lock(t.Context(), chat, 0)
			must.NoError(t, err)
			defer func() { must.NoError(t, lease.Release(t.Context())) }()
		}
		w.given(created(createA))
		pass(defaultTTL)
		done := make(chan int, 1)
		go func() {
			res, err := w.CleanupExpired(t.Context())
			must.NoError(t, err)
			done <- res.ErrorCount
		}()
		synctest.Wait() // no time passes
		session, _, err := w.store.Get(t.Context(), chatA, scheduler.Block{})
		must.NoError(t, err)
		must.Nil(t, session)
		must.Eq(t, 100, <-done)
	})
}
