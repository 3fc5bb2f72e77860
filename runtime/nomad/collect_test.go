package nomad

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/jobs"
)

// transport answers requests without a network.
type transport func(*http.Request) (*http.Response, error)

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) { return t(r) }

// stoppingDriver returns a driver that follows events and has seen that Nomad stops the
// job's allocation.
func stoppingDriver(t *testing.T, send transport) (d *Driver, jobID string, alloc *api.AllocationListStub) {
	t.Helper()
	client, err := api.NewClient(&api.Config{Address: "http://nomad.invalid", HttpClient: &http.Client{Transport: send}})
	must.NoError(t, err)
	template, err := jobs.Load("raw_exec", nil)
	must.NoError(t, err)
	d, err = New(Config{Client: client, Template: template, Logger: hclog.NewNullLogger(), Instance: "i"})
	must.NoError(t, err)
	d.cache.setCurrent(true)
	jobID = jobs.ID("s")
	d.cache.updateJob(jobFields{ID: jobID, Meta: map[string]string{jobs.MetaInstance: "i", jobs.MetaSessionID: "s"}, Stop: true, ModifyIndex: 1})
	alloc = &api.AllocationListStub{
		ID: "a", JobID: jobID, ModifyIndex: 1, DesiredStatus: api.AllocDesiredStatusStop, ClientStatus: api.AllocClientStatusPending,
		AllocatedResources: &api.AllocatedResources{Tasks: map[string]*api.AllocatedTaskResources{"sandbox": {}}},
	}
	return d, jobID, alloc
}

func TestCollect_believes_only_that_the_client_removed_the_allocation(t *testing.T) {
	const notYet = "No such allocation on client, or allocation not eligible for GC"
	type answer struct {
		status int
		text   string
	}
	for name, c := range map[string]struct {
		answers   []answer // the last one again and again
		requests  int      // the most that are made
		collected bool
		after     time.Duration // the latest that it returns
	}{
		"removed":                     {[]answer{{200, ""}}, 1, true, minCollectPause},
		"removed later":               {[]answer{{500, notYet}, {500, notYet}, {200, ""}}, 3, true, 7 * minCollectPause},
		"never removed":               {[]answer{{500, notYet}}, 10, false, collectLimit},
		"no client has it":            {[]answer{{404, `Unknown allocation "a"`}}, 1, false, minCollectPause},
		"no connection to the client": {[]answer{{404, "No path to node"}}, 1, false, minCollectPause},
		"another error":               {[]answer{{500, "rpc error: EOF"}}, 1, false, minCollectPause},
		"the token lacks a right":     {[]answer{{403, "Permission denied"}}, 1, false, minCollectPause},
		"no answer":                   {[]answer{{0, ""}}, 1, false, collectLimit},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				requests := 0
				d, jobID, alloc := stoppingDriver(t, func(r *http.Request) (*http.Response, error) {
					must.Eq(t, "PUT /v1/client/allocation/a/gc", r.Method+" "+r.URL.Path)
					a := c.answers[min(requests, len(c.answers)-1)]
					requests++
					if a.status == 0 {
						<-r.Context().Done()
						return nil, r.Context().Err()
					}
					return &http.Response{StatusCode: a.status, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(a.text)), Request: r}, nil
				})
				d.cache.updateAlloc(alloc)
				began := time.Now()
				d.collect(t.Context(), jobID)
				took := time.Since(began)

				s, _ := d.cache.get(jobID)
				must.Eq(t, c.collected, s.allEnded())
				must.Between(t, min(c.requests, 3), requests, c.requests)
				must.Between(t, c.after/2, took, c.after)
			})
		})
	}
}

func TestCollect_asks_only_of_one_task_of_which_nothing_was_reported(t *testing.T) {
	for name, change := range map[string]func(*Driver, *api.AllocationListStub){
		"two tasks":              func(_ *Driver, a *api.AllocationListStub) { a.AllocatedResources.Tasks["cleanup"] = nil },
		"tasks that are unknown": func(_ *Driver, a *api.AllocationListStub) { a.AllocatedResources = nil },
		"not stopped yet":        func(_ *Driver, a *api.AllocationListStub) { a.DesiredStatus = api.AllocDesiredStatusRun },
		"a lost node":            func(_ *Driver, a *api.AllocationListStub) { a.ClientStatus = api.AllocClientStatusLost },
		"ended already":          func(_ *Driver, a *api.AllocationListStub) { a.ClientStatus = api.AllocClientStatusComplete },
		"reported to run":        func(_ *Driver, a *api.AllocationListStub) { a.ClientStatus = api.AllocClientStatusRunning },
		"reported to start":      func(_ *Driver, a *api.AllocationListStub) { a.TaskStates = map[string]*api.TaskState{"sandbox": {}} },
		"no events":              func(d *Driver, _ *api.AllocationListStub) { d.cache.setCurrent(false) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d, jobID, alloc := stoppingDriver(t, func(r *http.Request) (*http.Response, error) {
					t.Errorf("%s %s", r.Method, r.URL.Path)
					return nil, io.ErrUnexpectedEOF
				})
				change(d, alloc)
				d.cache.updateAlloc(alloc)
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				d.collect(ctx, jobID)
			})
		})
	}
}
