package nomad_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// demo returns a task with the demo sandbox, which first appends its process ID
// to a file in the volume; more is inserted as further lines of the task.
func demo(t *testing.T, name, more string) string {
	t.Helper()
	self, err := os.Executable()
	must.NoError(t, err)
	script := `echo $$ >> \"$${BIVOUAC_WORKSPACE}/` + name + `\"; exec ` + self + ` demo-sandbox`
	return strings.Replace(task("raw_exec", shell(script), `env {
		BIVOUAC_BIND = "${NOMAD_IP_http}"
	}
	`+more), `task "sandbox"`, `task "`+name+`"`, 1)
}

// inVolume returns a template whose sandboxes run in the session's volume.
func inVolume(t *testing.T, body string) *jobs.Template {
	t.Helper()
	src := strings.Replace(templateSource(patience.String(), body), "job {", "workspace = session.volume_host_path\njob {", 1)
	template, err := jobs.Parse("test.hcl", []byte(src), nil)
	must.NoError(t, err)
	return template
}

// runs returns the process IDs that a task has recorded.
func runs(t *testing.T, spec runtime.Spec, name string) []int {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(spec.VolumeHostPath, name))
	must.NoError(t, err)
	var pids []int
	for text := range strings.FieldsSeq(string(data)) {
		pid, err := strconv.Atoi(text)
		must.NoError(t, err)
		pids = append(pids, pid)
	}
	return pids
}

// alive reports whether a process runs. One that has ended may stay as a zombie until the
// machine's first process collects it.
func alive(pid int) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	return err == nil && !strings.Contains(string(status), "State:\tZ (zombie)")
}

// staysDead checks that the sandbox is dead for every replica, including a new
// one, and that no process of it runs.
func staysDead(t *testing.T, r replica, spec runtime.Spec, reason string) {
	t.Helper()
	late := open(t, r.client, r.template, r.instance)
	for _, each := range []replica{r, late} {
		sandbox, err := each.Inspect(patiently(t), spec.SessionID)
		must.NoError(t, err)
		must.Eq(t, runtime.StateDead, sandbox.State)
		must.StrContains(t, sandbox.Reason, reason)
		_, err = each.Create(patiently(t), spec, ignore)
		must.Error(t, err)
	}
	for _, pid := range runs(t, spec, "sandbox") {
		must.False(t, alive(pid))
	}
}

// TestSandbox_that_Nomad_restarts_is_dead covers the reasons for which Nomad
// runs a task again whatever the job's restart policy says. The process that
// was returned to the caller is gone then, and so is the sandbox.
func TestSandbox_that_Nomad_restarts_is_dead(t *testing.T) {
	t.Parallel()
	t.Run("because_a_variable_changed", func(t *testing.T) {
		r := openShared(t, rawExec(t, nil))
		path := "test/" + uuid.NewString()
		set := func(value string) {
			_, _, err := r.client.Variables().Update(&api.Variable{Path: path, Items: api.VariableItems{"key": value}}, nil)
			must.NoError(t, err)
		}
		set("before")
		t.Cleanup(func() {
			_, err := r.client.Variables().Delete(path, nil)
			must.NoError(t, err)
		})
		reports := watch(t, r)
		// The job is like one from a template that leaves the change mode to
		// Nomad's default.
		spec, sandbox := createWith(t, r, func(job *api.Job) {
			job.TaskGroups[0].Tasks[0].Templates = []*api.Template{{
				EmbeddedTmpl: new(`{{ with nomadVar "` + path + `" }}KEY={{ .key }}{{ end }}`), DestPath: new("local/env"), Envvars: new(true),
			}}
		})
		must.True(t, answers(sandbox.Endpoint))

		set("after")

		const reason = "Template with change_mode restart re-rendered"
		must.StrContains(t, awaitReport(t, reports, spec.SessionID, runtime.StateLost).Reason, reason)
		must.StrContains(t, awaitReport(t, reports, spec.SessionID, runtime.StateDead).Reason, reason)
		must.False(t, answers(sandbox.Endpoint))
	})

	for name, all := range map[string]bool{"because_an_operator_restarts_it": false, "because_an_operator_restarts_all_tasks": true} {
		t.Run(name, func(t *testing.T) {
			r := openShared(t, inVolume(t, demo(t, "sandbox", "")))
			reports := watch(t, r)
			spec, sandbox := create(t, r)
			alloc := &api.Allocation{ID: sandbox.ContainerID}
			if all {
				must.NoError(t, r.client.Allocations().RestartAllTasks(alloc, nil))
			} else {
				must.NoError(t, r.client.Allocations().Restart(alloc, "", nil))
			}
			const reason = `task "sandbox" was ended by Nomad to be restarted: User requested`
			must.StrContains(t, awaitReport(t, reports, spec.SessionID, runtime.StateLost).Reason, reason)
			must.StrContains(t, awaitReport(t, reports, spec.SessionID, runtime.StateDead).Reason, reason)
			staysDead(t, r, spec, reason)
		})
	}

	// A reboot ends the client and everything that runs on the machine. Here
	// the machine is back before Nomad counts its node as lost.
	t.Run("because_its_node_rebooted", func(t *testing.T) {
		stack.NeedServers(t)
		n, err := stack.StartNomad(patiently(t), stack.NomadConfig{Servers: 1, Clients: 1, HeartbeatGrace: time.Minute})
		must.NoError(t, err)
		t.Cleanup(func() { must.NoError(t, n.Stop()) })
		client, err := n.Client()
		must.NoError(t, err)
		r := open(t, client, inVolume(t, demo(t, "sandbox", "")), "test-"+uuid.NewString())
		reports := watch(t, r)
		spec, sandbox := create(t, r)
		process := runs(t, spec, "sandbox")[0]
		// The client has saved the task by then. Without that, it would take
		// the next run for the first.
		must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.BoolFunc(func() bool {
			alloc, _, err := client.Allocations().Info(sandbox.ContainerID, nil)
			return err == nil && alloc.ClientStatus == api.AllocClientStatusRunning
		})))
		executor, err := parent(process)
		must.NoError(t, err)

		must.NoError(t, n.Clients[0].Kill())
		must.NoError(t, syscall.Kill(executor, syscall.SIGKILL))
		must.NoError(t, syscall.Kill(-process, syscall.SIGKILL))
		must.NoError(t, n.Clients[0].Start())

		const reason = `task "sandbox" did not survive a restart of Nomad's client`
		must.StrContains(t, awaitReport(t, reports, spec.SessionID, runtime.StateDead).Reason, reason)
		staysDead(t, r, spec, reason)
	})
}

// createWith creates a sandbox whose job differs from the template's. It
// registers the job itself; Create then finds it.
func createWith(t *testing.T, r replica, change func(*api.Job)) (runtime.Spec, runtime.Sandbox) {
	t.Helper()
	spec := newSpec(t, r)
	job, err := r.template.Job(spec, r.instance)
	must.NoError(t, err)
	change(job)
	_, _, err = r.client.Jobs().Register(job, nil)
	must.NoError(t, err)
	sandbox, err := r.Create(patiently(t), spec, ignore)
	must.NoError(t, err)
	return spec, sandbox
}

// parent returns the process ID of a process's parent.
func parent(pid int) (int, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	return strconv.Atoi(fields[1])
}

// other returns another task beside the sandbox's, with a script and further
// lines.
func other(name, script, more string) string {
	return "\n" + strings.Replace(task("raw_exec", shell(script), more), `task "sandbox"`, `task "`+name+`"`, 1)
}

// TestSandbox_ends_with_the_first_of_its_main_tasks covers groups of several
// tasks. Nomad reports an allocation as running while any of its tasks runs.
func TestSandbox_ends_with_the_first_of_its_main_tasks(t *testing.T) {
	t.Parallel()
	const waits = "exec sleep 1000"
	for name, body := range map[string]string{
		"beside_another_main_task": other("other", waits, ""),
		"beside_a_sidecar": other("other", waits, `lifecycle {
			hook    = "prestart"
			sidecar = true
		}`),
		"beside_a_poststart_task": other("other", waits, `lifecycle {
			hook = "poststart"
		}`),
	} {
		t.Run(name, func(t *testing.T) {
			r := openShared(t, inVolume(t, demo(t, "sandbox", "")+body))
			reports := watch(t, r)
			spec, sandbox := create(t, r)

			// It ends with exit code 0; Nomad then leaves the other tasks
			// running.
			must.NoError(t, syscall.Kill(runs(t, spec, "sandbox")[0], syscall.SIGTERM))

			const reason = `task "sandbox" ended: exit code 0`
			must.StrContains(t, awaitReport(t, reports, spec.SessionID, runtime.StateDead).Reason, reason)
			must.False(t, answers(sandbox.Endpoint))
			staysDead(t, r, spec, reason)
		})
	}

	t.Run("and_not_with_a_task_that_is_there_to_end", func(t *testing.T) {
		r := openShared(t, inVolume(t, demo(t, "sandbox", "")+other("before", "exit 0", `lifecycle {
			hook = "prestart"
		}`)+other("after", "exit 0", `lifecycle {
			hook = "poststart"
		}`)))
		spec, sandbox := create(t, r)
		must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.BoolFunc(func() bool {
			alloc, _, err := r.client.Allocations().Info(sandbox.ContainerID, nil)
			must.NoError(t, err)
			after := alloc.TaskStates["after"]
			return after != nil && after.State == "dead"
		})))
		sandbox, err := r.Inspect(patiently(t), spec.SessionID)
		must.NoError(t, err)
		must.Eq(t, runtime.StateRunning, sandbox.State)
	})

	t.Run("before_it_is_ready", func(t *testing.T) {
		r := openShared(t, inVolume(t, other("short", "exit 0", "")+other("sandbox", waits, "")))
		_, err := r.Create(patiently(t), newSpec(t, r), ignore)
		must.ErrorIs(t, err, runtime.ErrNotReady)
		must.ErrorContains(t, err, `task "short" ended: exit code 0`)
	})
}

// TestStop_says_which_task_it_waits_for covers a poststop task, which Nomad
// never ends. The error of Stop names the task and how to end it, and Stop
// succeeds when an operator has done that.
func TestStop_says_which_task_it_waits_for(t *testing.T) {
	t.Parallel()
	r := openShared(t, rawExec(t, nil))
	spec, sandbox := createWith(t, r, func(job *api.Job) {
		hangs := api.NewTask("cleanup", "raw_exec")
		hangs.Lifecycle = &api.TaskLifecycle{Hook: api.TaskLifecycleHookPoststop}
		hangs.Config = map[string]any{"command": "/bin/sleep", "args": []string{"1000"}}
		hangs.Resources = &api.Resources{CPU: new(50), MemoryMB: new(32)}
		group := job.TaskGroups[0]
		hangs.LogConfig, hangs.RestartPolicy = group.Tasks[0].LogConfig, group.RestartPolicy
		group.Tasks = append(group.Tasks, hangs)
	})

	// The first replica asks Nomad to stop the job, the second finds it stopped.
	for _, each := range []replica{r, open(t, r.client, r.template, r.instance)} {
		must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.ErrorFunc(func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			err := each.Stop(ctx, spec.SessionID)
			must.ErrorIs(t, err, runtime.ErrNotStopped)
			must.StrNotContains(t, err.Error(), "operator")
			if !strings.Contains(err.Error(), `task "cleanup" runs since`) { // the main task ends first
				return err
			}
			must.ErrorContains(t, err, "nomad alloc signal -s SIGKILL "+sandbox.ContainerID+" cleanup")
			return nil
		})))
	}

	must.NoError(t, r.client.Allocations().Signal(&api.Allocation{ID: sandbox.ContainerID}, nil, "cleanup", "SIGKILL"))
	must.NoError(t, r.Delete(patiently(t), spec.SessionID))
}

// TestStop_says_that_a_pull_has_to_end_first covers a task that its driver is
// still creating, for example during a pull from a registry that does not
// answer. Nomad's client cannot end it, so a stop takes as long as the pull.
func TestStop_says_that_a_pull_has_to_end_first(t *testing.T) {
	t.Parallel()
	stack.DockerForTest(t)
	silent, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must.NoError(t, err)
	image := silent.Addr().String() + "/no/such:image"
	r := openShared(t, templateOf(t, "10s", task("docker", `image = "`+image+`"`, "")))
	spec := newSpec(t, r)
	_, err = r.Create(patiently(t), spec, ignore)
	must.ErrorIs(t, err, runtime.ErrNotReady)

	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	err = r.Stop(ctx, spec.SessionID)
	must.NoError(t, silent.Close()) // the pull fails, and the stop ends
	t.Log(err)
	must.ErrorIs(t, err, runtime.ErrNotStopped)
	must.ErrorContains(t, err, "before it had started, and Nomad cannot interrupt its current step: driver: Downloading image "+image)
}
