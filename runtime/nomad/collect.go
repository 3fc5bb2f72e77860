package nomad

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// A Nomad client first reports an allocation up to a second after it received it. After
// that it reports the end of the allocation within 200 ms. So a Delete of a sandbox that
// is not a second old would wait for the report. Instead it asks the client itself: it has
// the client garbage-collect the allocation. No other answer of a client proves an end:
// statistics, files and logs are there before and after it, and a command that cannot be
// executed shows only that the task does not run at the moment.
//
// The client refuses while its own status of the allocation is not final. That is the
// status that it is about to report, so this believes no less than a report does. It
// answers once it has ended what is left and removed the allocation's folder, or at once
// if it shuts down. In that case one of several tasks may still run, because the status
// is final once one has failed. So the answer is believed of allocations with one task
// only.
//
// Other replicas learn of the end by the report, or by the purge of the job. Nomad drops
// the allocation with the job, so the report may never come, and Explain then does not tell
// how the tasks ended. A Stop does not ask: its sandbox can still be inspected, and the
// logs read. Nomad logs an error for each request that it refuses.

const (
	// collectLimit is how long a client is asked again. By then the report must have come
	// if the allocation has ended.
	collectLimit = time.Second
	// serveLook is the pause between two questions whether a sandbox serves, and
	// serveLimit is how long its answer may take.
	serveLook  = 10 * time.Millisecond
	serveLimit = 100 * time.Millisecond
	// Pauses before each request. Once the sandbox has closed its port, its end takes a
	// moment.
	minCollectPause = 50 * time.Millisecond
	maxCollectPause = 200 * time.Millisecond
)

// stopAndCollect is stop, beside collect.
func (d *Driver) stopAndCollect(ctx context.Context, sessionID string) (state, error) {
	collecting, cancel := context.WithCancel(ctx)
	var beside sync.WaitGroup
	defer beside.Wait()
	defer cancel()
	beside.Go(func() { d.collect(collecting, jobs.ID(sessionID)) })
	return d.stop(ctx, sessionID)
}

// collect waits until events show that Nomad stops a job's allocation. It then asks the
// client to garbage-collect it, and records that the client has done so. It returns early
// if the end of the allocation cannot be known this way.
func (d *Driver) collect(ctx context.Context, jobID string) {
	w, done := d.cache.await(jobID)
	defer done()
	alloc := d.stopping(jobID)
	for ; alloc == nil; alloc = d.stopping(jobID) {
		select {
		case <-ctx.Done():
			return
		case <-w.C:
		}
	}
	ctx, cancel := context.WithTimeout(ctx, collectLimit)
	defer cancel()
	// It is no use to ask while the sandbox serves, and Nomad logs each refusal.
	endpoint := endpointOf(alloc, d.template.Ready().Port)
	for d.serves(ctx, jobID, endpoint) && backoff.Sleep(ctx, serveLook) == nil {
	}
	pauses := backoff.Backoff{Min: minCollectPause, Max: maxCollectPause}
	for backoff.Sleep(ctx, pauses.Next()) == nil {
		collected := false
		err := d.write(ctx, limits{"look", d.looks, lookLimit}, func(opts *api.WriteOptions) error {
			_, err := d.client.Raw().Write("/v1/client/allocation/"+alloc.ID+"/gc", nil, nil, opts)
			collected = err == nil
			if isNotEnded(err) {
				return nil
			}
			return err
		})
		if collected {
			d.cache.setCollected(jobID, alloc.ID)
		}
		if collected || err != nil {
			return
		}
	}
}

// serves reports whether a sandbox answers at once.
func (d *Driver) serves(ctx context.Context, jobID string, endpoint runtime.Endpoint) bool {
	ctx, cancel := context.WithTimeout(ctx, serveLimit)
	defer cancel()
	sessionID, _ := sessionOf(jobID)
	return d.checkOnce(ctx, sessionID, endpoint) == nil
}

// stopping returns a job's allocation if events show that Nomad stops it, that its client
// has reported nothing yet, and that it has one task.
func (d *Driver) stopping(jobID string) *api.AllocationListStub {
	s, current := d.cache.get(jobID)
	alloc := s.sandboxAlloc()
	switch {
	case !current || alloc == nil || alloc.DesiredStatus == api.AllocDesiredStatusRun:
		return nil
	case alloc.ClientStatus != api.AllocClientStatusPending || len(alloc.TaskStates) > 0:
		return nil
	case alloc.AllocatedResources == nil || len(alloc.AllocatedResources.Tasks) != 1: // safeguard: client's answer for one task
		return nil
	}
	return alloc
}

// isNotEnded reports whether a client refused to garbage-collect an allocation because it
// has not ended.
func isNotEnded(err error) bool {
	return statusOf(err) == http.StatusInternalServerError && strings.Contains(bodyOf(err), "not eligible for GC")
}
