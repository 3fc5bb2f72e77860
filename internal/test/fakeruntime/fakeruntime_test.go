package fakeruntime_test

import (
	"context"
	"errors"
	"strings"
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

// newSpare returns the spec of a spare, and that of a chat that claims it.
func newSpare() (spare, claim runtime.Spec) {
	claim = newSpec()
	return runtime.Spec{SessionID: claim.SessionID, Pool: "pool"}, claim
}

func TestDriver_givesASpareToOneChat(t *testing.T) {
	d, ctx := fakeruntime.New("fake"), t.Context()
	spare, claim := newSpare()
	made, err := d.Create(ctx, spare, ignore)
	must.NoError(t, err)
	must.Eq(t, "pool", made.Pool)
	must.Eq(t, "", made.ChatID)
	d.Plant(runtime.Spec{SessionID: uuid.NewString(), Pool: "pool"})
	must.Eq(t, 0, d.MostPerChat(), must.Sprint("spares are of no chat"))

	want := made
	want.ChatID, want.AgentID, want.VolumeHostPath = claim.ChatID, claim.AgentID, claim.VolumeHostPath
	for range 2 {
		claimed, err := d.Claim(ctx, claim)
		must.NoError(t, err)
		must.Eq(t, want, claimed)
	}
	seen, err := d.Inspect(ctx, claim.SessionID)
	must.NoError(t, err)
	must.Eq(t, want, seen)
	found, err := d.FindChat(ctx, claim.ChatID, "")
	must.NoError(t, err)
	must.Eq(t, []runtime.Sandbox{want}, found)
	must.Eq(t, 1, d.MostPerChat())

	other := newSpec()
	other.SessionID = claim.SessionID
	_, err = d.Claim(ctx, other)
	must.ErrorIs(t, err, runtime.ErrConflict)
	must.Eq(t, 2, d.Created())
}

func TestDriver_refusesClaims(t *testing.T) {
	for name, test := range map[string]struct {
		spoil func(*fakeruntime.Driver, *runtime.Spec)
		want  error
	}{
		"of nothing": {func(d *fakeruntime.Driver, claim *runtime.Spec) { claim.SessionID = uuid.NewString() }, runtime.ErrNotFound},
		"of a chat's sandbox": {func(d *fakeruntime.Driver, claim *runtime.Spec) {
			claim.SessionID = d.Plant(newSpec()).SessionID
		}, runtime.ErrConflict},
		"of a stopped spare": {func(d *fakeruntime.Driver, claim *runtime.Spec) {
			must.NoError(t, d.Stop(t.Context(), claim.SessionID))
		}, runtime.ErrConflict},
		"of a dead spare": {func(d *fakeruntime.Driver, claim *runtime.Spec) { d.Kill(claim.SessionID, "") }, runtime.ErrNotReady},
		"of a lost spare": {func(d *fakeruntime.Driver, claim *runtime.Spec) { d.Lose(claim.SessionID, "") }, runtime.ErrNotReady},
		"with another access token": {func(_ *fakeruntime.Driver, claim *runtime.Spec) {
			claim.AccessToken = runtime.Secret(strings.Repeat("a", 64))
		}, runtime.ErrConflict},
		"for a pool":  {func(_ *fakeruntime.Driver, claim *runtime.Spec) { *claim, _ = newSpare() }, runtime.ErrInvalid},
		"for no chat": {func(_ *fakeruntime.Driver, claim *runtime.Spec) { claim.ChatID = "" }, runtime.ErrInvalid},
		"when the test injects that": {func(d *fakeruntime.Driver, _ *runtime.Spec) {
			d.Intercept(fakeruntime.Fail(fakeruntime.OpClaim, fakeruntime.Before, runtime.ErrConflict))
		}, runtime.ErrConflict},
	} {
		t.Run(name, func(t *testing.T) {
			d := fakeruntime.New("fake")
			spare, claim := newSpare()
			d.Plant(spare)
			chat := claim.ChatID
			test.spoil(d, &claim)
			_, err := d.Claim(t.Context(), claim)
			must.ErrorIs(t, err, test.want)
			found, err := d.FindChat(t.Context(), chat, "")
			must.NoError(t, err)
			must.SliceEmpty(t, found)
		})
	}
}

func TestDriver_claimsAlthoughTheAnswerGetsLost(t *testing.T) {
	d := fakeruntime.New("fake")
	spare, claim := newSpare()
	d.Plant(spare)
	d.Intercept(fakeruntime.Fail(fakeruntime.OpClaim, fakeruntime.After, context.DeadlineExceeded))
	_, err := d.Claim(t.Context(), claim)
	must.ErrorIs(t, err, context.DeadlineExceeded)
	must.Eq(t, claim.ChatID, d.Running()[0].ChatID)
}
