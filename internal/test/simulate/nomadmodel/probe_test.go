package nomadmodel_test

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/simulate/network"
	"github.com/bivouac/bivouac/internal/test/simulate/nomadmodel"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// probe asks a Nomad questions and records the answers. Two Nomads behave alike
// if their probes record the same.
type probe struct {
	*testing.T
	client *api.Client
	// living returns the live processes of the job's sandbox; kill ends them.
	living func(jobID string) []int
	kill   func(jobID string)
	// agentDies kills the agent of the i-th node but not what runs there;
	// agentIsBack starts it again. They must not be used on the Nomad that all
	// tests share.
	agentDies, agentIsBack func(i int)
	// restart makes the job's task run again. nodeReboots does so by ending the
	// node's agent and everything that runs there, for a short time.
	restart, nodeReboots func(jobID string)

	dir  string // where processes of the real Nomad write their PIDs
	seen []string
}

// compare asks both the same questions.
func compare(t *testing.T, nomad, model *probe, ask func(*probe)) {
	modelled := make(chan struct{})
	go func() {
		defer close(modelled)
		ask(model)
	}()
	ask(nomad)
	<-modelled
	must.SliceNotEmpty(t, nomad.seen)
	must.Eq(t, nomad.seen, model.seen, must.Sprint("what Nomad says, and what the model says"))
}

func realProbe(t *testing.T, nomad *stack.Nomad) *probe {
	client, err := nomad.Client()
	must.NoError(t, err)
	p := &probe{T: t, client: client, dir: t.TempDir()}
	p.living = func(jobID string) []int {
		data, err := os.ReadFile(filepath.Join(p.dir, jobID))
		if err != nil {
			return nil
		}
		var living []int
		for text := range strings.FieldsSeq(string(data)) {
			pid, err := strconv.Atoi(text)
			must.NoError(t, err)
			if syscall.Kill(pid, 0) == nil {
				living = append(living, pid)
			}
		}
		return living
	}
	p.kill = func(jobID string) {
		for _, pid := range p.living(jobID) {
			must.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
		}
	}
	p.restart = func(jobID string) {
		must.NoError(t, client.Allocations().Restart(&api.Allocation{ID: p.allocs(jobID)[0].ID}, "", nil))
	}
	p.nodeReboots = func(jobID string) {
		for _, pid := range p.living(jobID) {
			executor := parent(t, pid)
			must.NoError(t, nomad.Clients[0].Kill())
			must.NoError(t, syscall.Kill(executor, syscall.SIGKILL))
			must.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
			must.NoError(t, nomad.Clients[0].Start())
		}
	}
	return p
}

// parent returns the process ID of a process's parent.
func parent(t *testing.T, pid int) int {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must.NoError(t, err)
	_, after, _ := strings.Cut(string(data), ") ")
	id, err := strconv.Atoi(strings.Fields(after)[1])
	must.NoError(t, err)
	return id
}

// modelProbe returns a probe of a model in which two allocations fit on a node
// and nothing fails by chance.
func modelProbe(t *testing.T, config nomadmodel.Config) *probe {
	config.Capacity, config.KillAtLast = 2, true
	config.Rand = func(name string) *rand.Rand { return rand.New(rand.NewPCG(1, uint64(len(name)))) }
	config.Started, config.Ended = func(nomadmodel.Process) {}, func(nomadmodel.Process) {}
	config.Trace = func(string) {}
	server := nomadmodel.New(t.Context(), config)
	client, err := api.NewClient(&api.Config{HttpClient: &http.Client{Transport: network.Direct{Server: server}}})
	must.NoError(t, err)
	p := &probe{T: t, client: client, dir: t.TempDir()}
	p.living = func(jobID string) []int {
		var living []int
		for i, process := range server.Processes() {
			if process.JobID == jobID {
				living = append(living, i)
			}
		}
		return living
	}
	p.kill = func(jobID string) {
		for _, process := range server.Processes() {
			if process.JobID == jobID {
				server.Kill(process.AllocID)
			}
		}
	}
	p.restart = func(jobID string) { server.Restart(p.allocs(jobID)[0].ID) }
	p.nodeReboots = func(string) {
		must.True(t, server.PowerOff(0))
		server.Reconnect(0)
	}
	p.agentDies = func(i int) { must.True(t, server.Disconnect(i, true)) }
	p.agentIsBack = server.Reconnect
	return p
}

func (p *probe) see(format string, args ...any) {
	p.seen = append(p.seen, fmt.Sprintf(format, args...))
}

// job returns a sandbox's job like the ones that Bivouac creates. Its process
// ignores requests to stop, so it lives until the kill timeout.
func (p *probe) job() *api.Job {
	id := "probe-" + uuid.NewString()
	script := fmt.Sprintf(`trap "" INT TERM; echo $$ >> %s; while :; do sleep 0.1; done`, filepath.Join(p.dir, id))
	task := api.NewTask("sandbox", "raw_exec")
	task.KillTimeout = new(2 * time.Second)
	task.Config = map[string]any{"command": "/bin/sh", "args": []string{"-c", script}}
	task.Resources = &api.Resources{CPU: new(50), MemoryMB: new(64)}
	task.RestartPolicy = &api.RestartPolicy{Attempts: new(0), Mode: new("fail")}
	return &api.Job{
		ID: new(id), Name: new(id), Type: new("batch"), Datacenters: []string{"*"}, Meta: map[string]string{"of": "a probe"},
		TaskGroups: []*api.TaskGroup{{
			Name: new("sandbox"), Count: new(1), Tasks: []*api.Task{task},
			Networks:         []*api.NetworkResource{{DynamicPorts: []api.Port{{Label: "http"}}}},
			RestartPolicy:    &api.RestartPolicy{Attempts: new(0), Mode: new("fail")},
			ReschedulePolicy: &api.ReschedulePolicy{Attempts: new(0), Unlimited: new(false)},
			Disconnect:       &api.DisconnectStrategy{Replace: new(false), StopOnClientAfter: new(10 * time.Second)},
		}},
	}
}

// first registers a job that must not exist yet and records the answer.
func (p *probe) first(job *api.Job) {
	resp, _, err := p.client.Jobs().EnforceRegister(job, 0, nil)
	if refusal, ok := errors.AsType[api.UnexpectedResponseError](err); ok {
		p.see("refused with %d: %s", refusal.StatusCode(), refusal.Body())
		return
	}
	p.see("registered with an evaluation: %t, error %v", resp != nil && resp.EvalID != "", err)
}

func (p *probe) deregister(id string, purge bool) {
	eval, _, err := p.client.Jobs().Deregister(id, purge, nil)
	p.see("deregistered with an evaluation: %t, error %v", eval != "", err)
}

// look records the state of a job.
func (p *probe) look(id string) {
	job, _, err := p.client.Jobs().Info(id, nil)
	if refusal, ok := errors.AsType[api.UnexpectedResponseError](err); ok {
		p.see("job: refused with %d: %s", refusal.StatusCode(), refusal.Body())
	} else if err != nil {
		p.see("job: %v", err)
	} else {
		p.see("job: stop %t, meta %v, created and registered at once %t, unchanged %t", *job.Stop, job.Meta,
			*job.CreateIndex == *job.JobModifyIndex, *job.CreateIndex == *job.ModifyIndex)
	}
	for _, a := range p.allocs(id) {
		p.see("allocation: desired %s, client %s, task %s, resources in the list %t",
			a.DesiredStatus, a.ClientStatus, taskState(a), a.AllocatedResources != nil)
	}
	for _, e := range p.evals(id) {
		p.see("evaluation: %s by %s, nothing placed %t, blocks another %t",
			e.Status, e.TriggeredBy, len(e.FailedTGAllocs) > 0, e.BlockedEval != "")
	}
	p.see("processes that live: %d", len(p.living(id)))
}

func taskState(a *api.AllocationListStub) string {
	task := a.TaskStates["sandbox"]
	if task == nil {
		return "none"
	}
	return fmt.Sprintf("%s, failed %t, started %t", task.State, task.Failed, !task.StartedAt.IsZero())
}

// lookAtRuns records what Nomad reports about how often the job's task ran.
func (p *probe) lookAtRuns(id string) {
	for _, a := range p.allocs(id) {
		task := a.TaskStates["sandbox"]
		var events []string
		for _, e := range task.Events {
			if slices.Contains([]string{api.TaskStarted, api.TaskRestartSignal, api.TaskTerminated, api.TaskRestarting, "Failed Restoring Task"}, e.Type) {
				events = append(events, e.Type)
			}
		}
		p.see("restarts %d, events %q", task.Restarts, events)
	}
}

// starts returns how often the job's task was started.
func (p *probe) starts(id string) int {
	n := 0
	for _, a := range p.allocs(id) {
		if task := a.TaskStates["sandbox"]; task != nil {
			for _, e := range task.Events {
				if e.Type == api.TaskStarted {
					n++
				}
			}
		}
	}
	return n
}

func (p *probe) allocs(id string) []*api.AllocationListStub {
	allocs, _, err := p.client.Jobs().Allocations(id, true, nil)
	if err != nil {
		p.see("allocations: %v", err)
	}
	slices.SortFunc(allocs, func(a, b *api.AllocationListStub) int { // Nomad returns them unordered
		return cmp.Compare(a.CreateIndex, b.CreateIndex)
	})
	return allocs
}

func (p *probe) evals(id string) []*api.Evaluation {
	evals, _, err := p.client.Jobs().Evaluations(id, nil)
	if err != nil {
		p.see("evaluations: %v", err)
	}
	slices.SortFunc(evals, func(a, b *api.Evaluation) int {
		return strings.Compare(a.TriggeredBy+a.Status, b.TriggeredBy+b.Status)
	})
	return evals
}

// await waits until holds returns true.
func (p *probe) await(what string, holds func() bool) {
	for deadline := time.Now().Add(20 * time.Second); !holds(); <-time.After(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.see("in vain awaited: %s", what)
			return
		}
	}
}

func (p *probe) awaitClient(id, status string) {
	p.await("allocation "+status, func() bool {
		return slices.ContainsFunc(p.allocs(id), func(a *api.AllocationListStub) bool { return a.ClientStatus == status })
	})
}

func (p *probe) awaitDecided(id string, evals int) {
	p.await("decided", func() bool {
		all := p.evals(id)
		return len(all) >= evals && !slices.ContainsFunc(all, func(e *api.Evaluation) bool { return e.Status == "pending" })
	})
}

func (p *probe) awaitProcess(id string, lives bool) {
	p.await(fmt.Sprintf("process lives: %t", lives), func() bool { return (len(p.living(id)) > 0) == lives })
}
