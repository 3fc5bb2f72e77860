package conformance

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

func stopsForGood(f *fixture) {
	spec := f.spec()
	sandbox := f.create(spec)

	f.stop(spec)
	f.isDead(f.inspect(spec), sandbox.Endpoint)
	// It is listed until it is deleted, so that the host does not forget to
	// delete it.
	f.require(len(f.listed(spec)) == 1, "List leaves out a sandbox that is stopped and not deleted")
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
	f.isSilent(running.SessionID, endpoint)
}

// stopsTheUnknown checks Stop and Delete before a Create. After a crash they
// may overtake the Create that they undo, and the Create must then fail.
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

// findsNothing inspects unknown IDs, including one that differs from a
// sandbox's ID only in the last digit.
func findsNothing(f *fixture) {
	spec := f.spec()
	f.create(spec)
	for _, unknown := range []string{uuid.NewString(), neighbour(spec.SessionID)} {
		_, err := f.driver.Inspect(f.patience(), unknown)
		f.isError(err, runtime.ErrNotFound, "Inspect of an unknown ID")
	}
}

// neighbour returns an ID that differs only in the last digit.
func neighbour(id string) string {
	last := "0"
	if id[len(id)-1] == '0' {
		last = "1"
	}
	return id[:len(id)-1] + last
}

func leavesOthersAlone(f *fixture) {
	bystander := f.spec()
	sandbox := f.create(bystander)
	for _, ended := range []runtime.Spec{f.spec(), {SessionID: neighbour(bystander.SessionID)}} {
		if ended.ChatID != "" {
			f.create(ended)
		}
		f.stop(ended)
		f.delete(ended)
	}
	same(f, sandbox, f.inspect(bystander), "what Inspect shows of a sandbox that nobody ended")
	f.runs(bystander, sandbox)
}

func endsAListEarly(f *fixture) {
	f.create(f.spec())
	f.create(f.spec())
	seen := 0
	for _, err := range f.driver.List(f.patience()) {
		f.noError(err, "List")
		seen++
		break
	}
	same(f, 1, seen, "sandboxes seen of a list")
}

func seesADeath(f *fixture) {
	spec := f.spec()
	sandbox := f.create(spec)
	f.kill(spec, sandbox)
	f.isDead(f.eventuallyDead(spec), sandbox.Endpoint)
	f.stop(spec)
	f.delete(spec)
	f.isGone(spec)
}

// eventuallyDead inspects the sandbox until it is dead, for at most the limit.
func (f *fixture) eventuallyDead(spec runtime.Spec) runtime.Sandbox {
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for ctx := f.patience(); ; {
		sandbox := f.inspect(spec)
		if sandbox.State == runtime.StateDead {
			return sandbox
		}
		select {
		case <-ctx.Done():
			f.require(false, "a sandbox that was killed is still %s after %s", sandbox.State, f.limit())
		case <-again.C:
		}
	}
}

const errNoWatch = notApplicableError("the driver has no Watch, which it need not have")

func reportsADeath(f *fixture) {
	watcher, ok := f.driver.(runtime.Watcher)
	if !ok {
		f.fail(errNoWatch)
	}
	ctx, cancel := context.WithCancel(f.ctx)
	defer cancel()
	deaths := make(chan string)
	ended := make(chan error, 1)
	go func() {
		ended <- watcher.Watch(ctx, func(changed runtime.Sandbox) {
			if changed.State != runtime.StateDead {
				return
			}
			select {
			case deaths <- changed.SessionID:
			case <-ctx.Done():
			}
		})
	}()
	const tries = 3
	reported := false
	for try := 0; try < tries && !reported; try++ { // a watcher may miss one
		reported = f.reportedDeath(deaths, ended, f.limit()/tries)
	}
	f.require(reported, "Watch reported none of %d deaths", tries)
	cancel()
	f.isError(<-ended, context.Canceled, "Watch whose context ended")
}

// reportedDeath kills a sandbox and waits until its death is reported.
func (f *fixture) reportedDeath(deaths <-chan string, ended <-chan error, limit time.Duration) bool {
	spec := f.spec()
	f.kill(spec, f.create(spec))
	wait := time.NewTimer(limit)
	defer wait.Stop()
	for {
		select {
		case dead := <-deaths:
			if dead == spec.SessionID {
				return true
			}
		case err := <-ended:
			if errors.Is(err, errors.ErrUnsupported) {
				f.fail(errNoWatch)
			}
			f.require(false, "Watch ended before its context: %v", err)
		case <-wait.C:
			return false
		}
	}
}
