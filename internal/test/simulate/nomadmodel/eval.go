package nomadmodel

import (
	"time"

	"github.com/hashicorp/nomad/api"
)

// eval is an evaluation: a decision about a job that the servers have to make.
type eval struct{ api.Evaluation }

func (e *eval) set(status string, index uint64) {
	e.Status, e.ModifyIndex = status, index
}

func (s *Server) newEval(jobID, trigger string) *eval {
	e := &eval{api.Evaluation{
		ID: s.newID("e7a10000"), JobID: jobID, Type: "batch", TriggeredBy: trigger, Status: "pending",
		Namespace: "default", CreateIndex: s.index, ModifyIndex: s.index,
	}}
	s.evals[e.ID] = e
	return e
}

// enqueue decides on e unless another evaluation of its job is being decided
// on: Nomad decides on one evaluation of a job at a time. Evaluations of purged
// jobs count too.
func (s *Server) enqueue(e *eval) {
	busy := false
	for _, other := range s.evals {
		busy = busy || other != e && other.JobID == e.JobID && other.Status == "pending" && other.deciding()
	}
	if !busy {
		s.decide(e)
	}
}

// deciding reports whether the servers are deciding on e. They set the snapshot
// index when they begin.
func (e *eval) deciding() bool { return e.SnapshotIndex != 0 }

// isDue reports whether the wait of a delayed evaluation is over.
func (e *eval) isDue() bool { return !e.WaitUntil.After(time.Now()) }

// decide looks at the job's current state and carries out the decision a little
// later.
func (s *Server) decide(e *eval) {
	most := 12 * time.Millisecond
	if s.Slow {
		most = 3 * time.Second
	}
	e.SnapshotIndex = s.index
	s.after("decide", time.Millisecond, most, func() {
		if e.Status != "pending" {
			s.next(e.JobID)
			return
		}
		d := s.look(e)
		s.after("plan", time.Millisecond, most, func() { s.carryOut(e, d) })
	})
}

// next decides on the job's next evaluation, if one is pending.
func (s *Server) next(jobID string) {
	var oldest *eval
	for _, e := range s.evals {
		if e.JobID == jobID && e.Status == "pending" {
			if e.deciding() {
				return
			}
			if e.isDue() && (oldest == nil || e.CreateIndex < oldest.CreateIndex || e.CreateIndex == oldest.CreateIndex && e.ID < oldest.ID) {
				oldest = e
			}
		}
	}
	if oldest != nil {
		s.decide(oldest)
	}
}

// decision is the result of an evaluation.
type decision struct {
	job     *job
	stop    []*alloc // because the job is stopped
	lost    []*alloc // their node is lost, so they are stopped
	unknown []*alloc // the next decision makes them lost
	place   bool
	delay   time.Duration // if not 0, place nothing now and look again after this time
}

// look makes the decision. An allocation that ended by itself is not replaced.
// An allocation that the servers gave up no longer counts, even if its process
// lives, so every later evaluation replaces it.
func (s *Server) look(e *eval) decision {
	d := decision{job: s.jobs[e.JobID]}
	wanted := d.job != nil && !d.job.stop && *d.job.spec.TaskGroups[0].Count > 0
	standing := 0
	for _, a := range s.allocsOf(e.JobID) {
		gone := !a.node.ready && !a.terminal()
		switch {
		case a.DesiredStatus != api.AllocDesiredStatusRun:
			if gone {
				d.lost = append(d.lost, a)
			}
		case a.terminal():
			standing++
		case !wanted && gone, gone && replaces(a.job):
			d.lost = append(d.lost, a)
		case !wanted:
			d.stop = append(d.stop, a)
		case a.ClientStatus == api.AllocClientStatusUnknown, gone && a.ClientStatus == api.AllocClientStatusPending:
			d.lost = append(d.lost, a)
			d.delay = replaceAfter(a.job)
		case gone:
			d.unknown = append(d.unknown, a)
			standing++
		default:
			standing++
		}
	}
	d.place = wanted && standing == 0 && d.delay == 0
	return d
}

// carryOut applies a decision to the allocations. It does so even if the job
// was purged in the meantime, which marks the job's evaluations as complete.
func (s *Server) carryOut(e *eval, d decision) {
	defer s.next(e.JobID)
	s.index++
	e.set("complete", s.index)
	events := []event{}
	for _, a := range d.stop {
		a.DesiredStatus, a.ModifyIndex = api.AllocDesiredStatusStop, s.index
		events = append(events, a.event())
		s.tell(a, false)
	}
	for _, a := range d.lost { // even if it ended in the meantime; its task states stay
		a.DesiredStatus, a.DesiredDescription = api.AllocDesiredStatusStop, "alloc is lost since its node is down"
		a.ClientStatus, a.ModifyIndex = api.AllocClientStatusLost, s.index
		s.trace("allocation %s is lost", a.ID)
		events = append(events, a.event())
		s.tell(a, false)
	}
	for _, a := range d.unknown {
		a.ClientStatus, a.ModifyIndex = api.AllocClientStatusUnknown, s.index
		events = append(events, a.event())
	}
	// An evaluation that was itself delayed is not followed by another one.
	if len(d.unknown) > 0 {
		events = append(events, s.putOff(e.JobID, "max-disconnect-timeout", 0).event())
	} else if d.delay > 0 && e.WaitUntil.IsZero() {
		events = append(events, s.putOff(e.JobID, "alloc-failure", d.delay).event())
	}
	if d.place {
		if a := s.place(e, d.job); a != nil {
			events = append(events, a.event())
			d.job.status, d.job.modifyIndex = "running", s.index
		} else {
			events = append(events, s.block(e).event())
		}
	}
	if j := s.jobs[e.JobID]; j != nil && j.stop && j.status != "dead" {
		j.status, j.modifyIndex = "dead", s.index
	}
	s.publish(append(events, e.event())...)
}

// putOff creates an evaluation that is decided on after the delay.
func (s *Server) putOff(jobID, trigger string, delay time.Duration) *eval {
	e := s.newEval(jobID, trigger)
	e.WaitUntil = time.Now().Add(delay)
	s.after("put off", delay, delay, func() {
		if e.Status == "pending" {
			s.enqueue(e)
		}
	})
	return e
}

// replaces reports whether Nomad immediately replaces an allocation on a lost
// node.
func replaces(spec *api.Job) bool {
	d := spec.TaskGroups[0].Disconnect
	return d == nil || d.StopOnClientAfter == nil || d.Replace == nil || *d.Replace
}

// replaceAfter returns the time after which Nomad replaces a lost allocation
// that it never saw running. By then the client should have stopped it.
func replaceAfter(spec *api.Job) time.Duration {
	kill := 5 * time.Second
	for _, t := range spec.TaskGroups[0].Tasks {
		if t.KillTimeout != nil {
			kill = max(kill, *t.KillTimeout)
		}
	}
	return *spec.TaskGroups[0].Disconnect.StopOnClientAfter + kill
}

// place creates an allocation. It returns nil if there is no room.
func (s *Server) place(e *eval, j *job) *alloc {
	var free []*node
	for _, n := range s.nodes {
		if n.ready && s.used(n) < n.room && fits(j.spec) {
			free = append(free, n)
		}
	}
	if len(free) == 0 {
		return nil
	}
	n := free[s.Rand("place").IntN(len(free))]
	group := j.spec.TaskGroups[0]
	s.lastPort++
	a := &alloc{node: n, job: j.spec, AllocationListStub: api.AllocationListStub{
		ID: s.newID("a110c000"), EvalID: e.ID, Namespace: "default", NodeID: n.id, NodeName: n.name,
		JobID: e.JobID, JobType: "batch", JobVersion: j.version, TaskGroup: *group.Name,
		DesiredStatus: api.AllocDesiredStatusRun, ClientStatus: api.AllocClientStatusPending,
		CreateIndex: s.index, ModifyIndex: s.index,
		AllocatedResources: &api.AllocatedResources{
			Tasks:  make(map[string]*api.AllocatedTaskResources),
			Shared: api.AllocatedSharedResources{Ports: []api.PortMapping{{Label: "http", Value: s.lastPort, HostIP: "127.0.0.1"}}},
		},
	}}
	for _, task := range group.Tasks {
		a.AllocatedResources.Tasks[task.Name] = &api.AllocatedTaskResources{}
	}
	s.allocs[a.ID] = a
	s.trace("allocation %s of %s placed on %s", a.ID, a.JobID, n.name)
	s.tell(a, false)
	return a
}

// nodeMemory is the memory of a node in MB. The model does not add up what
// allocations ask for, but one that asks for more than all of it finds no room.
const nodeMemory = 100_000

func fits(spec *api.Job) bool {
	ask := spec.TaskGroups[0].Tasks[0].Resources
	return ask == nil || ask.MemoryMB == nil || *ask.MemoryMB <= nodeMemory
}

// used returns how many allocations the node has, as the servers see it.
func (s *Server) used(n *node) int {
	used := 0
	for _, a := range s.allocs {
		if a.node == n && !a.terminal() {
			used++
		}
	}
	return used
}

// block creates a blocked evaluation, which waits for room.
func (s *Server) block(e *eval) *eval {
	b := s.newEval(e.JobID, "job-register")
	b.TriggeredBy, b.PreviousEval = "queued-allocs", e.ID
	b.set("blocked", s.index)
	e.BlockedEval = b.ID
	b.FailedTGAllocs = map[string]*api.AllocationMetric{"sandbox": {
		NodesEvaluated: len(s.nodes), NodesExhausted: len(s.nodes),
		DimensionExhausted: map[string]int{"memory": len(s.nodes)},
	}}
	e.FailedTGAllocs = b.FailedTGAllocs
	s.trace("no room for %s", e.JobID)
	return b
}

// unblock enqueues all blocked evaluations again.
func (s *Server) unblock() {
	for _, e := range sortedByID(s.evals) {
		if e.Status == "blocked" {
			s.index++
			e.set("pending", s.index)
			s.publish(e.event())
			s.enqueue(e)
		}
	}
}
