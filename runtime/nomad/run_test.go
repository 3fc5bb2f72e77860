package nomad

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// captured returns an allocation as listed by Nomad 1.11.3.
func captured(t *testing.T, name string) *api.AllocationListStub {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name+".json"))
	must.NoError(t, err)
	var alloc api.AllocationListStub
	must.NoError(t, json.Unmarshal(data, &alloc))
	return &alloc
}

// stateWith returns the state of a job with only that allocation.
func stateWith(alloc *api.AllocationListStub, mainTasks string) state {
	const sessionID = "1"
	meta := map[string]string{jobs.MetaInstance: "test", jobs.MetaSessionID: sessionID, jobs.MetaMainTasks: mainTasks}
	s := state{known: true, whole: true, ready: alloc.ID, job: jobFields{
		ID: jobs.ID(sessionID), Meta: meta, Stop: alloc.DesiredStatus == api.AllocDesiredStatusStop,
	}}
	s, _ = s.withAlloc(alloc)
	return s
}

func testDriver() *Driver {
	ours := &instance{id: "test"}
	return &Driver{instance: ours, template: &jobs.Template{}, cache: newCache(ours), ownStops: newRecent[struct{}](maxRecent), logger: hclog.NewNullLogger()}
}

func TestRun(t *testing.T) {
	const stopped = "; what still runs is being stopped"
	cases := []struct {
		name, captured, mains string
		change                func(*api.AllocationListStub)
		state                 runtime.State
		reason                string
		surplus               bool
	}{
		{
			name: "a second run is not the sandbox", captured: "restarted_twice", mains: "web",
			state: runtime.StateLost, surplus: true,
			reason: `task "web" was ended by Nomad to be restarted: Template with change_mode restart re-rendered` + stopped,
		},
		{
			name: "a run that is about to end for a restart is over", captured: "restarted_twice", mains: "web",
			change: func(a *api.AllocationListStub) {
				a.TaskStates["web"].Events, a.TaskStates["web"].Restarts = a.TaskStates["web"].Events[:3], 0
			},
			state: runtime.StateLost, surplus: true,
			reason: `task "web" was ended by Nomad to be restarted: Template with change_mode restart re-rendered` + stopped,
		},
		{
			name: "a restart is known by its number if its events are gone", captured: "restarted_twice", mains: "web",
			change: func(a *api.AllocationListStub) { a.TaskStates["web"].Events = a.TaskStates["web"].Events[9:] },
			state:  runtime.StateLost, surplus: true,
			reason: `task "web" was started again by Nomad` + stopped,
		},
		{
			name: "a run after a reboot of the client is a second one", captured: "client_rebooted", mains: "web",
			state: runtime.StateLost, surplus: true,
			reason: `task "web" did not survive a restart of Nomad's client` + stopped,
		},
		{
			name: "two starts are two runs, whatever lay between them", captured: "client_rebooted", mains: "web",
			change: func(a *api.AllocationListStub) {
				events := a.TaskStates["web"].Events
				a.TaskStates["web"].Events = slices.Concat(events[:3], events[4:5])
			},
			state: runtime.StateLost, surplus: true, reason: `task "web" was started again by Nomad` + stopped,
		},
		{
			name: "an only task is a main task", captured: "client_rebooted",
			state: runtime.StateLost, surplus: true,
			reason: `task "web" did not survive a restart of Nomad's client` + stopped,
		},
		{
			name: "a task that is no main task may run again", captured: "client_rebooted", mains: "other",
			state: runtime.StateRunning,
		},
		{
			name: "a second run that has ended tells of the restart and not of who stopped it", captured: "restarted_then_stopped", mains: "web",
			state: runtime.StateDead, reason: `task "web" was ended by Nomad to be restarted: User requested running tasks to restart`,
		},
		{
			name: "a failed health check is the reason, and not the exit that it caused", captured: "check_restart", mains: "web",
			state: runtime.StateDead, reason: `task "web" was ended by Nomad to be restarted: healthcheck: check "service: \"d\" check" unhealthy`,
		},
		{
			name: "the end of one main task is the sandbox's", captured: "main_ended", mains: "other/web",
			state: runtime.StateLost, surplus: true, reason: `task "web" ended: exit code 0` + stopped,
		},
		{
			name: "the end of a task that is no main task is not", captured: "main_ended", mains: "other",
			state: runtime.StateRunning,
		},
		{
			name: "several tasks of which nobody knows the main ones are judged together", captured: "main_ended",
			state: runtime.StateRunning,
		},
		{
			name: "what goes on after the main tasks is no sandbox", captured: "poststop_hangs", mains: "other/web",
			state: runtime.StateLost, reason: `task "web" ended: exit code 0` + stopped,
		},
		{
			name: "main tasks that Nomad was told to end did not end by themselves", captured: "poststop_hangs", mains: "other",
			state: runtime.StateLost, reason: "being stopped: stopped by an operator in Nomad",
		},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			alloc := captured(t, c.captured)
			if c.change != nil {
				c.change(alloc)
			}
			s := stateWith(alloc, c.mains)
			sandbox, ok := testDriver().sandbox(s)
			must.True(t, ok)
			must.Eq(t, c.state, sandbox.State)
			must.Eq(t, c.reason, sandbox.Reason)
			must.Eq(t, c.surplus, surplus(s) != "")
		})
	}
}

// TestStillRuns checks that a stop that waits names the task and how an
// operator can end it.
func TestStillRuns(t *testing.T) {
	t.Run("names_a_poststop_task_that_goes_on_for_ever", func(t *testing.T) {
		alloc := captured(t, "poststop_hangs")
		must.Eq(t, `task "cleanup" runs since 2026-11-28T21:05:38Z, after the main task ended, and Nomad waits for it without a limit; `+
			`to kill it: nomad alloc signal -s SIGKILL `+alloc.ID+` cleanup`, stillRuns(stateWith(alloc, "other/web").job, alloc))
	})
	t.Run("names_a_task_that_takes_its_time", func(t *testing.T) {
		alloc := captured(t, "restarted_then_stopped")
		web := alloc.TaskStates["web"]
		web.State, web.Events = "running", web.Events[:8]
		must.Eq(t, `task "web" was told to end at 2026-11-28T21:08:17Z and still runs: Sent interrupt. Waiting 4s before force killing`,
			stillRuns(stateWith(alloc, "web").job, alloc))
	})
	t.Run("says_what_comes_before_a_start_that_cannot_be_interrupted", func(t *testing.T) {
		alloc := &api.AllocationListStub{TaskStates: map[string]*api.TaskState{"web": {State: "pending", Events: []*api.TaskEvent{
			{Type: api.TaskReceived},
			{Type: "Driver", DisplayMessage: "Downloading image", Details: map[string]string{"image": "busybox:1"}},
			{Type: api.TaskKilling, DisplayMessage: "Sent interrupt. Waiting 5s before force killing", Time: time.Date(2026, 11, 28, 21, 59, 4, 0, time.UTC).UnixNano()},
		}}}}
		must.Eq(t, `task "web" was told to end at 2026-11-28T21:59:04Z, before it had started, and Nomad cannot interrupt its current step: driver: Downloading image busybox:1`,
			stillRuns(stateWith(alloc, "web").job, alloc))
	})
	t.Run("says_that_nothing_was_heard", func(t *testing.T) {
		alloc := &api.AllocationListStub{ID: "a"}
		must.Eq(t, "its Nomad client has not reported its end", stillRuns(stateWith(alloc, "web").job, alloc))
	})
}
