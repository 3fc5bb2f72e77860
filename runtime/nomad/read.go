package nomad

import (
	"context"
	"fmt"
	"iter"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// look returns a job's state from the cache if that is up to date, and otherwise
// from Nomad.
func (d *Driver) look(ctx context.Context, jobID string) (state, error) {
	if s, current := d.cache.get(jobID); current && s.known && s.whole {
		return s, nil
	}
	return d.read(ctx, jobID)
}

// read reads a job and its allocations from Nomad and updates the cache.
func (d *Driver) read(ctx context.Context, jobID string) (state, error) {
	var job *api.Job
	err := d.ask(ctx, func(opts *api.QueryOptions) (err error) {
		job, _, err = d.client.Jobs().Info(jobID, opts)
		return err
	})
	if err != nil && !isNotFound(err) {
		return state{}, failed(ctx, "read job "+jobID, err)
	}
	stands := err == nil
	var allocs []*api.AllocationListStub
	err = d.ask(ctx, func(opts *api.QueryOptions) (err error) {
		allocs, _, err = d.client.Jobs().Allocations(jobID, true, opts)
		return err
	})
	if err != nil {
		return state{}, failed(ctx, "list allocations of "+jobID, err)
	}
	if !stands {
		d.cache.forget(jobID)
		s := state{gone: true}
		for _, alloc := range allocs {
			s, _ = s.withAlloc(alloc)
		}
		return s, nil
	}
	s := d.cache.update(jobID, func(s state) (state, bool) {
		s, _ = s.withJob(jobFieldsOf(job))
		for _, alloc := range allocs {
			s, _ = s.withAlloc(alloc)
		}
		s.whole = true
		return s, true
	})
	// The cache does not keep a job of another instance, so nothing can be added to it.
	ours := d.notForeign(s) == nil
	if alloc := s.sandboxAlloc(); alloc == nil || alloc.AllocatedResources != nil || !ours {
		return s, nil
	}
	return d.readResources(ctx, s.sandboxAlloc().ID, jobID)
}

// readResources reads an allocation's resources, which the lists of a job's
// allocations leave out.
func (d *Driver) readResources(ctx context.Context, allocID, jobID string) (state, error) {
	alloc, err := d.readAlloc(ctx, allocID)
	if err != nil {
		return state{}, failed(ctx, "read allocation "+allocID, err)
	}
	stub := alloc.Stub()
	stub.AllocatedResources = alloc.AllocatedResources
	return d.cache.update(jobID, func(s state) (state, bool) { return s.withAlloc(stub) }), nil
}

// readAlloc reads an allocation from Nomad. It returns Nomad's own error.
func (d *Driver) readAlloc(ctx context.Context, allocID string) (alloc *api.Allocation, err error) {
	err = d.ask(ctx, func(opts *api.QueryOptions) (err error) {
		alloc, _, err = d.client.Allocations().Info(allocID, opts)
		return err
	})
	return alloc, err
}

// readEvals reads a job's evaluations from Nomad and updates the cache.
func (d *Driver) readEvals(ctx context.Context, jobID string) ([]*api.Evaluation, error) {
	var evals []*api.Evaluation
	err := d.ask(ctx, func(opts *api.QueryOptions) (err error) {
		evals, _, err = d.client.Jobs().Evaluations(jobID, opts)
		return err
	})
	if err != nil {
		return nil, failed(ctx, "list evaluations of "+jobID, err)
	}
	for _, eval := range evals {
		d.cache.updateEval(eval)
	}
	return evals, nil
}

// Inspect implements [runtime.Driver].
func (d *Driver) Inspect(ctx context.Context, sessionID string) (runtime.Sandbox, error) {
	limited, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	s, err := d.look(limited, jobs.ID(sessionID))
	switch {
	case err != nil && limited.Err() != nil && ctx.Err() == nil:
		return runtime.Sandbox{}, fmt.Errorf("nomad: inspect: %w: no answer within %v", runtime.ErrUnavailable, askLimit)
	case err != nil:
		return runtime.Sandbox{}, err
	}
	if err := d.notForeign(s); err != nil {
		return runtime.Sandbox{}, err
	}
	sandbox, ok := d.sandbox(s)
	if !ok {
		return runtime.Sandbox{}, fmt.Errorf("nomad: session %s: %w", sessionID, runtime.ErrNotFound)
	}
	if sandbox.Pool != "" && sandbox.ChatID == "" && sandbox.State == runtime.StateRunning {
		sandbox.Reason = d.whyNoChat(limited, s.sandboxAlloc())
	}
	return sandbox, nil
}

// List implements [runtime.Driver]. It does not yield tombstones.
func (d *Driver) List(ctx context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		var index uint64
		for job, err := range d.listJobs(ctx, &index) {
			var s state
			forgotten := false
			if err == nil {
				if forgotten = d.hasForgotten(job); forgotten {
					s = state{known: true, job: jobFieldsOfStub(job)}
				} else {
					s, err = d.look(ctx, job.ID)
				}
			}
			if err != nil {
				yield(runtime.Sandbox{}, err)
				return
			}
			sandbox, ok := d.sandbox(s)
			if forgotten {
				sandbox.State, sandbox.Reason = runtime.StateDead, "it ended"
			}
			if ok && !yield(sandbox, nil) {
				return
			}
		}
	}
}

// hasForgotten reports whether a job ended so long ago that the cache no longer has it.
// A list then costs no read of the job: a scheduler that does not know of the end yet
// inspects the sandbox.
func (d *Driver) hasForgotten(job *api.JobListStub) bool {
	s, current := d.cache.get(job.ID)
	return current && !s.known && job.Status == "dead"
}

// Instances counts the sandboxes that may run, of all instances, by the instance ID
// in their jobs.
func (d *Driver) Instances(ctx context.Context) (map[string]int, error) {
	counts := make(map[string]int)
	var index uint64
	for job, err := range d.listAllJobs(ctx, &index) {
		if err != nil {
			return nil, err
		}
		if id := job.Meta[jobs.MetaInstance]; id != "" && job.Status != "dead" {
			counts[id]++
		}
	}
	return counts, nil
}

// listJobs yields the jobs of this instance, as listAllJobs does.
func (d *Driver) listJobs(ctx context.Context, index *uint64) iter.Seq2[*api.JobListStub, error] {
	return func(yield func(*api.JobListStub, error) bool) {
		for job, err := range d.listAllJobs(ctx, index) {
			if (err != nil || d.isOurs(job)) && !yield(job, err) {
				return
			}
		}
	}
}

// listAllJobs yields the jobs that are named like a session's job, of all
// instances. It sets index to the index of the first page.
func (d *Driver) listAllJobs(ctx context.Context, index *uint64) iter.Seq2[*api.JobListStub, error] {
	return func(yield func(*api.JobListStub, error) bool) {
		withMeta := &api.JobListOptions{Fields: &api.JobListFields{Meta: true}}
		var page []*api.JobListStub
		read := func(opts *api.QueryOptions) (meta *api.QueryMeta, err error) {
			page, meta, err = d.client.Jobs().ListOptions(withMeta, opts)
			if err == nil && *index == 0 {
				*index = meta.LastIndex
			}
			return meta, err
		}
		for err := range d.pages(ctx, jobs.IDPrefix, "", nil, read) {
			if err != nil {
				yield(nil, failed(ctx, "list jobs", err))
				return
			}
			for _, job := range page {
				if !yield(job, nil) {
					return
				}
			}
		}
	}
}

// isOurs reports whether a job with Bivouac's prefix belongs to this instance. It
// logs a job that names no instance, and one that names this instance but is
// foreign. It does not log the job of the node helpers.
func (d *Driver) isOurs(job *api.JobListStub) bool {
	if job.ID == nodeapi.Service {
		return false
	}
	why := d.foreign(job.ID, job.Meta)
	if claimed := job.Meta[jobs.MetaInstance]; why != "" && (claimed == "" || d.instance.owns(claimed)) {
		d.logger.Warn("nomad_job_skipped", "job_id", job.ID, "reason", why)
	}
	return why == ""
}
