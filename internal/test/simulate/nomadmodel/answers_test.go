package nomadmodel_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/test/simulate/nomadmodel"
	"github.com/bivouac/bivouac/internal/test/stack"
)

func TestMain(m *testing.M) { os.Exit(stack.Main(m)) }

// TestModelAnswersAsNomadDoes asks the model and a real Nomad the same
// questions.
func TestModelAnswersAsNomadDoes(t *testing.T) {
	for name, ask := range map[string]func(*probe){
		"register":     (*probe).register,
		"tombstone":    (*probe).tombstone,
		"at once":      (*probe).atOnce,
		"stop":         (*probe).stop,
		"purge alive":  (*probe).purgeAlive,
		"no room":      (*probe).noRoom,
		"sandbox dies": (*probe).sandboxDies,
		"restarted":    (*probe).restarted,
		"poststop":     (*probe).poststop,
		"collect":      (*probe).collect,
		"missing":      (*probe).missing,
		"events":       (*probe).events,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			compare(t, realProbe(t, stack.NomadForTest(t)), modelProbe(t, nomadmodel.Config{Nodes: 1}), ask)
		})
	}
}

func (p *probe) register() {
	job := p.job()
	p.first(job)
	p.awaitProcess(*job.ID, true)
	p.awaitClient(*job.ID, "running")
	p.first(job)
	p.look(*job.ID)
	p.deregister(*job.ID, false)
	p.awaitClient(*job.ID, "complete")
	p.first(job)
}

// atOnce shows that several first registrations can succeed. Nomad checks the
// index before the log, so several may pass the check before one of them is in
// the log.
func (p *probe) atOnce() {
	var most int32
	for tries := 0; most < 2 && tries < 100; tries++ {
		stone := p.stone()
		var all sync.WaitGroup
		var taken atomic.Int32
		for range 8 {
			all.Go(func() {
				if _, _, err := p.client.Jobs().EnforceRegister(stone, 0, nil); err == nil {
					taken.Add(1)
				}
			})
		}
		all.Wait()
		most = max(most, taken.Load())
		if _, _, err := p.client.Jobs().Deregister(*stone.ID, true, nil); err != nil {
			p.see("purge: %v", err)
		}
	}
	p.see("at most one is taken: %t, none: %t", most == 1, most == 0)
}

// stone returns a job that runs nothing.
func (p *probe) stone() *api.Job {
	stone := p.job()
	stone.Stop = new(true)
	stone.TaskGroups[0].Count, stone.TaskGroups[0].Networks, stone.TaskGroups[0].Disconnect = new(0), nil, nil
	return stone
}

func (p *probe) tombstone() {
	job := p.job()
	stone := p.stone()
	stone.ID = job.ID
	p.first(stone)
	p.awaitDecided(*job.ID, 1)
	p.look(*job.ID)
	p.first(job)
	p.first(stone)
	p.deregister(*job.ID, true)
	p.awaitDecided(*job.ID, 2)
	p.look(*job.ID)
}

func (p *probe) stop() {
	job := p.job()
	p.first(job)
	p.awaitProcess(*job.ID, true)
	p.awaitClient(*job.ID, "running")
	began := time.Now()
	p.deregister(*job.ID, false)
	p.see("it returned before the process could end: %t", time.Since(began) < time.Second)
	p.awaitDecided(*job.ID, 2)
	p.look(*job.ID)
	p.awaitProcess(*job.ID, false)
	p.see("the process lived for the kill timeout: %t", time.Since(began) >= 2*time.Second)
	p.awaitClient(*job.ID, "complete")
	p.look(*job.ID)
	p.deregister(*job.ID, true)
	p.see("allocations: %d", len(p.allocs(*job.ID)))
}

func (p *probe) purgeAlive() {
	job := p.job()
	p.first(job)
	p.awaitProcess(*job.ID, true)
	p.awaitClient(*job.ID, "running")
	p.deregister(*job.ID, true)
	p.see("allocations: %d, processes that live: %d", len(p.allocs(*job.ID)), len(p.living(*job.ID)))
	p.awaitProcess(*job.ID, false)
}

func (p *probe) noRoom() {
	job := p.job()
	job.TaskGroups[0].Tasks[0].Resources.MemoryMB = new(1 << 30)
	p.first(job)
	p.awaitDecided(*job.ID, 2)
	p.look(*job.ID)
	p.deregister(*job.ID, false)
	p.await("what was blocked is given up", func() bool {
		return slices.ContainsFunc(p.evals(*job.ID), func(e *api.Evaluation) bool { return e.Status == "canceled" })
	})
	p.awaitDecided(*job.ID, 3)
	p.look(*job.ID)
}

func (p *probe) sandboxDies() {
	job := p.job()
	p.first(job)
	p.awaitProcess(*job.ID, true)
	p.awaitClient(*job.ID, "running")
	p.kill(*job.ID)
	p.awaitClient(*job.ID, "failed")
	<-time.After(time.Second) // no replacement may appear
	p.look(*job.ID)
	p.deregister(*job.ID, false)
}

// restarted shows that a client can start a task again in the same allocation,
// although the restart policy forbids restarts.
func (p *probe) restarted() { p.runsAgainAfter(p.restart) }

// runsAgainAfter shows the states of a job whose task runs a second time after again.
func (p *probe) runsAgainAfter(again func(jobID string)) {
	job := p.job()
	p.first(job)
	p.awaitProcess(*job.ID, true)
	p.awaitClient(*job.ID, "running")
	again(*job.ID)
	p.await("another run", func() bool { return p.starts(*job.ID) == 2 })
	p.awaitProcess(*job.ID, true)
	p.lookAtRuns(*job.ID)
	p.look(*job.ID)
	p.deregister(*job.ID, false)
	p.awaitProcess(*job.ID, false)
	p.awaitClient(*job.ID, "complete")
}

// poststop shows that Nomad does not stop a poststop task, which runs after the
// main task has ended. The allocation runs until the poststop task ends, unless
// the main task failed.
func (p *probe) poststop() {
	for _, asked := range []bool{true, false} {
		job := p.job()
		last := api.NewTask("last", "raw_exec")
		last.Lifecycle = &api.TaskLifecycle{Hook: api.TaskLifecycleHookPoststop}
		last.Config = map[string]any{"command": "/bin/sleep", "args": []string{"3"}}
		last.Meta = map[string]string{"lasts": "3s"}
		last.Resources, last.RestartPolicy = job.TaskGroups[0].Tasks[0].Resources, job.TaskGroups[0].RestartPolicy
		job.TaskGroups[0].Tasks = append(job.TaskGroups[0].Tasks, last)
		lastTask := func() *api.TaskState {
			for _, a := range p.allocs(*job.ID) {
				if task := a.TaskStates["last"]; task != nil {
					return task
				}
			}
			return &api.TaskState{State: "not known"}
		}
		p.first(job)
		p.awaitProcess(*job.ID, true)
		p.awaitClient(*job.ID, "running")
		p.see("the last task is %s", lastTask().State)
		if asked {
			p.deregister(*job.ID, false)
		} else {
			p.kill(*job.ID)
		}
		p.awaitProcess(*job.ID, false)
		p.await("the last task runs", func() bool { return lastTask().State == "running" })
		p.look(*job.ID)
		if !asked {
			p.deregister(*job.ID, false)
		}
		p.await("the last task has ended", func() bool { return lastTask().State == "dead" })
		p.see("it ran to its end: %t", lastTask().FinishedAt.Sub(lastTask().StartedAt) > 2*time.Second)
		p.look(*job.ID)
	}
}

// collect has the client garbage-collect an allocation: while it runs, while its process
// does not obey a request to end, and once it has ended, before and after the client has
// reported that.
func (p *probe) collect() {
	job := p.job()
	p.first(job)
	p.awaitProcess(*job.ID, true)
	allocID := p.allocs(*job.ID)[0].ID
	try := func(id string) error {
		_, err := p.client.Raw().Write("/v1/client/allocation/"+id+"/gc", nil, nil, nil)
		return err
	}
	see := func(err error) {
		if refusal, ok := errors.AsType[api.UnexpectedResponseError](err); ok {
			p.see("refused with %d: %s", refusal.StatusCode(), refusal.Body())
			return
		}
		p.see("collected with error %v", err)
	}
	see(try(allocID))
	p.awaitClient(*job.ID, "running")
	see(try(allocID))
	p.deregister(*job.ID, false)
	see(try(allocID))
	p.await("collected", func() bool { return try(allocID) == nil })
	p.see("processes that live: %d", len(p.living(*job.ID)))
	see(try(allocID))
	p.awaitClient(*job.ID, "complete")
	p.look(*job.ID)

	err := try(uuid.NewString())
	refusal, _ := errors.AsType[api.UnexpectedResponseError](err)
	p.see("unknown: %d", refusal.StatusCode())
}

func (p *probe) missing() {
	id := "probe-" + uuid.NewString()
	p.look(id)
	p.deregister(id, false)
	p.deregister(id, true)
	_, _, err := p.client.Allocations().Info(uuid.NewString(), nil)
	refusal, _ := errors.AsType[api.UnexpectedResponseError](err)
	p.see("allocation: %d", refusal.StatusCode())
	_, _, err = p.client.Nodes().Info(uuid.NewString(), nil)
	refusal, _ = errors.AsType[api.UnexpectedResponseError](err)
	p.see("node: %d", refusal.StatusCode())
	p.nodes(uuid.NewString())
	p.nodes("")
}

// nodes lists the nodes whose IDs begin with a prefix.
func (p *probe) nodes(prefix string) {
	nodes, _, err := p.client.Nodes().List(&api.QueryOptions{Prefix: prefix})
	if err != nil {
		p.see("nodes: %v", err)
		return
	}
	for _, n := range nodes {
		p.see("nodes: %s %s drain=%t", n.Status, n.SchedulingEligibility, n.Drain)
	}
	p.see("nodes: %d", len(nodes))
}

// events follows the event stream while a job runs and is purged.
func (p *probe) events() {
	ctx, cancel := context.WithCancel(p.Context())
	defer cancel()
	body, err := p.client.Raw().Response("/v1/event/stream?topic=Job&topic=Allocation&topic=Evaluation",
		(&api.QueryOptions{}).WithContext(ctx))
	if err != nil {
		p.see("stream: %v", err)
		return
	}
	defer body.Close()
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, 1<<20)
	lines.Scan()
	p.see("first: %s", lines.Text())

	job := p.job()
	p.first(job)
	running, complete := false, false
	told := make(map[string]bool) // their order and number may vary
	for !complete && lines.Scan() {
		var batch struct {
			Events []struct {
				Topic, Key string
				FilterKeys []string
				Payload    struct {
					Job        *struct{ ID string }
					Deleted    bool
					Allocation *api.AllocationListStub
					Evaluation *api.Evaluation
				}
			}
		}
		if err := json.Unmarshal(lines.Bytes(), &batch); err != nil {
			p.see("event: %v", err)
			return
		}
		for _, e := range batch.Events {
			switch a := e.Payload.Allocation; {
			case e.Topic == "Job" && e.Key == *job.ID:
				told[fmt.Sprintf("job, names itself %t, deleted %t", e.Payload.Job.ID == e.Key, e.Payload.Deleted)] = true
			case a != nil && a.JobID == *job.ID:
				told[fmt.Sprintf("allocation, filed under its job %t, with resources %t",
					slices.Contains(e.FilterKeys, *job.ID), a.AllocatedResources != nil)] = true
				if a.ClientStatus == "running" && !running {
					running = true
					p.deregister(*job.ID, false)
				}
				complete = a.ClientStatus == "complete"
			case e.Payload.Evaluation != nil && e.Payload.Evaluation.JobID == *job.ID:
				told[fmt.Sprintf("evaluation %s, filed under its job %t",
					e.Payload.Evaluation.Status, slices.Contains(e.FilterKeys, *job.ID))] = true
			}
		}
	}
	for _, what := range slices.Sorted(func(yield func(string) bool) {
		for what := range told {
			if !yield(what) {
				return
			}
		}
	}) {
		p.see("%s", what)
	}
	p.deregister(*job.ID, true)
}
