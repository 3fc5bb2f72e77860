// Package nomadmodel is a Nomad in memory, as far as Bivouac uses one: batch
// jobs of one group, evaluations, allocations on nodes, and the event stream,
// over Nomad's HTTP API and with the semantics of its servers and clients.
//
// It has what makes Nomad hard to use safely: a register whose index is checked
// before the log and not in it, jobs that were stopped while their processes
// run on, purges that hide a live process, nodes that are lost and come back,
// statuses that come late. Its table of processes is the truth that a test
// counts against.
//
// Its timers are the time package's, so in a synctest bubble it lives in
// simulated time. One suite asks it and a real Nomad the same questions. The
// package must never know what the jobs are for.
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

// Config says what Nomad to model.
type Config struct {
	Nodes    int
	Capacity int // allocations that a node has room for
	// Rand returns randomness for what is named, another one each time.
	Rand func(name string) *rand.Rand
	// Slow makes Nomad decide late: placements take seconds and not milliseconds.
	Slow bool
	// LostAfter is when a silent node counts as lost; 0 for any time from 10 to
	// 30 s, as Nomad's settings have it: a TTL of 10 to 20 s, and a grace of 10.
	LostAfter time.Duration
	// KillAtLast lets every process live until the kill timeout once it is
	// asked to stop; without it one ends at any time until then.
	KillAtLast bool
	// Started and Ended are told of each process, while the model is locked.
	Started, Ended func(Process)
	// Stopped is told of each process that its node stops since it hears nothing of
	// the servers. It may be nil.
	Stopped func(Process)
	Trace   func(event string)
}

// Process is one sandbox's process on a node.
type Process struct {
	AllocID, JobID, NodeID string
	Meta                   map[string]string // the job's
	Port                   int
	Run                    int // counts those of one allocation, from 1
}

// Server is the model. Use [New].
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
	clients  map[string]*run // by allocation ID, what the nodes know of
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

// alloc is an allocation as the servers know it.
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

// New returns a Nomad without jobs that lives until ctx ends.
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

// LoseLeader leaves Nomad without a leader: it answers nothing but errors.
func (s *Server) LoseLeader() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leading = false
	s.cutStreams()
}

// ElectLeader gives it a new one.
func (s *Server) ElectLeader() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leading = true
}

// BreakStreams ends all event streams, as a server does that restarts, and returns
// how many.
func (s *Server) BreakStreams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.streams)
	s.cutStreams()
	return n
}

// SetCapacity changes how many allocations each node has room for.
func (s *Server) SetCapacity(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, node := range s.nodes {
		node.room = n
	}
	s.unblock()
}

// StopJob does what an operator's "nomad job stop" does.
func (s *Server) StopJob(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deregister(id, false)
}

// Jobs returns the jobs that are not stopped, with their meta, by ID.
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

// after calls f with the model locked, after a time between least and most.
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

// register applies a job's registration.
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

// deregister stops a job, nil where there is none, and with purge removes it and what is known of its
// allocations. Their processes run on until their nodes have stopped them.
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

// allocsOf returns what the servers know of a job's allocations, the oldest first.
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
