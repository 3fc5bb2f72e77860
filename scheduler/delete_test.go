package scheduler_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// deleteSpan is the span of a delete on chat A, with more attributes.
func deleteSpan(failed string, more attrs) []span {
	all := attrs{"chat.id": "chat-a"}
	maps.Copy(all, more)
	if failed != "" {
		all["sandbox.result"] = "error"
		all["error.type"] = failed
	}
	return []span{{Name: "usecase.delete_sandbox", Attrs: all, Error: failed}}
}

func TestDelete(t *testing.T) {
	deleted := outcome{
		Result:  "deleted s1 container-1",
		Effects: []string{"lock", "driver.find", "driver.inspect", "write stopping", "driver.delete", "remove + release"},
		Spans:   deleteSpan("", sessionAttrs(attrs{"sandbox.result": "deleted"})),
		Metrics: []string{"sandbox.active.count 0", "sandbox.delete.total{result=deleted} 1"},
		Logs:    []string{"info sandbox_deleted chat_id=chat-a session_id=s1 container_id=container-1"},
	}
	resumed := deleted
	resumed.Effects = []string{"lock", "driver.find", "driver.inspect", "driver.delete", "remove + release"}

	silent := deleted
	silent.Effects = []string{"lock", "driver.find", "driver.inspect", "write stopping", "driver.answers", "remove + release"}

	failed := func(kind string, span attrs, effects ...string) outcome {
		o := outcome{
			Result:  "error " + kind,
			Effects: effects,
			Spans:   deleteSpan(kind, span),
			Metrics: []string{"sandbox.active.count 1", "sandbox.delete.total{result=error} 1"},
			Logs:    []string{"error sandbox_delete_failed chat_id=chat-a session_id=s1 container_id=container-1 error=" + kind},
			Records: []string{"chat-a s1 stopping container-1 12:30:00"},
			Running: []string{"chat-a s1"},
		}
		return o
	}
	unlocked := failed("lock_timeout", nil, "lock")
	unlocked.Logs = []string{"error sandbox_delete_failed chat_id=chat-a error=lock_timeout"}
	unlocked.Records = []string{"chat-a s1 running container-1 12:30:00"}
	unmarked := failed("store_unavailable", sessionAttrs(nil), "lock", "driver.find", "driver.inspect", "write stopping", "release")
	unmarked.Records = unlocked.Records
	unremoved := failed("store_unavailable", sessionAttrs(nil), "lock", "driver.find", "driver.inspect", "write stopping", "driver.delete", "remove + release", "release")
	unremoved.Running = nil

	for _, tc := range []struct {
		name  string
		given []func(*world)
		want  outcome
	}{{
		name: "no session stands",
		want: outcome{
			Result:  "not_found",
			Effects: []string{"lock", "driver.find", "release"},
			Spans:   deleteSpan("", attrs{"sandbox.result": "not_found"}),
			Metrics: []string{"sandbox.active.count 0", "sandbox.delete.total{result=not_found} 1"},
			Logs:    []string{"info sandbox_delete_not_found chat_id=chat-a"},
		},
	}, {
		name:  "a session stands",
		given: []func(*world){created(createA)},
		want:  deleted,
	}, {
		name:  "it has expired",
		given: []func(*world){created(createA), later(defaultTTL)},
		want:  deleted,
	}, {
		name:  "its sandbox is dead",
		given: []func(*world){created(createA), killed("exit code 1")},
		want:  deleted,
	}, {
		name:  "its sandbox is lost: it is stopped all the same",
		given: []func(*world){created(createA), lost("node down")},
		want:  deleted,
	}, {
		name:  "the runtime no longer knows its sandbox, which does not answer: no session ID is used up",
		given: []func(*world){created(createA), forgotten},
		want:  silent,
	}, {
		name:  "somebody began to stop it and is gone",
		given: []func(*world){created(createA), abandonedStop},
		want:  resumed,
	}, {
		name:  "the lock does not come free",
		given: []func(*world){created(createA), fails("lock", scheduler.ErrLockTimeout)},
		want:  unlocked,
	}, {
		name:  "the intent to stop cannot be written: nothing is stopped",
		given: []func(*world){created(createA), fails("write stopping", scheduler.ErrUnavailable)},
		want:  unmarked,
	}, {
		name:  "the sandbox cannot be stopped: its record stays",
		given: []func(*world){created(createA), fails("driver.delete", runtime.ErrUnavailable)},
		want:  failed("runtime_unavailable", sessionAttrs(nil), "lock", "driver.find", "driver.inspect", "write stopping", "driver.delete", "release"),
	}, {
		name:  "the lock is lost before the stop",
		given: []func(*world){created(createA), lockLost("driver.delete")},
		want:  failed("lock_lost", sessionAttrs(nil), "lock", "driver.find", "driver.inspect", "write stopping", "driver.delete", "release"),
	}, {
		name:  "the record cannot be removed",
		given: []func(*world){created(createA), fails("remove + release", scheduler.ErrUnavailable)},
		want:  unremoved,
	}} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.given(tc.given...)

			res, err := w.Delete(t.Context(), chatA)

			result := "not_found"
			if res.Found {
				result = w.name("deleted " + res.SessionID.String() + " " + res.ContainerID)
			}
			must.Eq(t, tc.want, w.outcome(result, err))
			if err == nil {
				must.Eq(t, chatA, res.ChatID)
				return
			}
			w.effects.heal()
			_, err = w.Delete(t.Context(), chatA)
			must.NoError(t, err, must.Sprint("a delete may be repeated"))
			must.SliceEmpty(t, w.records())
			must.SliceEmpty(t, w.running())
		})
	}
}

func TestDelete_concernsItsChatAlone(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA), created(scheduler.CreateCommand{ChatID: chatB, AgentID: "agent-1", VolumeHostPath: "/data/a"}))

	_, err := w.Delete(t.Context(), chatA)

	must.NoError(t, err)
	must.Eq(t, []string{"chat-b s2 running container-2 12:30:00"}, w.records())
	must.Eq(t, []string{"chat-b s2"}, w.running())
}

func TestDelete_aCallerWhoGoesAwayDoesNotStopIt(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA))
	ctx, leave := context.WithCancel(t.Context())
	w.effects.before("driver.delete", leave)

	_, err := w.Delete(ctx, chatA)

	must.NoError(t, err)
	must.SliceEmpty(t, w.records())
	must.SliceEmpty(t, w.running())
}

func TestDelete_ofAnAbandonedStartEndsIt(t *testing.T) {
	w := newWorld(t)
	w.given(abandonedStart)

	res, err := w.Delete(t.Context(), chatA)

	must.NoError(t, err)
	must.True(t, res.Found)
	must.Eq(t, []string{"lock", "driver.find", "driver.inspect", "driver.delete", "remove + release"}, w.effects.taken())
	must.SliceEmpty(t, w.records())
	must.SliceEmpty(t, w.running())
}

// A stop that comes to no end leaves in the record what it waits for, for those
// who ask how the chat stands.
func TestDelete_ofWhatDoesNotEndSaysWhatItWaitsFor(t *testing.T) {
	const why = `task "cleanup" runs since 12:00`
	for _, tc := range []struct {
		name  string
		given []func(*world)
		stop  func(*world) error
	}{
		{"by a delete", []func(*world){created(createA)}, func(w *world) error {
			_, err := w.Delete(t.Context(), chatA)
			return err
		}},
		{"by a create that replaces a session", []func(*world){created(createA), later(defaultTTL)}, func(w *world) error {
			_, err := w.Create(t.Context(), createA)
			return err
		}},
		{"by another replica that goes on with it", []func(*world){created(createA), abandonedStop}, func(w *world) error {
			return errors.Join(w.SettleInFlight(t.Context()), runtime.ErrNotStopped) // it only logs what fails for a chat
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.given(tc.given...)
			for _, call := range []string{"driver.delete", "driver.stop"} {
				w.effects.fail(call, fmt.Errorf("%w: %s", runtime.ErrNotStopped, why))
			}

			must.Eq(t, "not_stopped", scheduler.Kind(tc.stop(w)))

			session, _, err := w.Get(t.Context(), chatA, scheduler.Block{})
			must.NoError(t, err)
			must.Eq(t, scheduler.StateStopping, session.State)
			must.Eq(t, "sandbox has not ended yet: "+why, session.Reason)

			w.effects.heal()
			_, err = w.Delete(t.Context(), chatA)
			must.NoError(t, err)
			must.SliceEmpty(t, w.records())
		})
	}
}

// So does the undoing of a start.
func TestCreate_ofWhatCannotBeUndoneSaysWhatItWaitsFor(t *testing.T) {
	w := newWorld(t)
	w.effects.fail("driver.create", runtime.ErrNotReady)
	w.effects.fail("driver.delete", fmt.Errorf("%w: its image is pulled", runtime.ErrNotStopped))

	_, err := w.Create(t.Context(), createA)

	must.Eq(t, "not_ready", scheduler.Kind(err))
	session, _, err := w.Get(t.Context(), chatA, scheduler.Block{})
	must.NoError(t, err)
	must.Eq(t, scheduler.StateCreating, session.State)
	must.Eq(t, "sandbox has not ended yet: its image is pulled", session.Reason)
}

// Who lost the lock writes nothing, also not what it waited for.
func TestDelete_thatLosesTheLockWhileItWaitsLeavesTheRecord(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA))
	w.effects.hook(effect{Name: "driver.delete"}, hook{before: func(ctx context.Context) error {
		w.locker.End()
		<-ctx.Done()
		return fmt.Errorf("%w: it takes its time", runtime.ErrNotStopped)
	}})

	_, err := w.Delete(t.Context(), chatA)

	must.Eq(t, "lock_lost", scheduler.Kind(err))
	session, _, err := w.Get(t.Context(), chatA, scheduler.Block{})
	must.NoError(t, err)
	must.Eq(t, "", session.Reason)
}
