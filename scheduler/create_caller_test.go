package scheduler_test

import (
	"context"
	"reflect"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

func TestCreate_aCallerWhoGoesAwayInMidStartDoesNotStopIt(t *testing.T) {
	w := newWorld(t)
	ctx, leave := context.WithCancel(t.Context())
	w.effects.before("driver.create", leave)

	_, err := w.Create(ctx, createA)

	got := w.outcome("", err)
	must.Eq(t, []string{"chat-a s1 running container-1 12:30:00"}, got.Records)
	must.Eq(t, []string{"chat-a s1"}, got.Running)
	must.Eq(t, []string{"sandbox.active.count 1", "sandbox.create.total{result=created} 1"}, got.Metrics)
	must.Eq(t, []string{"info sandbox_created chat_id=chat-a session_id=s1 container_id=container-1"}, got.Logs)
}

func TestCreate_aCallerWhoGoesAwayInMidStartDoesNotKeepAFailedOneFromBeingUndone(t *testing.T) {
	w := newWorld(t)
	ctx, leave := context.WithCancel(t.Context())
	w.effects.hook(effect{Name: "driver.create"}, hook{after: func(context.Context) error {
		leave()
		return runtime.ErrNotReady
	}})

	_, err := w.Create(ctx, createA)

	must.Eq(t, failedCreate("not_ready", attrs{"session.id": "s1"}, "get", "lock", "driver.find", "write creating",
		"driver.create", "driver.delete", "remove + release"), w.outcome("", err))
}

func TestCreate_aCallerWhoGoesAwayBeforeTheLockLeavesNothing(t *testing.T) {
	w := newWorld(t)
	ctx, leave := context.WithCancel(t.Context())
	w.effects.before("lock", leave)

	_, err := w.Create(ctx, createA)

	must.Eq(t, failedCreate("canceled", nil, "get", "lock"), w.outcome("", err))
}

func TestCreate_tellsTheTimesThatAreOnRecord(t *testing.T) {
	w := newWorld(t, func(c *scheduler.Config) { c.Now = time.Now })

	res, err := w.Create(t.Context(), createA)
	must.NoError(t, err)
	must.True(t, reflect.DeepEqual(w.standing(chatA), res.Session), must.Sprint("also the form of the times"))

	session, err := w.Renew(t.Context(), chatA, maxTTL)
	must.NoError(t, err)
	must.True(t, reflect.DeepEqual(w.standing(chatA), session))
}

func TestCreate_tellsTheStagesOfAStart(t *testing.T) {
	w := newWorld(t)
	var stages []runtime.Stage
	cmd := createA
	cmd.Progress = func(s runtime.Stage) { stages = append(stages, s) }

	_, err := w.Create(t.Context(), cmd)
	must.NoError(t, err)
	must.Eq(t, []runtime.Stage{runtime.StagePlaced, runtime.StageStarted, runtime.StageReady}, stages)

	_, err = w.Create(t.Context(), cmd)
	must.NoError(t, err)
	must.Len(t, 3, stages, must.Sprint("a reuse has no stages"))
}

func TestCreate_ofARuntimeThatThisReplicaDoesNotHave(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA))
	other := newWorld(t, func(c *scheduler.Config) {
		c.Store, c.Locker = w.store, w.locker
		c.Drivers, c.DefaultRuntime = map[string]runtime.Driver{"other": fakeruntime.New("other")}, "other"
	})

	t.Run("it is reused on its record's word", func(t *testing.T) {
		res, err := other.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultReused, res.Result)
	})
	t.Run("it cannot be replaced", func(t *testing.T) {
		other.clock.advance(defaultTTL)
		_, err := other.Create(t.Context(), createA)
		must.ErrorIs(t, err, runtime.ErrUnavailable)
		must.Eq(t, []string{"chat-a s1"}, w.running())
	})
}

// busyLimit is how many sandboxes one replica starts at a time.
const busyLimit = 128

func TestCreate_refusesMoreStartsThanAReplicaMakesAtATime(t *testing.T) {
	w := newWorld(t)
	begun, finish := make(chan struct{}), make(chan struct{})
	w.driver.Intercept(func(_ context.Context, call fakeruntime.Call) error {
		if call.Op == fakeruntime.OpCreate && call.Moment == fakeruntime.Before {
			begun <- struct{}{}
			<-finish
		}
		return nil
	})
	results := make(chan error)
	for range busyLimit {
		go func() {
			_, err := w.Create(context.Background(), someCreate())
			results <- err
		}()
	}
	for range busyLimit {
		<-begun
	}

	_, err := w.Create(t.Context(), createA)
	must.ErrorIs(t, err, scheduler.ErrBusy)
	must.Eq(t, "busy", scheduler.Kind(err))

	close(finish)
	for range busyLimit {
		must.NoError(t, <-results)
	}
	w.driver.Intercept(nil)
	_, err = w.Create(t.Context(), createA)
	must.NoError(t, err, must.Sprint("there is room again"))
	must.Eq(t, busyLimit+1, w.driver.Created())
}
