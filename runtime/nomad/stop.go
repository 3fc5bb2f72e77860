package nomad

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// Stop implements [runtime.Driver].
//
// It returns once the job is stopped, no decision about it is under way in
// Nomad, and the client of each allocation has reported its end. A node that is
// lost can report nothing, so that nobody knows when it will: Stop does not wait
// for it, and returns ErrUnavailable. An operator who removes the node from Nomad
// says that what ran there has ended. Nor does it wait for a right that Nomad
// denies it.
//
// A job of that name that is not this instance's is left alone, and Stop returns
// ErrConflict.
//
// A session ID that Nomad does not know gets a tombstone: a stopped job of that
// ID, which runs nothing, and over which no first registration succeeds. Nomad
// removes it with its next collection of garbage after 4 hours (job_gc_threshold).
func (d *Driver) Stop(ctx context.Context, sessionID string) error {
	_, err := d.stop(ctx, sessionID)
	return err
}

// Delete implements [runtime.Driver]. After a stop it purges the job.
//
// A tombstone stays: it is there for a registration that may yet come. A job
// that was a sandbox's needs none, as its registration, of which Create makes
// one, has come already; that this driver deleted it, it remembers for a while.
// Nor is there anything to do where Nomad refused that one registration.
func (d *Driver) Delete(ctx context.Context, sessionID string) error {
	jobID := jobs.ID(sessionID)
	if d.refused.has(jobID) {
		return nil
	}
	if d.cache.purged.has(jobID) {
		if s, err := d.read(ctx, jobID); err != nil || !s.known && s.allEnded() {
			return err
		}
	}
	s, err := d.stop(ctx, sessionID)
	if err != nil {
		return err
	}
	if s.job.tombstone() {
		return nil
	}
	err = d.tell(ctx, func(opts *api.WriteOptions) error {
		_, _, err := d.client.Jobs().Deregister(jobID, true, opts)
		return err
	})
	if err != nil && !isNotFound(err) {
		// Where another replica is first, Nomad's log of changes says no, and its
		// answer is no 404.
		if s, readErr := d.read(ctx, jobID); readErr != nil || s.known {
			return failed(ctx, "purge job "+jobID, err)
		}
	}
	d.cache.purged.add(jobID)
	d.cache.forget(jobID)
	return nil
}

const (
	// Pauses between looks at Nomad during a stop, where no event comes first.
	minLook = 250 * time.Millisecond
	maxLook = 2 * time.Second
)

// stop does as Stop, and returns the state that it ended with.
func (d *Driver) stop(ctx context.Context, sessionID string) (state, error) {
	jobID := jobs.ID(sessionID)
	w, done := d.cache.await(jobID)
	defer done()
	// A job that is seen to stand is stopped without a look before. After that
	// only looks count: the events of it may be late.
	seen, current := d.cache.get(jobID)
	stands := current && seen.known && seen.whole && !seen.job.Stop && d.notForeign(seen) == nil
	var why error // why it has not ended yet
	for pause := minLook; ; pause = min(2*pause, maxLook) {
		var s state
		var err error
		if stands {
			err, stands = d.deregister(ctx, sessionID, jobID), false
		} else {
			s, err = d.stopStep(ctx, sessionID, jobID)
		}
		switch {
		case err == nil || errors.Is(err, runtime.ErrConflict):
			return s, err
		case errors.Is(err, errOutOfReach) || errors.Is(err, errDenied):
			return state{}, fmt.Errorf("nomad: stop session %s: %w: %w", sessionID, runtime.ErrUnavailable, err)
		}
		if ctx.Err() == nil || why == nil {
			why = err
		}
		if !d.awaitRest(ctx, jobID, w, jitter(pause)) {
			if !errors.Is(why, runtime.ErrNotStopped) {
				why = fmt.Errorf("%w: %w, because: %w", runtime.ErrUnavailable, ctx.Err(), why)
			}
			return state{}, fmt.Errorf("nomad: stop session %s: %w", sessionID, why)
		}
	}
}

// awaitRest waits until events tell that a stop may be over, or for as long as
// wait. It returns false when ctx ended.
func (d *Driver) awaitRest(ctx context.Context, jobID string, w *waiter, wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return true
		case <-w.C:
		}
		if s, current := d.cache.get(jobID); current && (s.gone || s.atRest()) {
			return true
		}
	}
}

var (
	// errUnderWay: something was done, and has to be looked at.
	errUnderWay = errors.New("the stop is under way")
	// errOutOfReach: all is done that can be while a node is lost.
	errOutOfReach = errors.New("nobody can tell whether it has ended")
)

// stopStep does what is next in stopping a job, and returns nil only where a
// fresh look at Nomad left nothing to do and showed nothing that runs.
func (d *Driver) stopStep(ctx context.Context, sessionID, jobID string) (state, error) {
	before, _ := d.cache.get(jobID)
	// A decision that is under way may still place the sandbox, also one that
	// waited for room: that one is not pending even while it is made. Nomad
	// makes the decisions about a job one after another. So once the job was
	// stopped, and then no decision is pending, that on the stop is made, and
	// the allocations that there are then are all.
	evals, err := d.readEvals(ctx, jobID)
	if err != nil {
		return state{}, err
	}
	s, err := d.read(ctx, jobID)
	switch {
	case err != nil:
		return state{}, err
	case !s.known:
		return state{}, d.layTombstone(ctx, sessionID) // safeguard: tombstone
	case d.notForeign(s) != nil:
		return state{}, d.notForeign(s)
	case !s.job.Stop:
		return state{}, d.deregister(ctx, sessionID, jobID)
	case !before.job.Stop:
		return state{}, errors.New("somebody else has just stopped the job")
	case slices.ContainsFunc(evals, isPending): // safeguard: wait for what Nomad decides
		return state{}, errors.New("the stop is not yet decided on in Nomad")
	default:
		return s, d.running(ctx, s) // safeguard: wait for terminal
	}
}

// deregister asks Nomad to stop the job. It does not return nil: what came of it
// is to be seen.
func (d *Driver) deregister(ctx context.Context, sessionID, jobID string) error {
	d.ownStops.add(sessionID)
	err := d.tell(ctx, func(opts *api.WriteOptions) error {
		_, _, err := d.client.Jobs().Deregister(jobID, false, opts) // safeguard: stop before purge
		return err
	})
	if err != nil {
		return failed(ctx, "deregister job "+jobID, err)
	}
	return errUnderWay
}

// layTombstone takes up the session's job ID. As deregister, it does not return
// nil: a registration may have come first.
func (d *Driver) layTombstone(ctx context.Context, sessionID string) error {
	err := d.tell(ctx, func(opts *api.WriteOptions) error {
		_, _, err := d.client.Jobs().EnforceRegister(d.template.Tombstone(sessionID, d.instance.id), 0, opts)
		return err
	})
	if err != nil && !isTaken(err) {
		return failed(ctx, "lay a tombstone for session "+sessionID, err)
	}
	return errUnderWay
}

// running returns an error that says what of a stopped job may still run.
func (d *Driver) running(ctx context.Context, s state) error {
	var what []string
	outOfReach := true
	for _, alloc := range s.allocs {
		if hasEnded(alloc) {
			continue
		}
		gone, err := d.isNodeGone(ctx, alloc)
		if err != nil {
			return err
		}
		if gone {
			continue
		}
		why := stillRuns(s.job, alloc)
		if isOutOfReach(alloc) {
			_, why = d.stateOf(s, alloc)
		} else {
			outOfReach = false
		}
		what = append(what, "allocation "+alloc.ID+": "+why)
	}
	switch why := strings.Join(what, "; "); {
	case len(what) == 0:
		return nil
	case outOfReach:
		return fmt.Errorf("%w: %s", errOutOfReach, why)
	default:
		return fmt.Errorf("%w: %s", runtime.ErrNotStopped, why)
	}
}

// isOutOfReach says whether Nomad cannot reach the allocation's node.
func isOutOfReach(alloc *api.AllocationListStub) bool {
	return alloc.ClientStatus == api.AllocClientStatusLost || alloc.ClientStatus == api.AllocClientStatusUnknown
}

// isNodeGone says whether an operator removed a lost allocation's node.
func (d *Driver) isNodeGone(ctx context.Context, alloc *api.AllocationListStub) (bool, error) {
	if !isOutOfReach(alloc) {
		return false, nil
	}
	err := d.ask(ctx, func(opts *api.QueryOptions) error {
		_, _, err := d.client.Nodes().Info(alloc.NodeID, opts)
		return err
	})
	if err != nil && !isNotFound(err) {
		return false, failed(ctx, "read node "+alloc.NodeID, err)
	}
	return err != nil, nil
}
