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

// A sandbox is one run of its main tasks. Nomad may run a task again inside the
// same allocation, whose status stays "running". It ignores the restart policy if a
// template or a secret changed, if an operator restarts the task, or if a restarted
// Nomad client does not find the task's process. Nomad also calls an allocation
// running if only other tasks than the main ones run.
//
// The functions here look at one answer of Nomad only. So all replicas come to the
// same result, even one that starts later.

// taskRestoreFailed is an event that package api has no name for: a restarted Nomad
// client did not find the task's process.
const taskRestoreFailed = "Failed Restoring Task"

// runOver returns why the first run of the allocation's main tasks is over. It
// returns "" while that run continues, and if Nomad was asked to end it.
func runOver(job jobFields, alloc *api.AllocationListStub) string {
	names := mainTasks(job, alloc)
	for _, name := range names {
		if why := ranAgain(alloc.TaskStates[name]); why != "" { // safeguard: end of a sandbox with its first run
			return fmt.Sprintf("task %q %s", name, why)
		}
	}
	if i := slices.IndexFunc(names, func(name string) bool { return endedItself(alloc.TaskStates[name]) }); i >= 0 {
		return fmt.Sprintf("task %q ended: %s", names[i], cmp.Or(lastWordOf(alloc.TaskStates[names[i]]), "Nomad does not say how"))
	}
	return ""
}

// mainTasks returns the names of the allocation's main tasks, failed ones first. The
// job of an older Bivouac does not name them. Then a task is known to be a main task
// only if it is the only one.
func mainTasks(job jobFields, alloc *api.AllocationListStub) []string {
	names := jobs.MainTasks(job.Meta)
	if names == nil && len(alloc.TaskStates) == 1 {
		names = slices.Collect(maps.Keys(alloc.TaskStates))
	}
	names = slices.DeleteFunc(names, func(name string) bool { return alloc.TaskStates[name] == nil })
	slices.SortFunc(names, failedFirst(alloc))
	return names
}

// ranAgain returns why the task has run, or will run, more than once. It returns ""
// if it has not. Nomad keeps a task's last ten events and the number of its
// restarts. That number does not include the run after a Nomad client's restart.
func ranAgain(task *api.TaskState) string {
	starts := 0
	for _, e := range task.Events {
		switch e.Type {
		case api.TaskRestartSignal:
			return "was ended by Nomad to be restarted: " + message(e)
		case taskRestoreFailed:
			return "did not survive a restart of Nomad's client"
		case api.TaskStarted:
			starts++
		}
	}
	if task.Restarts > 0 || starts > 1 {
		return "was started again by Nomad"
	}
	return ""
}

// endedItself reports whether the task ended without being asked to by Nomad.
func endedItself(task *api.TaskState) bool {
	return task.State == taskDead && !slices.ContainsFunc(task.Events, isKilling) // safeguard: end of a sandbox with its first main task
}

func isKilling(e *api.TaskEvent) bool { return e.Type == api.TaskKilling }

// stillRuns returns which tasks of an allocation have not ended although they
// should, and what each of them waits for.
func stillRuns(job jobFields, alloc *api.AllocationListStub) string {
	mains := mainTasks(job, alloc)
	mainsEnded := !slices.ContainsFunc(mains, func(name string) bool { return alloc.TaskStates[name].State != taskDead })
	var what []string
	for _, name := range slices.Sorted(maps.Keys(alloc.TaskStates)) {
		task := alloc.TaskStates[name]
		killing := slices.IndexFunc(task.Events, isKilling)
		switch {
		case task.State == taskDead:
		case killing > 0 && task.State == taskPending:
			what = append(what, fmt.Sprintf("task %q was told to end at %s, before it had started, and Nomad cannot interrupt its current step: %s", name,
				inUTC(time.Unix(0, task.Events[killing].Time)), told(task.Events[killing-1])))
		case killing >= 0:
			last := task.Events[len(task.Events)-1]
			what = append(what, fmt.Sprintf("task %q was told to end at %s and still runs: %s", name,
				inUTC(time.Unix(0, task.Events[killing].Time)), message(last)))
		case task.State == taskRunning && len(mains) > 0 && mainsEnded:
			// A poststop task. Nomad lets these run without a limit.
			what = append(what, fmt.Sprintf("task %q runs since %s, after the main task ended, and Nomad waits for it without a limit; "+
				"to kill it: nomad alloc signal -s SIGKILL %s %s", name, inUTC(task.StartedAt), alloc.ID, name))
		default:
			what = append(what, fmt.Sprintf("task %q is %s", name, task.State))
		}
	}
	if len(what) == 0 {
		return "its Nomad client has not reported its end"
	}
	return strings.Join(what, ", ")
}

func inUTC(t time.Time) string { return t.UTC().Format(time.RFC3339) }
