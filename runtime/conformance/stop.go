package conformance

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
)

func stopsForGood(f *fixture) {
	spec := f.spec()
	sandbox := f.create(spec)

	f.stop(spec)
	f.isDead(f.inspect(spec), sandbox.Endpoint)
	// It is listed until it is deleted, so that nobody forgets to.
	must.MapContainsKey(f, f.listed(spec), spec.SessionID)
	f.refusesCreate(spec)
	f.stop(spec)
	f.isDead(f.inspect(spec), sandbox.Endpoint)
}

func deletesWithoutTrace(f *fixture) {
	running, stopped := f.spec(), f.spec()
	endpoint := f.create(running).Endpoint
	f.create(stopped)
	f.stop(stopped)

	for _, spec := range []runtime.Spec{running, stopped} {
		f.delete(spec)
		f.isGone(spec)
		f.refusesCreate(spec)
		f.isGone(spec)
		f.delete(spec)
		f.stop(spec)
		f.isGone(spec)
	}
	must.False(f, answers(endpoint))
}

// stopsTheUnknown: after a crash a Stop or Delete may come before the Create
// that it is to undo. The Create must find the door shut.
func stopsTheUnknown(f *fixture) {
	stopped, deleted := f.spec(), f.spec()
	f.stop(stopped)
	f.delete(deleted)
	for _, spec := range []runtime.Spec{stopped, deleted} {
		f.refusesCreate(spec)
		f.delete(spec)
		f.isGone(spec)
	}
}

func findsNothing(f *fixture) {
	_, err := f.driver.Inspect(f.patience(), uuid.NewString())
	must.ErrorIs(f, err, runtime.ErrNotFound)
}

// letsStopOvertake: a Stop that returned has ended the sandbox for good, also
// when a Create of another caller is under way.
func letsStopOvertake(f *fixture) {
	for _, stage := range stages[:2] {
		f.sub(string(stage), func(sub *fixture) {
			spec := sub.spec()
			ctx := sub.patience()
			var stopping sync.WaitGroup
			var stopErr error
			overtake := sync.OnceFunc(func() {
				stopping.Go(func() { stopErr = sub.driver.Stop(ctx, spec.SessionID) })
			})
			created, err := sub.driver.Create(ctx, spec, func(reached runtime.Stage) {
				if reached == stage {
					overtake()
				}
			})
			overtake() // for a driver that cannot see the stage
			stopping.Wait()
			must.NoError(sub, stopErr)
			if err == nil {
				must.False(sub, answers(created.Endpoint))
			}
			sub.refusesCreate(spec)
			switch found, err := sub.driver.Inspect(ctx, spec.SessionID); {
			case errors.Is(err, runtime.ErrNotFound):
			default:
				must.NoError(sub, err)
				must.Eq(sub, runtime.StateDead, found.State)
			}
			sub.delete(spec)
			sub.isGone(spec)
		})
	}
}

func endsAListEarly(f *fixture) {
	f.create(f.spec())
	f.create(f.spec())
	seen := 0
	for _, err := range f.driver.List(f.patience()) {
		must.NoError(f, err)
		seen++
		break
	}
	must.Eq(f, 1, seen)
}

func seesADeath(f *fixture) {
	spec := f.spec()
	sandbox := f.create(spec)
	f.harness.Kill(f.T, sandbox)
	f.isDead(f.eventuallyDead(spec), sandbox.Endpoint)
	f.stop(spec)
	f.delete(spec)
	f.isGone(spec)
}

// eventuallyDead asks until the sandbox is seen dead, for as long as patience
// lasts.
func (f *fixture) eventuallyDead(spec runtime.Spec) runtime.Sandbox {
	f.Helper()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for ctx := f.patience(); ; {
		sandbox := f.inspect(spec)
		if sandbox.State == runtime.StateDead {
			return sandbox
		}
		select {
		case <-ctx.Done():
			must.NoError(f, ctx.Err(), must.Sprintf("still %s", sandbox.State))
		case <-again.C:
		}
	}
}

func reportsADeath(f *fixture) {
	info, err := f.driver.Info(f.patience())
	must.NoError(f, err)
	watcher, ok := f.driver.(runtime.Watcher)
	if !ok || !slices.Contains(runtime.Abilities(f.driver, info), runtime.AbilityWatch) {
		return // it has promised no reports
	}
	spec := f.spec()
	ctx, cancel := context.WithCancel(f.patience())
	reports := make(chan runtime.Sandbox)
	ended := make(chan error, 1)
	go func() {
		ended <- watcher.Watch(ctx, func(changed runtime.Sandbox) {
			select {
			case reports <- changed:
			case <-ctx.Done():
			}
		})
	}()
	sandbox := f.create(spec)
	f.harness.Kill(f.T, sandbox)
	for reported := false; !reported; {
		select {
		case changed := <-reports:
			reported = changed.SessionID == spec.SessionID && changed.State == runtime.StateDead
		case <-ctx.Done():
			must.NoError(f, ctx.Err())
		}
	}
	cancel()
	must.ErrorIs(f, <-ended, context.Canceled)
}

// outlivesARestart: what a driver knew it knows again.
func outlivesARestart(f *fixture) {
	running, stopped, deleted, unknown := f.spec(), f.spec(), f.spec(), f.spec()
	sandbox := f.create(running)
	f.create(stopped)
	f.stop(stopped)
	f.create(deleted)
	f.delete(deleted)
	f.stop(unknown)

	f.driver = f.harness.Reopen(f.T, f.driver)
	must.Eq(f, sandbox, f.inspect(running))
	must.Eq(f, sandbox, f.create(running))
	f.runs(running, sandbox)
	must.Eq(f, runtime.StateDead, f.inspect(stopped).State)
	for _, spec := range []runtime.Spec{stopped, deleted, unknown} {
		f.refusesCreate(spec)
	}
	f.stop(running)
	f.isDead(f.inspect(running), sandbox.Endpoint)
	f.delete(running)
	f.isGone(running)
}
