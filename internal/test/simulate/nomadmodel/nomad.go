// Package nomadmodel is an in-memory Nomad with the parts that Bivouac uses:
// batch jobs of one group, evaluations, allocations on nodes, and the event
// stream. It serves Nomad's HTTP API with the semantics of Nomad's servers and
// clients.
//
// It models what makes Nomad hard to use safely: registrations whose index is
// checked before the log and not in it, stopped jobs whose processes run on,
// purges that hide a live process, nodes that are lost and come back, and
// statuses that arrive late. Tests check against its table of processes, which
// is the truth.
//
// Its timers come from the time package, so it runs in simulated time inside a
// synctest bubble. A test suite asks the model and a real Nomad the same
// questions and compares the answers. The package must never know what the jobs
// are for.
package nomadmodel

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/test/simulate/network"
)

// Config configures the model.
type Config struct {
	Nodes    int
	Capacity int // how many allocations fit on a node
	// Rand returns a random source for a name, a different one on each call.
	Rand func(name string) *rand.Rand
	// Slow makes Nomad decide late: a placement takes seconds instead of
	// milliseconds.
	Slow bool
	// LostAfter is the time after which a silent node counts as lost. 0 means
	// any time from 10 to 30 s, as with Nomad's settings: a TTL of 10 to 20 s
	// and a grace period of 10 s.
	LostAfter time.Duration
	// KillAtLast lets every process live until the kill timeout when it is
	// asked to stop. Without it, a process ends at any time until then.
	KillAtLast bool
	// SaveTime is how long a node's agent takes to write down that it has started a process.
	// If it dies before that, it starts the process a second time, and both end. A real
	// agent takes some milliseconds. 0: it takes no time.
	SaveTime time.Duration
	// Service is the name of a service of which an instance runs on each node, on port
	// [ServicePort] plus the number of the node. Empty: there is none.
	Service string
	// Started and Ended are called for each process, while the model is locked.
	Started, Ended func(Process)
	// Stopped is called for each process that its node stops because the node
	// hears nothing from the servers. It may be nil.
	Stopped func(Process)
	// Twice is called for each process that ends because its node's agent, which died when
	// it had just started it, started it a second time. It may be nil.
	Twice func(Process)
	Trace func(event string)
}

// ServicePort is the port of the service on the first node.
const ServicePort = 6000

// Process is the process of one sandbox on a node.
type Process struct {
	AllocID, JobID, NodeID string
	Meta                   map[string]string // of the job
	Env                    map[string]string // of the first task
	Port                   int
	Run                    int // counts the runs of one allocation, from 1
}

// Server is the model. Create it with [New].
type Server struct {
	Config
	ctx context.Context // ends with the simulation

	mu       sync.Mutex
	index    uint64 // of the raft log
	lastID   int
	lastPort int
	leading  bool
	jobs     map[string]*job
	evals    map[string]*eval
	allocs   map[string]*alloc
	nodes    []*node
	clients  map[string]*run // by allocation ID: what the nodes know
	streams  []*stream
}

type job struct {
	spec           *api.Job
	createIndex    uint64
	modifyIndex    uint64
	jobModifyIndex uint64
	version        uint64
	stop           bool
	status         string
}

// alloc is an allocation as the servers see it.
type alloc struct {
	api.AllocationListStub
	node *node
	job  *api.Job
}

func (a *alloc) terminal() bool {
	switch a.ClientStatus {
	case api.AllocClientStatusComplete, api.AllocClientStatusFailed, api.AllocClientStatusLost:
		return true
	default:
		return false
	}
}

// New returns a Nomad without jobs. It runs until ctx is done.
func New(ctx context.Context, config Config) *Server {
	s := &Server{
		Config: config, ctx: ctx, index: 10, lastPort: 20000, leading: true,
		jobs:    make(map[string]*job),
		evals:   make(map[string]*eval),
		allocs:  make(map[string]*alloc),
		clients: make(map[string]*run),
	}
	for i := range config.Nodes {
		s.nodes = append(s.nodes, &node{
			id: fmt.Sprintf("90de0000-0000-4000-8000-%012x", i+1), name: fmt.Sprintf("node-%d", i+1),
			room: config.Capacity, ready: true, connected: true,
		})
	}
	return s
}

// LoseLeader leaves Nomad without a leader, so that it answers every request
// with an error.
func (s *Server) LoseLeader() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leading = false
	s.cutStreams()
}

// ElectLeader gives Nomad a new leader.
func (s *Server) ElectLeader() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leading = true
}

// BreakStreams ends all event streams, as a server that restarts does, and
// returns how many there were.
func (s *Server) BreakStreams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.streams)
	s.cutStreams()
	return n
}

// SetCapacity sets how many allocations fit on each node.
func (s *Server) SetCapacity(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, node := range s.nodes {
		node.room = n
	}
	s.unblock()
}

// StopJob stops a job, like an operator's "nomad job stop".
func (s *Server) StopJob(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deregister(id, false)
}

// Jobs returns the meta of the jobs that are not stopped, by job ID.
func (s *Server) Jobs() map[string]map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	running := make(map[string]map[string]string)
	for id, j := range s.jobs {
		if !j.stop {
			running[id] = j.spec.Meta
		}
	}
	return running
}

func (s *Server) newID(kind string) string {
	s.lastID++
	return fmt.Sprintf("%s-0000-4000-8000-%012x", kind, s.lastID)
}

// after calls f with the model locked, after a random time between least and
// most.
func (s *Server) after(name string, least, most time.Duration, f func()) {
	d := least + time.Duration(s.Rand(name).Int64N(int64(most-least)+1))
	network.After(s.ctx, d, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		f()
	})
}

func (s *Server) trace(format string, args ...any) {
	if s.Trace != nil {
		s.Trace(fmt.Sprintf(format, args...))
	}
}

// register applies the registration of a job.
func (s *Server) register(spec *api.Job) (*job, *eval) {
	s.index++
	j := s.jobs[*spec.ID]
	if j == nil {
		j = &job{createIndex: s.index, status: "pending"}
		s.jobs[*spec.ID] = j
	} else {
		j.version++
	}
	j.spec, j.stop = spec, spec.Stop != nil && *spec.Stop
	j.modifyIndex, j.jobModifyIndex = s.index, s.index
	s.trace("job %s registered, stop=%t, index %d", *spec.ID, j.stop, s.index)
	e := s.newEval(*spec.ID, "job-register")
	s.publish(j.event("JobRegistered", false), e.event())
	s.enqueue(e)
	return j, e
}

// deregister stops a job. It returns nil if the job does not exist. With purge
// it also removes the job and everything known about its allocations. Their
// processes run on until their nodes have stopped them.
func (s *Server) deregister(id string, purge bool) *eval {
	j := s.jobs[id]
	if j == nil {
		return nil
	}
	s.index++
	e := s.newEval(id, "job-deregister")
	events := []event{e.event()}
	switch {
	case purge:
		s.trace("job %s purged, index %d", id, s.index)
		delete(s.jobs, id)
		events = append(events, j.event("JobDeregistered", true))
		for _, other := range s.evals {
			if other.JobID == id && other.Status == "pending" && other != e {
				other.set("complete", s.index)
			}
		}
		for allocID, a := range s.allocs {
			if a.JobID == id {
				delete(s.allocs, allocID)
				s.tell(a, true)
			}
		}
	default:
		s.trace("job %s stopped, index %d", id, s.index)
		j.stop, j.modifyIndex, j.jobModifyIndex = true, s.index, s.index
		events = append(events, j.event("JobDeregistered", false))
	}
	for _, other := range s.evals {
		if other.JobID == id && other.Status == "blocked" {
			other.set("canceled", s.index)
			events = append(events, other.event())
		}
	}
	s.publish(events...)
	s.enqueue(e)
	return e
}

// allocsOf returns the job's allocations as the servers know them, oldest
// first.
func (s *Server) allocsOf(jobID string) []*alloc {
	var allocs []*alloc
	for _, a := range s.allocs {
		if a.JobID == jobID {
			allocs = append(allocs, a)
		}
	}
	slices.SortFunc(allocs, func(a, b *alloc) int {
		if a.CreateIndex != b.CreateIndex {
			return int(a.CreateIndex) - int(b.CreateIndex)
		}
		return slices.Compare([]byte(a.ID), []byte(b.ID))
	})
	return allocs
}
