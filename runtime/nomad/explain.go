package nomad

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// The limits of what Explain returns.
const (
	maxHappenings = 100
	maxText       = 4096 // bytes of one
)

// Explain implements [runtime.Explainer] in Nomad's own words: the evaluations of the
// job, where it was placed, and the events of its tasks. If the sandbox runs, Explain
// also makes the readiness check once.
//
// It makes four requests to Nomad, or one more. Nomad drops the allocations of a deleted
// job. Of those the driver remembers what it has seen.
func (d *Driver) Explain(ctx context.Context, sessionID string) ([]runtime.Happening, error) {
	jobID := jobs.ID(sessionID)
	evals, err := d.readEvals(ctx, jobID)
	if err != nil {
		return nil, err
	}
	s, err := d.read(ctx, jobID)
	if err != nil {
		return nil, err
	}
	if err := d.notForeign(s); err != nil {
		return nil, err
	}
	gone := !s.known
	if gone {
		s, _ = d.cache.past.get(jobID)
	}
	if !s.known && len(evals) == 0 {
		return nil, fmt.Errorf("nomad: session %s: %w", sessionID, runtime.ErrNotFound)
	}

	told := d.explainEvals(s, gone, sessionID, evals)
	var sandbox *api.Allocation // nil: Nomad has none any more
	for i, alloc := range s.allocs {
		var metrics *api.AllocationMetric
		if i == 0 && !gone {
			if sandbox, err = d.readAlloc(ctx, alloc.ID); err != nil && !isNotFound(err) {
				return nil, failed(ctx, "read allocation "+alloc.ID, err)
			}
			if sandbox != nil {
				metrics = sandbox.Metrics
			}
		}
		told = append(told, explainAlloc(alloc, metrics, i > 0)...)
	}
	slices.SortStableFunc(told, func(a, b runtime.Happening) int { return a.Time.Compare(b.Time) })
	if !gone {
		if now := d.explainNow(ctx, s, sandbox); now != "" {
			told = append(told, runtime.Happening{Time: time.Now().UTC(), Text: now})
		}
	}
	told = told[max(0, len(told)-maxHappenings):]
	for i, one := range told {
		told[i].Text = strings.ToValidUTF8(one.Text[:min(len(one.Text), maxText)], "")
	}
	return told, nil
}

// at returns a happening at a time of Nomad, in ns since 1970.
func at(ns int64, format string, args ...any) runtime.Happening {
	return runtime.Happening{Time: time.Unix(0, ns).UTC(), Text: fmt.Sprintf(format, args...)}
}

// explainEvals tells what Nomad decided about the job.
func (d *Driver) explainEvals(s state, gone bool, sessionID string, evals []*api.Evaluation) []runtime.Happening {
	var told []runtime.Happening
	stopped := false
	slices.SortFunc(evals, func(a, b *api.Evaluation) int { return cmp.Compare(a.CreateIndex, b.CreateIndex) })
	for _, eval := range evals {
		if eval.TriggeredBy == "queued-allocs" { // the wait of another one that found no place
			continue
		}
		switch {
		case eval.TriggeredBy == "job-register" && s.job.tombstone():
			told = append(told, at(eval.CreateTime, "its session ID was used up by a stopped job: a late start cannot succeed"))
		case eval.TriggeredBy == "job-register":
			told = append(told, at(eval.CreateTime, "job registered"))
		case eval.TriggeredBy == "job-deregister" && stopped && gone:
			told = append(told, at(eval.CreateTime, "job removed"))
		case eval.TriggeredBy == "job-deregister":
			stopped = true
			who := ""
			if d.ownStops.has(sessionID) {
				who = " by this Bivouac server"
			}
			told = append(told, at(eval.CreateTime, "job stopped%s", who))
		default:
			told = append(told, at(eval.CreateTime, "job evaluated again, because of %s", eval.TriggeredBy))
		}
		switch {
		case len(eval.FailedTGAllocs) > 0 && eval.BlockedEval != "":
			told = append(told, at(eval.ModifyTime, "not placed: %s; it waits for room", whyUnplaced(eval)))
		case len(eval.FailedTGAllocs) > 0:
			told = append(told, at(eval.ModifyTime, "not placed: %s", whyUnplaced(eval)))
		case eval.Status == "failed":
			told = append(told, at(eval.ModifyTime, "evaluation failed: %s", eval.StatusDescription))
		}
	}
	return told
}

// explainAlloc tells what became of an allocation. again is true for those after the
// first.
func explainAlloc(alloc *api.AllocationListStub, metrics *api.AllocationMetric, again bool) []runtime.Happening {
	placed := "placed on node %s as allocation %s%s"
	if again {
		placed = "placed again on node %s as allocation %s, which Bivouac stops%s"
	}
	all := []runtime.Happening{at(alloc.CreateTime, placed, nodeName(alloc), alloc.ID, evaluated(metrics))}
	killed := alloc.ModifyTime
	for _, name := range slices.Sorted(maps.Keys(alloc.TaskStates)) {
		for _, e := range alloc.TaskStates[name].Events {
			all = append(all, at(e.Time, "task %q: %s", name, told(e)))
			if isKilling(e) {
				killed = min(killed, e.Time)
			}
		}
	}
	switch {
	case alloc.PreemptedByAllocation != "":
		all = append(all, at(killed, "preempted by allocation %s", alloc.PreemptedByAllocation))
	case alloc.DesiredStatus != api.AllocDesiredStatusRun && alloc.DesiredDescription != "":
		all = append(all, at(killed, "allocation to be stopped: %s", alloc.DesiredDescription))
	}
	if isOutOfReach(alloc) {
		all = append(all, at(alloc.ModifyTime, "%s", unreachable(alloc)))
	}
	return all
}

// evaluated returns how many nodes Nomad looked at for an allocation, and why it could
// not take some of them.
func evaluated(m *api.AllocationMetric) string {
	if m == nil {
		return ""
	}
	return " (" + strings.Join(append([]string{nodes(m.NodesEvaluated) + " evaluated"}, ruledOut(m)...), "; ") + ")"
}

// explainNow tells what the sandbox waits for now, or whether it answers. It returns ""
// if nothing of it runs. full is its whole allocation.
func (d *Driver) explainNow(ctx context.Context, s state, full *api.Allocation) string {
	alloc := s.sandboxAlloc()
	switch {
	case !s.known || alloc != nil && !isLive(alloc):
		return ""
	case s.job.Stop && alloc != nil:
		return "it is being stopped: " + stillRuns(s.job, alloc)
	case alloc == nil:
		return progress(s)
	}
	endpoint := endpointOf(alloc, d.template.Ready().Port)
	err := d.checkOnce(ctx, s.job.Meta[jobs.MetaSessionID], endpoint)
	switch {
	case err == nil:
		return "readiness check: it answers at " + endpoint.AddrPort().String()
	case !allStarted(alloc):
		return progress(s)
	default:
		return hideToken("readiness check: "+err.Error(), full)
	}
}

// hideToken removes the sandbox's access token from text that the sandbox wrote.
func hideToken(text string, alloc *api.Allocation) string {
	if alloc == nil || alloc.Job == nil {
		return text
	}
	for _, group := range alloc.Job.TaskGroups {
		for _, task := range group.Tasks {
			text = runtime.Secret(task.Env[jobs.AccessTokenEnv]).HideIn(text)
		}
	}
	return text
}
