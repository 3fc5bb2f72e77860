package nomad

import (
	"cmp"
	"encoding/json"
	"maps"
	"slices"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/jobs"
)

// state is what is known about one session's job: the newest version of each part.
// A state is never changed. Its with methods return a new state, and whether it
// differs.
type state struct {
	known bool // the job exists in Nomad
	gone  bool // it existed, and was purged
	whole bool // nothing older than the newest part is missing
	job   jobFields
	// allocs are in the order in which Nomad made them: the first is the sandbox.
	allocs []*api.AllocationListStub
	evals  map[string]*api.Evaluation
	ready  string // ID of the allocation whose endpoint has answered
	// ID of the allocation that its Nomad client has removed, which it may not have
	// reported yet
	collected string
	claim     claim
}

// claim is what a spare was claimed for. The node helper knows it, and Nomad does not.
type claim struct {
	allocID string            // empty: nobody is known to have claimed it
	meta    map[string]string // see jobs.MetaOf
}

// jobFields are the fields of a job that the driver uses. Events, lists and the job
// itself have them under the same names.
type jobFields struct {
	ID             string
	Meta           map[string]string
	Stop           bool
	CreateIndex    uint64
	ModifyIndex    uint64
	JobModifyIndex uint64
	SubmitTime     int64 // ns since 1970, of the last registration or stop, by Nomad's clock
}

// altered reports whether the job was registered again after its creation. Bivouac
// never does that to a running job.
func (j jobFields) altered() bool { return j.JobModifyIndex != j.CreateIndex }

func (j jobFields) tombstone() bool { return j.Meta[jobs.MetaTombstone] != "" }

func jobFieldsOf(job *api.Job) jobFields {
	deref := func(p *uint64) uint64 {
		if p == nil {
			return 0
		}
		return *p
	}
	fields := jobFields{
		Meta:           job.Meta,
		Stop:           job.Stop != nil && *job.Stop,
		CreateIndex:    deref(job.CreateIndex),
		ModifyIndex:    deref(job.ModifyIndex),
		JobModifyIndex: deref(job.JobModifyIndex),
	}
	if job.ID != nil {
		fields.ID = *job.ID
	}
	if job.SubmitTime != nil {
		fields.SubmitTime = *job.SubmitTime
	}
	return fields
}

func jobFieldsOfStub(job *api.JobListStub) jobFields {
	return jobFields{
		ID:             job.ID,
		Meta:           job.Meta,
		Stop:           job.Stop,
		CreateIndex:    job.CreateIndex,
		ModifyIndex:    job.ModifyIndex,
		JobModifyIndex: job.JobModifyIndex,
		SubmitTime:     job.SubmitTime,
	}
}

func (s state) withJob(job jobFields) (state, bool) {
	if s.known && s.job.ModifyIndex >= job.ModifyIndex {
		return s, false
	}
	news := !s.known || s.job.Stop != job.Stop || s.job.JobModifyIndex != job.JobModifyIndex
	// The job is new, so everything after this will be seen.
	s.whole = s.whole || job.CreateIndex == job.ModifyIndex
	s.known, s.gone, s.job = true, false, job
	return s, news
}

func (s state) withAlloc(alloc *api.AllocationListStub) (state, bool) {
	i := slices.IndexFunc(s.allocs, func(a *api.AllocationListStub) bool { return a.ID == alloc.ID })
	allocs, news := slices.Clone(s.allocs), true
	switch {
	case i < 0:
		allocs = append(allocs, alloc)
	case allocs[i].ModifyIndex > alloc.ModifyIndex:
		return s, false
	default:
		// The same version may have the events of its tasks, which pack leaves out.
		news = allocs[i].ModifyIndex < alloc.ModifyIndex || allocs[i].AllocatedResources == nil && alloc.AllocatedResources != nil
		if alloc.AllocatedResources == nil { // some lists leave them out; they never change
			alloc.AllocatedResources = allocs[i].AllocatedResources
		}
		allocs[i] = alloc
	}
	slices.SortFunc(allocs, func(a, b *api.AllocationListStub) int {
		return cmp.Or(cmp.Compare(a.CreateIndex, b.CreateIndex), cmp.Compare(a.ID, b.ID))
	})
	s.allocs = allocs
	return s, news
}

// maxEvals bounds how many evaluations of a job are kept.
const maxEvals = 16

func (s state) withEval(eval *api.Evaluation) (state, bool) {
	if old := s.evals[eval.ID]; old != nil && old.ModifyIndex >= eval.ModifyIndex {
		return s, false
	}
	evals := maps.Clone(s.evals)
	if evals == nil {
		evals = make(map[string]*api.Evaluation)
	}
	evals[eval.ID] = eval
	for len(evals) > maxEvals {
		oldest := slices.MinFunc(slices.Collect(maps.Values(evals)), func(a, b *api.Evaluation) int {
			return cmp.Compare(a.CreateIndex, b.CreateIndex)
		})
		delete(evals, oldest.ID)
	}
	s.evals = evals
	return s, true
}

// meta returns what describes the sandbox: what the spare was claimed for, or else the
// meta of the job.
func (s state) meta() map[string]string {
	if alloc := s.sandboxAlloc(); alloc != nil && alloc.ID == s.claim.allocID && s.job.Meta[jobs.MetaPool] != "" {
		return s.claim.meta
	}
	return s.job.Meta
}

// sandboxAlloc returns the allocation that is the sandbox, or nil if there is none
// yet.
func (s state) sandboxAlloc() *api.AllocationListStub {
	if len(s.allocs) == 0 {
		return nil
	}
	return s.allocs[0]
}

// allEnded reports whether all allocations have ended.
func (s state) allEnded() bool {
	return !slices.ContainsFunc(s.allocs, func(alloc *api.AllocationListStub) bool { return !s.ended(alloc) })
}

// isOver reports whether the sandbox has ended, or was stopped before it began.
func (s state) isOver() bool { return (s.job.Stop || len(s.allocs) > 0) && s.allEnded() }

// ended reports whether an allocation's Nomad client has said that it ended: in a report,
// or by removing it.
func (s state) ended(alloc *api.AllocationListStub) bool {
	return hasEnded(alloc) || alloc.ID == s.collected
}

func isLive(alloc *api.AllocationListStub) bool { return !hasEnded(alloc) }

// The states of a task. Package api has no names for them.
const (
	taskPending = "pending"
	taskRunning = "running"
	taskDead    = "dead"
)

// hasEnded reports whether the allocation's Nomad client has reported the end of all
// its tasks. The servers set the statuses lost and unknown themselves, so these
// prove nothing. They may even replace the client's last status, if the servers were
// slow to decide about its node. The client's task states are kept.
func hasEnded(alloc *api.AllocationListStub) bool {
	switch alloc.ClientStatus {
	case api.AllocClientStatusComplete, api.AllocClientStatusFailed:
	case api.AllocClientStatusLost, api.AllocClientStatusUnknown:
		if len(alloc.TaskStates) == 0 { // safeguard: client's last word on a lost node
			return false
		}
	default:
		return false
	}
	for _, task := range alloc.TaskStates {
		if task.State != taskDead {
			return false
		}
	}
	return true
}

// pendingEval reports whether Nomad still has to decide something about the job.
func (s state) pendingEval() bool {
	return slices.ContainsFunc(slices.Collect(maps.Values(s.evals)), isPending)
}

// isPending reports whether Nomad is processing an evaluation or is about to. It
// ignores delayed evaluations: they follow up on a lost node, and the delay may be
// long.
func isPending(eval *api.Evaluation) bool {
	return eval.Status == "pending" && eval.WaitUntil.IsZero()
}

// atRest reports whether a stopped job seems to have ended.
func (s state) atRest() bool { return s.job.Stop && !s.pendingEval() && s.allEnded() }

// unplaced returns the newest evaluation that found no place for the sandbox, or nil
// if there is none.
func (s state) unplaced() *api.Evaluation {
	if len(s.allocs) > 0 {
		return nil
	}
	var newest *api.Evaluation
	for _, eval := range s.evals {
		decided := eval.Status == "failed" || eval.Status == "complete" && len(eval.FailedTGAllocs) > 0
		if decided && (newest == nil || eval.ModifyIndex > newest.ModifyIndex) {
			newest = eval
		}
	}
	return newest
}

// event is an event of Nomad whose payload is not decoded yet.
type event struct {
	Topic      api.Topic
	Key        string
	FilterKeys []string
	Payload    json.RawMessage
}

// jobID returns the ID of the job that the event is about.
func (e event) jobID() string {
	if e.Topic == api.TopicJob {
		return e.Key
	}
	if len(e.FilterKeys) > 0 {
		return e.FilterKeys[0]
	}
	return ""
}
