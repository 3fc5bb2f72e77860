package conformance

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/bivouac/bivouac/runtime"
)

// soon returns how long a call may still take after its context has ended: 10
// seconds if the limit is a minute. The contract allows one second; the rest is
// for slow machines.
func (f *fixture) soon() time.Duration { return f.limit() / 6 }

// leavesNothingOfTheGivenUp checks that a caller may give up a Create at any
// stage, and that a Delete then leaves nothing.
func leavesNothingOfTheGivenUp(f *fixture) {
	f.sub("before it began", func(sub *fixture) {
		ctx, cancel := context.WithCancel(sub.patience())
		cancel()
		sub.givesUp(ctx, ignore)
	})
	for _, stage := range stages {
		f.sub("when it was "+string(stage), func(sub *fixture) {
			ctx, cancel := context.WithCancel(sub.patience())
			defer cancel()
			sub.givesUp(ctx, func(reached runtime.Stage) {
				if reached == stage {
					cancel()
				}
			})
		})
	}
}

func (f *fixture) givesUp(ctx context.Context, progress func(runtime.Stage)) {
	spec := f.spec()
	// It may also have succeeded before that.
	if _, err := f.driver.Create(ctx, spec, progress); err != nil {
		f.isError(err, context.Canceled, "Create whose context ended")
	}
	f.deleteAtOnce(spec)
	f.isGone(spec)
	f.refusesCreate(spec)
}

// deleteAtOnce deletes what a Create that was given up has begun. Over RPC, a
// call returns when its context ends, whatever the driver does. A driver that
// does not notice this is found out if the Delete has to wait for the Create.
// Otherwise it cannot be told from a driver that does notice.
func (f *fixture) deleteAtOnce(spec runtime.Spec) {
	began := time.Now()
	f.delete(spec)
	took := time.Since(began)
	f.require(took < 3*f.soon(), "Delete after a Create that was given up took %s", took.Round(time.Millisecond))
}

// letsStopOvertake checks that a Stop that has returned has ended the sandbox
// for good, even if a Create of another caller was in progress.
func letsStopOvertake(f *fixture) {
	for _, stage := range stages[:2] {
		f.sub("when it was "+string(stage), func(sub *fixture) {
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
			overtake() // for a driver that does not report the stage
			stopping.Wait()
			sub.noError(stopErr, "Stop during a Create")
			sub.hasEnded(spec)
			if err == nil {
				sub.isSilent(spec.SessionID, created.Endpoint)
			}
			sub.refusesCreate(spec)
			found, err := sub.driver.Inspect(ctx, spec.SessionID)
			if !errors.Is(err, runtime.ErrNotFound) {
				sub.noError(err, "Inspect after a Stop")
				same(sub, runtime.StateDead, found.State, "the state of a sandbox that was stopped")
			}
			sub.delete(spec)
			sub.isGone(spec)
		})
	}
}

// outlivesARestart checks that a driver still knows everything after a restart.
func outlivesARestart(f *fixture) {
	running, stopped, deleted, unknown := f.spec(), f.spec(), f.spec(), f.spec()
	sandbox := f.create(running)
	f.create(stopped)
	f.stop(stopped)
	f.create(deleted)
	f.delete(deleted)
	f.stop(unknown)

	var err error
	f.driver, err = f.harness.Reopen(f.ctx, f.driver)
	f.noError(err, "restart the driver")
	same(f, sandbox, f.inspect(running), "what Inspect shows after a restart")
	same(f, sandbox, f.listed(running)[running.SessionID], "what List shows after a restart")
	same(f, sandbox, f.create(running), "what a repeated Create returns after a restart")
	f.runs(running, sandbox)
	same(f, runtime.StateDead, f.inspect(stopped).State, "the state of a stopped sandbox after a restart")
	for _, spec := range []runtime.Spec{stopped, deleted, unknown} {
		f.refusesCreate(spec)
	}
	f.stop(running)
	f.isDead(f.inspect(running), sandbox.Endpoint)
	f.delete(running)
	f.isGone(running)
}

// diesInACreate kills the driver at each stage. After that, the Create is
// either repeated or undone.
func diesInACreate(f *fixture) {
	for _, stage := range stages {
		f.sub("when it was "+string(stage)+", then repeated", func(sub *fixture) {
			spec := sub.spec()
			sub.dies(spec, stage)
			sandbox, err := sub.driver.Create(sub.patience(), spec, ignore)
			if err == nil {
				sub.runs(spec, sandbox)
				same(sub, sandbox, sub.listed(spec)[spec.SessionID], "what List shows")
			}
			sub.delete(spec)
			sub.isGone(spec)
			if err == nil {
				sub.isSilent(spec.SessionID, sandbox.Endpoint)
			}
		})
		f.sub("when it was "+string(stage)+", then deleted", func(sub *fixture) {
			spec := sub.spec()
			created := sub.dies(spec, stage)
			// Either it is found, or it was undone.
			found, err := sub.driver.Inspect(sub.patience(), spec.SessionID)
			if !errors.Is(err, runtime.ErrNotFound) {
				sub.noError(err, "Inspect after a crash")
			}
			sub.delete(spec)
			sub.isGone(spec)
			sub.refusesCreate(spec)
			for _, endpoint := range []runtime.Endpoint{created.Endpoint, found.Endpoint} {
				if endpoint.IsValid() {
					sub.isSilent(spec.SessionID, endpoint)
				}
			}
		})
	}
}

// dies kills the driver when a Create has reached the stage or has returned.
func (f *fixture) dies(spec runtime.Spec, stage runtime.Stage) runtime.Sandbox {
	var dying sync.WaitGroup
	var after runtime.Driver
	var crashErr error
	before := f.driver
	crash := sync.OnceFunc(func() {
		dying.Go(func() { after, crashErr = f.harness.Crash(f.ctx, before) })
	})
	// It may succeed or fail.
	created, _ := before.Create(f.patience(), spec, func(reached runtime.Stage) {
		if reached == stage {
			crash()
		}
	})
	crash()
	dying.Wait()
	f.noError(crashErr, "kill the driver")
	f.driver = after
	return created
}

func tellsOfFailure(f *fixture) {
	f.with(f.harness.Failing, orderExit, func(sub *fixture) {
		spec := sub.spec()
		_, err := sub.driver.Create(sub.patience(), spec, ignore)
		sub.isError(err, runtime.ErrNotReady, "Create of a sandbox that fails")
		found, err := sub.driver.Inspect(sub.patience(), spec.SessionID)
		if !errors.Is(err, runtime.ErrNotFound) {
			sub.noError(err, "Inspect of a sandbox that failed")
			sub.require(found.State != runtime.StateRunning, "Inspect says that a sandbox runs that has failed")
		}
		sub.delete(spec)
		sub.isGone(spec)
		sub.refusesCreate(spec)
	})
}

// givesUpTheSlow checks that a sandbox that runs but does not answer blocks no
// call.
func givesUpTheSlow(f *fixture) {
	f.with(f.harness.Slow, orderHang, func(sub *fixture) {
		spec := sub.spec()
		ctx, cancel := context.WithTimeout(sub.ctx, sub.limit()/60)
		defer cancel()
		_, err := sub.driver.Create(ctx, spec, ignore)
		sub.isError(err, context.DeadlineExceeded, "Create of a sandbox that does not answer")
		deadline, _ := ctx.Deadline()
		late := time.Since(deadline)
		sub.require(late < sub.soon(), "Create returned %s after its context had ended", late.Round(time.Millisecond))
		if _, err := sub.driver.Inspect(sub.patience(), spec.SessionID); !errors.Is(err, runtime.ErrNotFound) {
			// It may be running: a driver without a memory cannot tell whether
			// the sandbox was ever ready.
			sub.noError(err, "Inspect of a sandbox that does not answer")
		}
		sub.deleteAtOnce(spec)
		sub.isGone(spec)
	})
}

// passesOverTheForeign checks that a driver neither shows nor touches a sandbox
// of another Bivouac, even if it is given that sandbox's session ID.
func passesOverTheForeign(f *fixture) {
	f.with(f.harness.Foreign, orderRun, func(foreign *fixture) {
		spec := foreign.spec()
		sandbox := foreign.create(spec)
		f.require(len(f.listed(spec)) == 0, "List shows a sandbox of another Bivouac")
		if _, err := f.driver.Inspect(f.patience(), spec.SessionID); !errors.Is(err, runtime.ErrConflict) {
			f.isError(err, runtime.ErrNotFound, "Inspect of a sandbox of another Bivouac")
		}
		// A driver may keep its sandboxes completely apart from all others. It
		// then creates its own, which gets its own volume.
		own := spec
		own.VolumeHostPath = foreign.volume()
		made, err := f.driver.Create(f.patience(), own, ignore)
		if err == nil {
			f.require(made.Endpoint != sandbox.Endpoint, "Create returned a sandbox of another Bivouac")
		} else {
			f.isError(err, runtime.ErrConflict, "Create with the session ID of a sandbox of another Bivouac")
		}
		for _, end := range []func(context.Context, string) error{f.driver.Stop, f.driver.Delete} {
			if err := end(f.patience(), spec.SessionID); err != nil {
				f.isError(err, runtime.ErrConflict, "Stop or Delete of a sandbox of another Bivouac")
			}
			same(f, sandbox, foreign.inspect(spec), "a sandbox of another Bivouac after a Stop or Delete")
			foreign.runs(spec, sandbox)
		}
	})
}

// with runs a part of the check on another driver. If there is none, it uses
// the same driver with other orders for the sandboxes.
func (f *fixture) with(open func(context.Context) (runtime.Driver, error), order string, check func(*fixture)) {
	other := &fixture{ctx: f.ctx, harness: f.harness, driver: f.driver, order: order}
	if open != nil {
		driver, err := open(f.ctx)
		f.noError(err, "open another driver")
		other.driver, other.order = driver, orderRun
	}
	if err := other.attempt(check); err != nil {
		f.fail(err)
	}
}
