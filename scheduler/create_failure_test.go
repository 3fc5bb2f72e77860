package scheduler_test

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// failedCreate is the outcome of a create of createA that fails as s1.
func failedCreate(kind string, more attrs, effects ...string) outcome {
	return outcome{
		Result:  "error " + kind,
		Effects: effects,
		Spans:   createSpan(kind, more),
		Metrics: []string{"sandbox.active.count 0", "sandbox.create.total{result=error} 1"},
		Logs:    []string{"error sandbox_create_failed chat_id=chat-a error=" + kind},
	}
}

func TestCreate_aStartThatFailsIsUndone(t *testing.T) {
	for _, failure := range []struct {
		err  error
		kind string
	}{
		{runtime.ErrNotPlaced, "not_placed"},
		{runtime.ErrNotReady, "not_ready"},
		{runtime.ErrInvalid, "runtime_invalid"},
		{runtime.ErrConflict, "sandbox_conflict"},
		{runtime.ErrUnavailable, "runtime_unavailable"},
		{context.DeadlineExceeded, "deadline_exceeded"},
		{errors.New("of no known kind"), "runtime_unavailable"},
	} {
		want := failedCreate(failure.kind, attrs{"session.id": "s1"},
			"get", "lock", "driver.find", "write creating", "driver.create", "driver.delete", "remove + release")
		for _, tc := range []createCase{{
			name:  failure.kind + ", before anything was started",
			given: []func(*world){fails("driver.create", failure.err)},
			want:  want,
		}, {
			name:  failure.kind + ", with something started",
			given: []func(*world){failsAfter("driver.create", failure.err)},
			want:  want,
		}} {
			t.Run(tc.name, tc.run)
		}
	}
}

// broken is a driver whose answers to Create break its contract.
type broken struct {
	runtime.Driver
	answer func(*runtime.Sandbox)
}

func (b broken) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	sandbox, err := b.Driver.Create(ctx, spec, progress)
	b.answer(&sandbox)
	return sandbox, err
}

func TestCreate_aDriverThatBreaksItsContractIsNotTrusted(t *testing.T) {
	for name, answer := range map[string]func(*runtime.Sandbox){
		"it answers for another session": func(s *runtime.Sandbox) { s.SessionID = chatB.String() },
		"it names no container":          func(s *runtime.Sandbox) { s.ContainerID = "" },
		"it names no address":            func(s *runtime.Sandbox) { s.Endpoint = runtime.Endpoint{Port: 80} },
		"it names no port":               func(s *runtime.Sandbox) { s.Endpoint.Port = 0 },
		"its sandbox does not run":       func(s *runtime.Sandbox) { s.State = runtime.StateDead },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(c *scheduler.Config) {
				c.Drivers = map[string]runtime.Driver{"fake": broken{c.Drivers["fake"], answer}}
			})
			_, err := w.Create(t.Context(), createA)
			must.Eq(t, failedCreate("runtime_unavailable", attrs{"session.id": "s1"}, "get", "lock",
				"write creating", "driver.create", "driver.delete", "remove + release"), w.outcome("", err))
		})
	}
}

func TestCreate_whatFailsBeforeTheStartLeavesNothing(t *testing.T) {
	for _, tc := range []createCase{{
		name:  "the record cannot be read",
		given: []func(*world){fails("get", scheduler.ErrUnavailable)},
		want:  failedCreate("store_unavailable", nil, "get"),
	}, {
		name:  "the record is damaged",
		given: []func(*world){fails("get", scheduler.ErrDamaged)},
		want:  failedCreate("damaged_record", nil, "get"),
	}, {
		name:  "the lock does not come free",
		given: []func(*world){fails("lock", scheduler.ErrLockTimeout)},
		want:  failedCreate("lock_timeout", nil, "get", "lock"),
	}, {
		name:  "the intent cannot be written",
		given: []func(*world){fails("write creating", scheduler.ErrUnavailable)},
		want: failedCreate("store_unavailable", attrs{"session.id": "s1"},
			"get", "lock", "driver.find", "write creating", "release"),
	}, {
		name:  "the lock is lost before the intent",
		given: []func(*world){lockLost("write creating")},
		want: failedCreate("lock_lost", attrs{"session.id": "s1"},
			"get", "lock", "driver.find", "write creating", "release"),
	}} {
		t.Run(tc.name, tc.run)
	}
}

func TestCreate_aSandboxWhoseSessionCannotBeSavedIsStopped(t *testing.T) {
	saved := attrs{"session.id": "s1"}
	for _, tc := range []createCase{{
		name:  "the save fails",
		given: []func(*world){fails("write running + release", scheduler.ErrUnavailable)},
		want: failedCreate("store_unavailable", saved, "get", "lock", "driver.find", "write creating", "driver.create",
			"write running + release", "write creating", "get", "driver.stop", "remove + release"),
	}} {
		t.Run(tc.name, tc.run)
	}
}

// What cannot be undone at once stays recorded, and SettleInFlight ends it.
func TestCreate_whatCannotBeUndoneIsSettled(t *testing.T) {
	begun := []string{"get", "lock", "driver.find", "write creating"}
	for _, tc := range []struct {
		name    string
		given   []func(*world)
		kind    string
		undo    string // the kind of the error of undoing
		early   bool   // before the driver is asked to start it
		effects []string
		running []string // until it is settled
	}{{
		name:    "the start fails, and so does the delete",
		given:   []func(*world){failsAfter("driver.create", runtime.ErrNotReady), fails("driver.delete", runtime.ErrUnavailable)},
		kind:    "not_ready",
		undo:    "runtime_unavailable",
		effects: []string{"driver.delete", "release"},
		running: []string{"chat-a s1"},
	}, {
		name:    "the start fails, and the intent cannot be removed",
		given:   []func(*world){failsAfter("driver.create", runtime.ErrNotReady), fails("remove + release", scheduler.ErrUnavailable)},
		kind:    "not_ready",
		undo:    "store_unavailable",
		effects: []string{"driver.delete", "remove + release", "release"},
	}, {
		name: "the save fails, and so does the stop",
		given: []func(*world){fails("write running + release", scheduler.ErrUnavailable),
			fails("driver.stop", runtime.ErrUnavailable)},
		kind:    "store_unavailable",
		undo:    "runtime_unavailable",
		effects: []string{"write running + release", "write creating", "get", "driver.stop", "release"},
		running: []string{"chat-a s1"},
	}, {
		name: "the save fails, and so does the stop, for a reason of no known kind",
		given: []func(*world){fails("write running + release", scheduler.ErrUnavailable),
			fails("driver.stop", errors.New("of no known kind"))},
		kind:    "store_unavailable",
		undo:    "runtime_unavailable",
		effects: []string{"write running + release", "write creating", "get", "driver.stop", "release"},
		running: []string{"chat-a s1"},
	}, {
		name:    "the save fails, and nobody can tell whether it was applied: nothing is stopped on doubt",
		given:   []func(*world){storeFailsFrom("write running + release")},
		kind:    "store_unavailable",
		undo:    "store_unavailable",
		effects: []string{"write running + release", "write creating", "get", "release"},
		running: []string{"chat-a s1"},
	}, {
		name:    "the save fails, and may yet be applied: nothing is stopped that others may come to be told of",
		given:   []func(*world){writesFailFrom("write running + release")},
		kind:    "store_unavailable",
		undo:    "store_unavailable",
		effects: []string{"write running + release", "write creating", "get", "release"},
		running: []string{"chat-a s1"},
	}, {
		name:    "the lock is lost before the start, and its holder has slept meanwhile",
		given:   []func(*world){lockLostUnnoticed("write creating")},
		kind:    "lock_lost",
		undo:    "lock_lost",
		early:   true,
		effects: []string{"driver.delete", "remove + release", "release"},
	}, {
		name:    "the lock is lost in mid-start",
		given:   []func(*world){lockLost("driver.create")},
		kind:    "lock_lost",
		undo:    "lock_lost",
		effects: []string{"driver.delete", "remove + release", "release"},
	}, {
		name:    "the lock is lost before the save",
		given:   []func(*world){lockLost("write running + release")},
		kind:    "lock_lost",
		undo:    "lock_lost",
		effects: []string{"write running + release", "write creating", "get", "driver.stop", "remove + release", "release"},
	}, {
		name:    "the lock is lost while the save is unanswered, so that it may yet be applied",
		given:   []func(*world){lockLost("write running + release"), writesFailFrom("write running + release")},
		kind:    "lock_lost",
		undo:    "store_unavailable",
		effects: []string{"write running + release", "write creating", "get", "release"},
		running: []string{"chat-a s1"},
	}} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.given(tc.given...)

			_, err := w.Create(t.Context(), createA)

			before := begun
			if !tc.early {
				before = append(before, "driver.create")
			}
			want := failedCreate(tc.kind, attrs{"session.id": "s1"}, slices.Concat(before, tc.effects)...)
			want.Logs = []string{
				"warn sandbox_undo_failed chat_id=chat-a session_id=s1 container_id=" + containerKnown(want.Effects) + " error=" + tc.undo,
				"error sandbox_create_failed chat_id=chat-a error=" + tc.kind,
			}
			want.Records = []string{"chat-a s1 creating  12:30:00"}
			want.Running = tc.running
			must.Eq(t, want, w.outcome("", err))

			w.effects.heal()
			must.NoError(t, w.SettleInFlight(t.Context()))
			must.Eq(t, outcome{
				Effects: []string{"list in flight", "lock", "driver.find", "driver.inspect", "driver.delete", "remove + release"},
				Metrics: []string{"sandbox.active.count 0"},
				Logs:    []string{"info sandbox_settled chat_id=chat-a session_id=s1 container_id= state=creating"},
			}, w.outcome("", nil))
		})
	}
}

// containerKnown is the container that a failed create knew of: it did once the
// start succeeded, so that the save was tried.
func containerKnown(effects []string) string {
	if slices.Contains(effects, "write running + release") {
		return "container-1"
	}
	return ""
}

// A save that was applied although its answer was lost has made a session that
// others may have been told of, so it stands.
func TestCreate_aSaveWhoseAnswerIsLostHasSaved(t *testing.T) {
	w := newWorld(t)
	other := w.peer()
	w.effects.hook(effect{Name: "write running + release"}, hook{after: func(context.Context) error {
		res, err := other.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultReused, res.Result)
		return scheduler.ErrUnavailable
	}})

	res, err := w.Create(t.Context(), createA)

	must.Eq(t, outcome{
		Result:  "created",
		Effects: []string{"get", "lock", "driver.find", "write creating", "driver.create", "write running + release", "driver.inspect", "write creating", "get"},
		Spans:   createSpan("", sessionAttrs(attrs{"sandbox.result": "created"})),
		Metrics: []string{"sandbox.active.count 1", "sandbox.create.total{result=created} 1"},
		Logs:    []string{"info sandbox_created chat_id=chat-a session_id=s1 container_id=container-1"},
		Records: []string{"chat-a s1 running container-1 12:30:00"},
		Running: []string{"chat-a s1"},
	}, w.outcome(string(res.Result), err))
}

// A session that is to be replaced is stopped, and seen to be, before anything
// else is started.
func TestCreate_aReplaceThatFailsStartsNothing(t *testing.T) {
	previous := attrs{
		"sandbox.previous_session.id":       "s1",
		"sandbox.previous_container.id":     "container-1",
		"sandbox.previous_agent.id":         "agent-1",
		"sandbox.previous_volume.host_path": "/data/a",
		"sandbox.new_session.id":            "unwritten",
	}
	expired := []func(*world){created(createA), later(defaultTTL)}
	looked := []string{"get", "driver.inspect", "lock", "driver.inspect", "driver.find"}
	for _, tc := range []struct {
		name    string
		fault   func(*world)
		kind    string
		effects []string
		record  string
		running []string
	}{
		{
			name:    "the intent to stop cannot be written",
			fault:   fails("write stopping", scheduler.ErrUnavailable),
			kind:    "store_unavailable",
			effects: []string{"driver.inspect", "write stopping", "release"},
			record:  "chat-a s1 running container-1 12:30:00",
			running: []string{"chat-a s1"},
		}, {
			name:    "the stop fails",
			fault:   fails("driver.stop", runtime.ErrUnavailable),
			kind:    "runtime_unavailable",
			effects: []string{"driver.inspect", "write stopping", "driver.stop", "release"},
			record:  "chat-a s1 stopping container-1 12:30:00",
			running: []string{"chat-a s1"},
		}, {
			name:    "the stop's answer is lost",
			fault:   failsAfter("driver.stop", runtime.ErrUnavailable),
			kind:    "runtime_unavailable",
			effects: []string{"driver.inspect", "write stopping", "driver.stop", "release"},
			record:  "chat-a s1 stopping container-1 12:30:00",
		}, {
			name:    "the lock is lost before the stop",
			fault:   lockLost("driver.stop"),
			kind:    "lock_lost",
			effects: []string{"driver.inspect", "write stopping", "driver.stop", "release"},
			record:  "chat-a s1 stopping container-1 12:30:00",
			running: []string{"chat-a s1"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.given(expired...)
			w.given(tc.fault)

			_, err := w.Create(t.Context(), createA)

			must.Eq(t, outcome{
				Result:  "error " + tc.kind,
				Effects: slices.Concat(looked, tc.effects),
				Spans:   createSpan(tc.kind, previous),
				Metrics: []string{"sandbox.active.count 1", "sandbox.create.total{result=error} 1"},
				Logs: []string{
					"info sandbox_replaced chat_id=chat-a session_id=s1 container_id=container-1 reason=",
					"error sandbox_create_failed chat_id=chat-a error=" + tc.kind,
				},
				Records: []string{tc.record},
				Running: tc.running,
			}, w.outcome("", err))
			must.Eq(t, 1, w.driver.Created())
		})
	}
}
