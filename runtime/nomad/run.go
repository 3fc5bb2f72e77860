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
// same allocation, which then goes on being "running": it ignores the restart
// policy if a template or a secret changed, if an operator asks for it, or if a
// client that was restarted does not find the task's process. It also calls an
// allocation running if any task runs, and not the main ones.
//
// All that is concluded here follows from one answer of Nomad's, so every
// replica comes to the same result, also one that starts later.

// taskRestoreFailed is an event that package api does not name: a client that was
// started again did not find the task's process.
const taskRestoreFailed = "Failed Restoring Task"

// runOver says why the run of the main tasks that the allocation began with is
// over. It returns "" while that run goes on, or if Nomad was asked to end it.
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

// mainTasks returns the names of the allocation's main tasks, those first that
// failed. An older Bivouac did not name them in its jobs: there a task is known
// to be a main one only if it is alone.
func mainTasks(job jobFields, alloc *api.AllocationListStub) []string {
	names := jobs.MainTasks(job.Meta)
	if names == nil && len(alloc.TaskStates) == 1 {
		names = slices.Collect(maps.Keys(alloc.TaskStates))
	}
	names = slices.DeleteFunc(names, func(name string) bool { return alloc.TaskStates[name] == nil })
	slices.SortFunc(names, failedFirst(alloc))
	return names
}

// ranAgain says by what the task has run, or is to run, more than once. Nomad
// keeps the last ten events of a task, and the number of its restarts, among
// which it does not count the run after a client's restart.
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

// endedItself says whether the task ended and Nomad had not asked it to.
func endedItself(task *api.TaskState) bool {
	return task.State == taskDead && !slices.ContainsFunc(task.Events, isKilling) // safeguard: end of a sandbox with its first main task
}

func isKilling(e *api.TaskEvent) bool { return e.Type == api.TaskKilling }

// stillRuns says which of the tasks of an allocation that is to end have not
// ended, and what each of them waits for.
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
			what = append(what, fmt.Sprintf("task %q was told to end at %s, before it had started, and Nomad cannot interrupt what comes first: %s", name,
				inUTC(time.Unix(0, task.Events[killing].Time)), told(task.Events[killing-1])))
		case killing >= 0:
			last := task.Events[len(task.Events)-1]
			what = append(what, fmt.Sprintf("task %q was told to end at %s and still runs: %s", name,
				inUTC(time.Unix(0, task.Events[killing].Time)), message(last)))
		case task.State == taskRunning && len(mains) > 0 && mainsEnded:
			// A poststop task: those are what Nomad lets run then, and for how
			// long they like.
			what = append(what, fmt.Sprintf("task %q runs since %s, after the main task ended, and Nomad waits for it without a limit; "+
				"to kill it: nomad alloc signal -s SIGKILL %s %s", name, inUTC(task.StartedAt), alloc.ID, name))
		default:
			what = append(what, fmt.Sprintf("task %q is %s", name, task.State))
		}
	}
	if len(what) == 0 {
		return "its client has not told that it ended"
	}
	return strings.Join(what, ", ")
}

func inUTC(t time.Time) string { return t.UTC().Format(time.RFC3339) }
