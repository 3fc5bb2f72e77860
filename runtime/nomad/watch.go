package nomad

import (
	"context"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// Watch implements [runtime.Watcher]. It reports sandboxes that are dead, lost or
// running again, but not those that start.
func (d *Driver) Watch(ctx context.Context, changed func(runtime.Sandbox)) error {
	f, done := d.cache.subscribe()
	defer done()
	reported := make(map[string]runtime.State) // by job ID, of those in trouble
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-f.C:
		}
		for _, c := range f.take() {
			s, _ := d.cache.get(c.jobID)
			sandbox, ok := d.sandbox(s)
			removed := !ok && c.removed != nil // purged, or long dead and no longer in memory
			if removed {
				if sandbox, ok = d.sandbox(*c.removed); sandbox.State != runtime.StateDead {
					sandbox.State, sandbox.Reason = runtime.StateLost, "its job is no longer in Nomad"
				}
			}
			if !ok {
				continue
			}
			before, now := reported[c.jobID], trouble(sandbox)
			if now == "" || removed {
				delete(reported, c.jobID)
			} else {
				reported[c.jobID] = now
			}
			if now != before {
				changed(sandbox)
			}
		}
	}
}

// trouble returns the state of a sandbox that is dead or lost, and otherwise "".
func trouble(s runtime.Sandbox) runtime.State {
	if s.State == runtime.StateDead || s.State == runtime.StateLost {
		return s.State
	}
	return ""
}

// guard stops jobs that are or may become more than one sandbox: those with a second
// allocation, those whose allocation Nomad gave up, and those that were registered
// again after their stop. It also stops what is left of a sandbox after the run of
// its main tasks, such as a second run.
func (d *Driver) guard(ctx context.Context) {
	f, done := d.cache.subscribe()
	defer done()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.C:
		}
		for _, c := range f.take() {
			jobID := c.jobID
			s, _ := d.cache.get(jobID)
			why := surplus(s)
			if why == "" || d.notForeign(s) != nil {
				continue
			}
			d.logger.Warn("nomad_surplus_stopped", "job_id", jobID, "session_id", s.job.Meta[jobs.MetaSessionID], "reason", why)
			err := d.tell(ctx, func(opts *api.WriteOptions) error {
				_, _, err := d.client.Jobs().Deregister(jobID, false, opts)
				return err
			})
			if err != nil && ctx.Err() == nil {
				d.logger.Warn("nomad_surplus_stop_failed", "job_id", jobID, "error", err)
				f.add(jobID, nil)
				_ = backoff.Sleep(ctx, backoff.Jitter(time.Second))
			}
		}
	}
}

// surplus returns why guard must stop a job, or "" if it need not.
//
// Nomad gives up an allocation, but not its job, if an operator stops the
// allocation, if its node is drained or lost, or if another job preempts it. The
// allocation does not come back, even if its process lives on a lost node. But the
// next evaluation of the job, for whatever reason, places a second allocation. It
// does so at once, or after stop_on_client_after if the node was lost before it
// reported the first one as running. So guard stops the job before that. This ends
// nothing that Nomad would not end.
func surplus(s state) string {
	live, givenUp := 0, 0
	for _, alloc := range s.allocs {
		if isLive(alloc) {
			live++
		}
		if alloc.DesiredStatus != api.AllocDesiredStatusRun {
			givenUp++
		}
	}
	first := s.sandboxAlloc()
	switch {
	case !s.known || s.job.Stop:
		return ""
	case s.job.altered(): // safeguard: guard of jobs registered anew
		return "its job was registered again"
	case len(s.allocs) > 1 && live > 0:
		return "Nomad made a second allocation"
	case givenUp > 0: // safeguard: guard of jobs that Nomad gave up
		return "Nomad gave its allocation up"
	case first != nil && isLive(first):
		return runOver(s.job, first) // safeguard: guard of second runs
	default:
		return ""
	}
}
