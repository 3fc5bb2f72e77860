package nomadmodel

import (
	"time"

	"github.com/hashicorp/nomad/api"
)

// eval is an evaluation: the servers have to decide something about a job.
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

// deciding holds the evaluations of purged jobs, too: Nomad decides on one of
// a job at a time.
func (s *Server) enqueue(e *eval) {
	busy := false
	for _, other := range s.evals {
		busy = busy || other != e && other.JobID == e.JobID && other.Status == "pending" && other.deciding()
	}
	if !busy {
		s.decide(e)
	}
}

// deciding is marked by a snapshot index.
func (e *eval) deciding() bool { return e.SnapshotIndex != 0 }

// decide looks at a job as it stands now, and acts on that a little later.
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
		j := s.jobs[e.JobID]
		wanted := j != nil && !j.stop && *j.spec.TaskGroups[0].Count > 0
		s.after("plan", time.Millisecond, most, func() { s.carryOut(e, j, wanted) })
	})
}

// next decides on the job's next evaluation.
func (s *Server) next(jobID string) {
	var oldest *eval
	for _, e := range s.evals {
		if e.JobID == jobID && e.Status == "pending" {
			if e.deciding() {
				return
			}
			if oldest == nil || e.CreateIndex < oldest.CreateIndex || e.CreateIndex == oldest.CreateIndex && e.ID < oldest.ID {
				oldest = e
			}
		}
	}
	if oldest != nil {
		s.decide(oldest)
	}
}

// carryOut makes the allocations what an evaluation decided.
func (s *Server) carryOut(e *eval, j *job, wanted bool) {
	defer s.next(e.JobID)
	if e.Status != "pending" {
		return
	}
	s.index++
	e.set("complete", s.index)
	events := []event{}
	switch {
	case !wanted:
		for _, a := range s.allocsOf(e.JobID) {
			if a.DesiredStatus == api.AllocDesiredStatusRun && !a.terminal() {
				a.DesiredStatus, a.ModifyIndex = api.AllocDesiredStatusStop, s.index
				events = append(events, a.event())
				s.tell(a, false)
			}
		}
		if j := s.jobs[e.JobID]; j != nil && j.stop && j.status != "dead" {
			j.status, j.modifyIndex = "dead", s.index
		}
	case s.needsAlloc(e.JobID):
		if a := s.place(e, j); a != nil {
			events = append(events, a.event())
			j.status, j.modifyIndex = "running", s.index
		} else {
			events = append(events, s.block(e).event())
		}
	}
	s.publish(append(events, e.event())...)
}

// needsAlloc says whether a job that should run has no allocation that counts.
// One that failed counts, as there is no rescheduling; one whose node was lost
// counts where the job says so.
func (s *Server) needsAlloc(jobID string) bool {
	for _, a := range s.allocsOf(jobID) {
		switch {
		case a.DesiredStatus != api.AllocDesiredStatusRun && a.ClientStatus != api.AllocClientStatusLost:
		case a.ClientStatus == api.AllocClientStatusLost && replaces(a.job):
		default:
			return false
		}
	}
	return true
}

// replaces says whether Nomad starts another allocation for one on a lost node.
func replaces(spec *api.Job) bool {
	d := spec.TaskGroups[0].Disconnect
	return d == nil || d.StopOnClientAfter == nil || d.Replace == nil || *d.Replace
}

// place makes an allocation, nil where there is no room.
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
		AllocatedResources: &api.AllocatedResources{Shared: api.AllocatedSharedResources{
			Ports: []api.PortMapping{{Label: "http", Value: s.lastPort, HostIP: "127.0.0.1"}},
		}},
	}}
	s.allocs[a.ID] = a
	s.trace("allocation %s of %s placed on %s", a.ID, a.JobID, n.name)
	s.tell(a, false)
	return a
}

// nodeMemory is what a node has, in MB. Allocations are not counted by what they
// ask for, but one that asks for more than all of it finds no room.
const nodeMemory = 100_000

func fits(spec *api.Job) bool {
	ask := spec.TaskGroups[0].Tasks[0].Resources
	return ask == nil || ask.MemoryMB == nil || *ask.MemoryMB <= nodeMemory
}

// used is how many allocations a node has, as the servers see it.
func (s *Server) used(n *node) int {
	used := 0
	for _, a := range s.allocs {
		if a.node == n && !a.terminal() {
			used++
		}
	}
	return used
}

// block makes an evaluation that waits for room.
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

// unblock has all blocked evaluations decided again.
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
