package nomad

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// Stop implements [runtime.Driver].
//
// It returns once the job is stopped, no evaluation of it is pending, and the Nomad
// client of each allocation has reported its end. A lost node cannot report
// anything, so Stop does not wait for it and returns ErrUnavailable. If an operator
// removes the node from Nomad, Stop takes what ran there as ended. Stop returns
// ErrPermission at once if Nomad denies a request.
//
// If the job belongs to another instance, Stop leaves it alone and returns
// ErrConflict.
//
// If Nomad does not know the session ID, Stop creates a tombstone: a stopped job
// with that ID that runs nothing and makes a late first registration fail. Nomad
// removes it at its first garbage collection after 4 hours (job_gc_threshold).
func (d *Driver) Stop(ctx context.Context, sessionID string) error {
	_, err := d.stop(ctx, sessionID)
	return err
}

// Delete implements [runtime.Driver]. It stops the job and then purges it.
//
// If the Nomad client has reported nothing of the sandbox yet, Delete does not wait for
// the report of its end, which comes up to a second later: it has the client remove the
// allocation. If the client does not do that, Delete waits as Stop does.
//
// Delete leaves a tombstone in place, because a late registration may still arrive.
// The job of a sandbox needs no tombstone: Create makes only one registration, and
// that has arrived. The driver remembers for a while that it deleted the job. If
// Nomad refused that one registration, there is nothing to do.
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
	s, err := d.stopAndCollect(ctx, sessionID)
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
		// If another replica purged the job first, Nomad's answer is not a 404.
		if s, readErr := d.read(ctx, jobID); readErr != nil || s.known {
			return failed(ctx, "purge job "+jobID, err)
		}
	}
	d.cache.purged.add(jobID, struct{}{})
	d.cache.forget(jobID)
	return nil
}

const (
	// Pauses between two reads during a stop, unless an event comes first.
	minLook = 250 * time.Millisecond
	maxLook = 2 * time.Second
)

// stop is Stop. It also returns the last state of the job.
func (d *Driver) stop(ctx context.Context, sessionID string) (state, error) {
	jobID := jobs.ID(sessionID)
	w, done := d.cache.await(jobID)
	defer done()
	// A job that the cache shows as running is stopped without a read first. After
	// that only reads count, because events may be late.
	seen, current := d.cache.get(jobID)
	stands := current && seen.known && seen.whole && !seen.job.Stop && d.notForeign(seen) == nil
	var why error // why it has not ended yet
	for pause := (backoff.Backoff{Min: minLook, Max: maxLook}); ; {
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
		case errors.Is(err, errOutOfReach):
			return state{}, fmt.Errorf("nomad: stop session %s: %w: %w", sessionID, runtime.ErrUnavailable, err)
		case isDenied(err):
			return state{}, fmt.Errorf("nomad: stop session %s: %w", sessionID, err)
		}
		if ctx.Err() == nil || why == nil {
			why = err
		}
		if !d.awaitRest(ctx, jobID, w, pause.Next()) {
			if !errors.Is(why, runtime.ErrNotStopped) {
				why = fmt.Errorf("%w: %w, because: %w", runtime.ErrUnavailable, ctx.Err(), why)
			}
			return state{}, fmt.Errorf("nomad: stop session %s: %w", sessionID, why)
		}
	}
}

// awaitRest waits until events show that a stop may be over, but at most for wait.
// It returns false if ctx ended.
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
	// errUnderWay is returned after a write whose result has to be read.
	errUnderWay = errors.New("the stop is in progress")
	// errOutOfReach is returned when everything has been done that is possible
	// while a node is lost.
	errOutOfReach = errors.New("it cannot be known whether it has ended")
)

// stopStep takes the next step to stop a job. It returns nil only if a fresh read
// from Nomad shows that nothing runs and nothing is left to do.
func (d *Driver) stopStep(ctx context.Context, sessionID, jobID string) (state, error) {
	before, _ := d.cache.get(jobID)
	// A running evaluation may still place the sandbox. So may one that waited for
	// room, and that one is not pending even while Nomad processes it. Nomad
	// processes the evaluations of a job one after another. So if the job was stopped
	// first and then no evaluation is pending, the evaluation of the stop is done,
	// and no allocation can follow.
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
		return state{}, errors.New("the job has just been stopped by somebody else")
	case slices.ContainsFunc(evals, isPending): // safeguard: wait for what Nomad decides
		return state{}, errors.New("the stop has not been evaluated yet")
	default:
		return s, d.running(ctx, s) // safeguard: wait for terminal
	}
}

// deregister asks Nomad to stop the job. It never returns nil, because the result
// has to be read.
func (d *Driver) deregister(ctx context.Context, sessionID, jobID string) error {
	d.ownStops.add(sessionID, struct{}{})
	err := d.tell(ctx, func(opts *api.WriteOptions) error {
		_, _, err := d.client.Jobs().Deregister(jobID, false, opts) // safeguard: stop before purge
		return err
	})
	if err != nil {
		return failed(ctx, "deregister job "+jobID, err)
	}
	return errUnderWay
}

// layTombstone registers a tombstone under the session's job ID. It never returns
// nil, because a registration may have come first.
func (d *Driver) layTombstone(ctx context.Context, sessionID string) error {
	err := d.tell(ctx, func(opts *api.WriteOptions) error {
		_, _, err := d.client.Jobs().EnforceRegister(d.template.Tombstone(sessionID, d.instance.id), 0, opts)
		return err
	})
	if err != nil && !isTaken(err) {
		return failed(ctx, "create a tombstone for session "+sessionID, err)
	}
	return errUnderWay
}

// running returns an error that names what may still run of a stopped job, or nil.
func (d *Driver) running(ctx context.Context, s state) error {
	var what []string
	outOfReach := true
	for _, alloc := range s.allocs {
		if s.ended(alloc) {
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
			why = unreachable(alloc)
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

// isNodeGone reports whether an operator removed a lost allocation's node.
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
