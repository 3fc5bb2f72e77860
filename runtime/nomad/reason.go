package nomad

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/jobs"
)

// whyEnded returns why an allocation ended, for a person to read.
func (d *Driver) whyEnded(s state, alloc *api.AllocationListStub) string {
	over := runOver(s.job, alloc)
	if alloc.DesiredStatus != api.AllocDesiredStatusRun || s.job.Stop && wasKilled(alloc) {
		return cmp.Or(over, d.whoEnded(s, alloc))
	}
	return cmp.Or(over, lastWord(alloc), alloc.ClientDescription, "it ended")
}

// whoEnded returns who or what ended an allocation.
func (d *Driver) whoEnded(s state, alloc *api.AllocationListStub) string {
	switch {
	case alloc.PreemptedByAllocation != "":
		return "preempted by allocation " + alloc.PreemptedByAllocation
	case strings.Contains(alloc.DesiredDescription, "node is down"): // the job is stopped after that
		return "node " + nodeName(alloc) + " was lost"
	case s.job.Stop:
		return d.whoStopped(s)
	case alloc.DesiredDescription != "":
		return "stopped by an operator in Nomad: " + alloc.DesiredDescription
	default:
		return "stopped by an operator in Nomad"
	}
}

// whoStopped returns who stopped the job, as far as this replica knows.
func (d *Driver) whoStopped(s state) string {
	if d.ownStops.has(s.job.Meta[jobs.MetaSessionID]) {
		return "stopped by Bivouac"
	}
	return "stopped by an operator in Nomad"
}

func wasKilled(alloc *api.AllocationListStub) bool {
	for _, task := range alloc.TaskStates {
		if slices.ContainsFunc(task.Events, isKilling) {
			return true
		}
	}
	return false
}

// failures are the events that show why a task could not start or continue.
var failures = []string{
	api.TaskSetupFailure, api.TaskDriverFailure, api.TaskFailedValidation, api.TaskArtifactDownloadFailed,
	"Task hook failed", "Disk Resources Exceeded",
}

// lastWord returns the event that explains an allocation's end. It prefers failed
// tasks.
func lastWord(alloc *api.AllocationListStub) string {
	for _, name := range slices.SortedFunc(maps.Keys(alloc.TaskStates), failedFirst(alloc)) {
		if word := lastWordOf(alloc.TaskStates[name]); word != "" {
			return word
		}
	}
	return ""
}

// failedFirst returns a function that sorts an allocation's task names, failed
// tasks first.
func failedFirst(alloc *api.AllocationListStub) func(a, b string) int {
	failed := func(name string) int {
		if alloc.TaskStates[name].Failed {
			return 0
		}
		return 1
	}
	return func(a, b string) int { return cmp.Or(cmp.Compare(failed(a), failed(b)), cmp.Compare(a, b)) }
}

// lastWordOf returns the event that explains a task's end: a failure, or its exit.
func lastWordOf(task *api.TaskState) string {
	for i, e := range slices.Backward(task.Events) {
		switch {
		case slices.Contains(failures, e.Type):
			return told(e)
		case e.Type == api.TaskTerminated && i > 0:
			return exitOf(e) + causeOf(e, task.Events[i-1])
		case e.Type == api.TaskTerminated:
			return exitOf(e)
		}
	}
	return ""
}

// message returns Nomad's message for an event, in one line.
func message(e *api.TaskEvent) string {
	return strings.Join(strings.Fields(cmp.Or(e.DisplayMessage, e.Message)), " ")
}

// told describes an event in words.
func told(e *api.TaskEvent) string {
	text := strings.ToLower(e.Type)
	if e.Type == api.TaskTerminated {
		return text + ": " + exitOf(e)
	}
	if message := message(e); message != "" {
		text += ": " + message
	}
	if image := e.Details["image"]; image != "" { // the image that is being downloaded
		text += " " + image
	}
	return text
}

// causeOf describes the event before an exit, if it is one that ends tasks. A task
// that is asked to end may exit with code 0.
func causeOf(exit, before *api.TaskEvent) string {
	asked := before.Type == api.TaskRestartSignal || before.Type == api.TaskSignaling ||
		before.Type == api.TaskKilling && !strings.HasPrefix(before.DisplayMessage, "Sent interrupt")
	if !asked || time.Duration(exit.Time-before.Time) > jobs.MaxStop {
		return ""
	}
	return ", after " + told(before)
}

// progress returns what Nomad and the tasks of a starting sandbox are doing. It returns
// "" if nothing is known.
func progress(s state) string {
	alloc := s.sandboxAlloc()
	switch {
	case alloc == nil && s.pendingEval():
		return "Nomad has not placed it yet (the evaluation of its job is pending)"
	case alloc == nil:
		return ""
	case len(alloc.TaskStates) == 0:
		return "node " + nodeName(alloc) + " has not started it yet"
	}
	var tasks []string
	for _, name := range slices.Sorted(maps.Keys(alloc.TaskStates)) {
		task := alloc.TaskStates[name]
		text := fmt.Sprintf("task %q is %s", name, task.State)
		if n := len(task.Events); n > 0 {
			text += " (" + told(task.Events[n-1]) + ")"
		}
		tasks = append(tasks, text)
	}
	return "in Nomad " + strings.Join(tasks, ", ")
}

// exitOf describes how a task's process ended.
func exitOf(e *api.TaskEvent) string {
	text := "exit code " + cmp.Or(e.Details["exit_code"], fmt.Sprint(e.ExitCode))
	if e.Details["oom_killed"] == "true" {
		return text + " (OOM killed)"
	}
	if signal := cmp.Or(e.Details["signal"], fmt.Sprint(e.Signal)); signal != "0" {
		text += ", signal " + signal
	}
	if message := e.Details["exit_message"]; message != "" && !strings.HasPrefix(message, "Docker container exited") {
		text += ": " + message
	}
	return text
}

// whyUnplaced returns why an evaluation found no place, for a person to read.
func whyUnplaced(eval *api.Evaluation) string {
	var reasons []string
	for _, group := range slices.Sorted(maps.Keys(eval.FailedTGAllocs)) {
		m := eval.FailedTGAllocs[group]
		if m.NodesEvaluated == 0 && m.NodesExhausted == 0 {
			reasons = append(reasons, fmt.Sprintf("no eligible node in the job's datacenters and node pool %q", cmp.Or(m.NodePool, "default")))
		}
		reasons = append(reasons, ruledOut(m)...)
	}
	return cmp.Or(strings.Join(reasons, "; "), eval.StatusDescription, "Nomad gives no reason")
}

// ruledOut returns which nodes could not take the sandbox, and why.
func ruledOut(m *api.AllocationMetric) (reasons []string) {
	for _, constraint := range slices.Sorted(maps.Keys(m.ConstraintFiltered)) {
		reasons = append(reasons, fmt.Sprintf("%s rules out %s", constraint, nodes(m.ConstraintFiltered[constraint])))
	}
	for _, class := range slices.Sorted(maps.Keys(m.ClassFiltered)) {
		if len(m.ConstraintFiltered) == 0 {
			reasons = append(reasons, fmt.Sprintf("class %s rules out %s", class, nodes(m.ClassFiltered[class])))
		}
	}
	for _, dimension := range slices.Sorted(maps.Keys(m.DimensionExhausted)) {
		reasons = append(reasons, fmt.Sprintf("%s exhausted on %s", dimension, nodes(m.DimensionExhausted[dimension])))
	}
	if len(m.QuotaExhausted) > 0 {
		reasons = append(reasons, "quota exhausted: "+strings.Join(m.QuotaExhausted, ", "))
	}
	return reasons
}

func nodes(n int) string {
	if n == 1 {
		return "1 node"
	}
	return fmt.Sprintf("%d nodes", n)
}
