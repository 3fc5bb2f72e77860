package nomad

import (
	"cmp"
	"encoding/json"
	"maps"
	"slices"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/jobs"
)

// state is what is known of one session's job, by its newest parts. A state is
// never changed: the methods that take something in return a new one, and say
// whether it told anything new.
type state struct {
	known bool // the job stands in Nomad
	gone  bool // it stood, and was purged
	whole bool // nothing is missing that came before the newest part
	job   jobFields
	// allocs are in the order in which Nomad made them: the first is the sandbox.
	allocs []*api.AllocationListStub
	evals  map[string]*api.Evaluation
	ready  string // ID of the allocation whose endpoint has answered
}

// jobFields is what of a job matters here. Events, lists and the job itself hold
// them under the same names.
type jobFields struct {
	ID             string
	Meta           map[string]string
	Stop           bool
	CreateIndex    uint64
	ModifyIndex    uint64
	JobModifyIndex uint64
	SubmitTime     int64 // ns since 1970, of the last registration or stop, by Nomad's clock
}

// altered says whether the job was registered again after its creation, which
// Bivouac never does to a job that runs.
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
	// Of a job that is new, all that follows will be seen.
	s.whole = s.whole || job.CreateIndex == job.ModifyIndex
	s.known, s.gone, s.job = true, false, job
	return s, news
}

func (s state) withAlloc(alloc *api.AllocationListStub) (state, bool) {
	i := slices.IndexFunc(s.allocs, func(a *api.AllocationListStub) bool { return a.ID == alloc.ID })
	allocs := slices.Clone(s.allocs)
	switch {
	case i < 0:
		allocs = append(allocs, alloc)
	case allocs[i].ModifyIndex > alloc.ModifyIndex:
		return s, false
	case allocs[i].ModifyIndex == alloc.ModifyIndex && (alloc.AllocatedResources == nil || allocs[i].AllocatedResources != nil):
		return s, false
	default:
		if alloc.AllocatedResources == nil { // some lists leave them out; they never change
			alloc.AllocatedResources = allocs[i].AllocatedResources
		}
		allocs[i] = alloc
	}
	slices.SortFunc(allocs, func(a, b *api.AllocationListStub) int {
		return cmp.Or(cmp.Compare(a.CreateIndex, b.CreateIndex), cmp.Compare(a.ID, b.ID))
	})
	s.allocs = allocs
	return s, true
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

// sandboxAlloc returns the allocation that is the sandbox, nil before there is one.
func (s state) sandboxAlloc() *api.AllocationListStub {
	if len(s.allocs) == 0 {
		return nil
	}
	return s.allocs[0]
}

// allEnded says whether the client of each allocation has seen its end.
func (s state) allEnded() bool { return !slices.ContainsFunc(s.allocs, isLive) }

func isLive(alloc *api.AllocationListStub) bool { return !hasEnded(alloc) }

// States of a task, which package api does not name.
const (
	taskPending = "pending"
	taskRunning = "running"
	taskDead    = "dead"
)

// hasEnded says whether the allocation's client has seen all of its tasks end.
// Lost and unknown are statuses that the servers set by themselves, and mean
// nothing: they may even come over the client's last word, if a decision about
// its node was slow. What it said of the tasks stays.
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

// pendingEval says whether Nomad has still to decide something about the job.
func (s state) pendingEval() bool {
	return slices.ContainsFunc(slices.Collect(maps.Values(s.evals)), isPending)
}

// isPending says whether an evaluation is made or about to be. Those that Nomad
// puts off follow up on a lost node, and may be put off for long.
func isPending(eval *api.Evaluation) bool {
	return eval.Status == "pending" && eval.WaitUntil.IsZero()
}

// atRest says whether a stopped job looks as if nothing more happens to it.
func (s state) atRest() bool { return s.job.Stop && !s.pendingEval() && s.allEnded() }

// unplaced returns the newest decision that found no place for the sandbox, nil
// where there is none.
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

// event is one of Nomad's, its payload not yet looked at.
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
