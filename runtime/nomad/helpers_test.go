package nomad

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// services is a Nomad that knows the services of helpers, and answers as blocking
// queries do.
type services struct {
	mu        sync.Mutex
	index     int
	list      []api.ServiceRegistration
	changed   chan struct{} // closed at the next change
	status    int           // of answers that are refusals; 0: none
	namespace string        // of the last request
	requests  int
}

func (s *services) set(status int, list ...api.ServiceRegistration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.index++
	s.list, s.status = list, status
	if s.changed != nil {
		close(s.changed)
	}
	s.changed = make(chan struct{})
}

func (s *services) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	after, _ := strconv.Atoi(r.URL.Query().Get("index"))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.namespace = r.URL.Query().Get("namespace")
	s.requests++
	for after >= s.index && s.status == 0 {
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-r.Context().Done():
		}
		s.mu.Lock()
		if r.Context().Err() != nil {
			return
		}
	}
	if s.status != 0 {
		http.Error(w, "Permission denied", s.status)
		return
	}
	w.Header().Set("X-Nomad-Index", strconv.Itoa(s.index))
	_ = json.NewEncoder(w).Encode(s.list)
}

// startFollowing has a driver follow the helpers until the test ends.
func startFollowing(t *testing.T, d *Driver) {
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); d.followHelpers(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
}

func TestHelpers(t *testing.T) {
	s := &services{}
	s.set(0, api.ServiceRegistration{NodeID: "node-1", Address: "fd00::1", Port: 1})
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	client, err := api.NewClient(&api.Config{Address: server.URL})
	must.NoError(t, err)
	template, err := jobs.Load("docker", nil)
	must.NoError(t, err)
	open := func() *Driver {
		d, err := New(Config{Client: client, Template: template, Helper: newFakeHelper(), HelperNamespace: "helpers", Logger: hclog.NewNullLogger()})
		must.NoError(t, err)
		return d
	}
	on := func(d *Driver, node string) string {
		address, err := d.helperOf(t.Context(), &api.AllocationListStub{NodeID: node, NodeName: node})
		if err != nil {
			return err.Error()
		}
		return address
	}
	d := open()
	must.Eq(t, "[fd00::1]:1", on(d, "node-1")) // before anybody follows
	must.Eq(t, "helpers", s.namespace)
	must.Eq(t, "nomad: not placed: node node-2 runs no helper (bivouac node)", on(d, "node-2"))
	must.Eq(t, 1, s.requests)

	startFollowing(t, d)
	await := func(node, want string) {
		t.Helper()
		must.Wait(t, wait.InitialSuccess(wait.Timeout(time.Minute), wait.ErrorFunc(func() error {
			if got := on(d, node); got != want {
				return fmt.Errorf("got %q, want %q", got, want)
			}
			return nil
		})))
	}
	s.set(0, api.ServiceRegistration{NodeID: "node-1", Address: "10.0.0.1", Port: 2}, api.ServiceRegistration{NodeID: "node-2", Address: "10.0.0.2", Port: 2})
	await("node-2", "10.0.0.2:2")
	must.Eq(t, "10.0.0.1:2", on(d, "node-1"))

	// What is known is used while Nomad does not answer.
	s.set(http.StatusForbidden)
	must.Eq(t, "10.0.0.1:2", on(d, "node-1"))
	_, err = open().helperOf(t.Context(), &api.AllocationListStub{NodeID: "node-1"})
	must.ErrorIs(t, err, runtime.ErrPermission)
	must.ErrorContains(t, err, "the token needs the capability read-job in the namespace of the node helpers")
	s.set(0)
	await("node-1", "nomad: not placed: node node-1 runs no helper (bivouac node)")
}
