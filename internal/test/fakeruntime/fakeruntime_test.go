package fakeruntime_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
)

func newSpec() runtime.Spec {
	return runtime.Spec{
		SessionID: uuid.NewString(), ChatID: uuid.NewString(), AgentID: "agent-1", VolumeHostPath: "/data/a",
	}
}

func ignore(runtime.Stage) {}

func TestDriver_keepsTheContract(t *testing.T) {
	ctx := t.Context()
	d, spec := fakeruntime.New("fake"), newSpec()

	made, err := d.Create(ctx, spec, ignore)
	must.NoError(t, err)
	must.True(t, made.Endpoint.IsValid())

	again, err := d.Create(ctx, spec, ignore)
	must.NoError(t, err)
	must.Eq(t, made, again)
	must.Eq(t, []runtime.Sandbox{made}, d.Running())

	other := spec
	other.AgentID = "agent-2"
	_, err = d.Create(ctx, other, ignore)
	must.ErrorIs(t, err, runtime.ErrConflict)

	for range 2 {
		must.NoError(t, d.Stop(ctx, spec.SessionID))
		must.SliceEmpty(t, d.Running())
		seen, err := d.Inspect(ctx, spec.SessionID)
		must.NoError(t, err)
		must.Eq(t, runtime.StateDead, seen.State)
	}
	_, err = d.Create(ctx, spec, ignore)
	must.ErrorIs(t, err, runtime.ErrConflict)

	for range 2 {
		must.NoError(t, d.Delete(ctx, spec.SessionID))
		_, err = d.Inspect(ctx, spec.SessionID)
		must.ErrorIs(t, err, runtime.ErrNotFound)
	}
	for listed, err := range d.List(ctx) {
		t.Fatalf("a deleted sandbox is listed: %v, %v", listed, err)
	}
}

func TestDriver_aStopOvertakesACreate(t *testing.T) {
	for name, end := range map[string]func(*fakeruntime.Driver, context.Context, string) error{
		"stop": (*fakeruntime.Driver).Stop, "delete": (*fakeruntime.Driver).Delete,
	} {
		t.Run(name, func(t *testing.T) {
			d, spec := fakeruntime.New("fake"), newSpec()
			must.NoError(t, end(d, t.Context(), spec.SessionID))
			_, err := d.Create(t.Context(), spec, ignore)
			must.ErrorIs(t, err, runtime.ErrConflict)
			must.SliceEmpty(t, d.Running())
		})
	}
}

func TestDriver_failsBeforeOrAfterItsEffect(t *testing.T) {
	injected := errors.New("injected")
	for _, tc := range []struct {
		moment fakeruntime.Moment
		runs   int // after a failed create
		left   int // after a failed stop of a running one
	}{
		{fakeruntime.Before, 0, 1},
		{fakeruntime.After, 1, 0},
	} {
		d := fakeruntime.New("fake")
		d.Intercept(fakeruntime.Fail(fakeruntime.OpCreate, tc.moment, injected))
		_, err := d.Create(t.Context(), newSpec(), ignore)
		must.ErrorIs(t, err, injected)
		must.Len(t, tc.runs, d.Running())

		d = fakeruntime.New("fake")
		made := d.Plant(newSpec())
		d.Intercept(fakeruntime.Fail(fakeruntime.OpStop, tc.moment, injected))
		must.ErrorIs(t, d.Stop(t.Context(), made.SessionID), injected)
		must.Len(t, tc.left, d.Running())
	}
}

func TestDriver_theLedgerTellsWhatRuns(t *testing.T) {
	d, spec := fakeruntime.New("fake"), newSpec()
	first := d.Plant(spec)
	d.Lose(first.SessionID, "node down")
	must.Len(t, 1, d.Running(), must.Sprint("what is lost may run, and here it does"))
	must.Eq(t, 1, d.MostPerChat())

	second := newSpec()
	second.ChatID = spec.ChatID
	d.Plant(second)
	must.Eq(t, 2, d.MostPerChat())

	d.Kill(first.SessionID, "exit code 1")
	d.Forget(second.SessionID)
	must.SliceEmpty(t, d.Running())
	must.Eq(t, 2, d.MostPerChat(), must.Sprint("it remembers"))
	must.Eq(t, 2, d.Created())
}

func TestDriver_watchersAreToldOfChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := fakeruntime.New("fake")
		made := d.Plant(newSpec())
		ctx, cancel := context.WithCancel(t.Context())
		var seen []string
		ended := make(chan error, 1)
		go func() {
			ended <- d.Watch(ctx, func(s runtime.Sandbox) { seen = append(seen, string(s.State)+" "+s.Reason) })
		}()
		for _, change := range []func(){
			func() { d.Lose(made.SessionID, "node down") },
			func() { d.Regain(made.SessionID) },
			func() { must.NoError(t, d.Stop(t.Context(), made.SessionID)) },
			func() { must.NoError(t, d.Stop(t.Context(), made.SessionID)) }, // no change
			func() { must.NoError(t, d.Delete(t.Context(), made.SessionID)) },
		} {
			synctest.Wait()
			change()
		}
		synctest.Wait()
		cancel()
		must.ErrorIs(t, <-ended, context.Canceled)
		must.Eq(t, []string{"lost node down", "running ", "dead stopped", "dead deleted"}, seen)
	})
}
