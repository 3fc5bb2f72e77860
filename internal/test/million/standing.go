package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"runtime"
	"strconv"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/api"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/jobs"
	sandboxes "github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/nomad"
)

const (
	// perNode is how many of the standing allocations are on one node.
	perNode  = 100
	instance = "million"
	// firstIndex is the index of the lists. The events come later.
	firstIndex = 10_000_000
)

// standingNomad is a Nomad with one running job for each of the first sessions. It
// calculates each answer and keeps nothing.
type standingNomad struct {
	meta  map[string]string // of one of its jobs
	count int
	began time.Time
	// settle is closed to send an evaluation of each job, and then the end of the first
	// job's allocation.
	settle chan struct{}
}

// ServeHTTP answers the requests that a driver makes to follow Nomad's events.
func (n *standingNomad) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Nomad-Index", strconv.Itoa(firstIndex))
	w.Header().Set("X-Nomad-LastContact", "0") // without it the client ignores the header of the next page
	switch r.URL.Path {
	case "/v1/jobs":
		page(w, r, n.count, n.jobStub)
	case "/v1/allocations":
		page(w, r, n.count, n.allocStub)
	case "/v1/event/stream":
		n.stream(w, r)
	default:
		http.NotFound(w, r)
	}
}

// page answers with one page of a list of n entries. A page's token is the number of its
// first entry.
func page[T any](w http.ResponseWriter, r *http.Request, n int, entry func(uint32) T) {
	query := r.URL.Query()
	first, _ := strconv.Atoi(query.Get("next_token")) // none: the first page
	size, _ := strconv.Atoi(query.Get("per_page"))
	last := min(first+size, n)
	if last < n {
		w.Header().Set("X-Nomad-NextToken", strconv.Itoa(last))
	}
	entries := make([]T, 0, size)
	for i := first; i < last; i++ {
		entries = append(entries, entry(uint32(i)))
	}
	_ = json.NewEncoder(w).Encode(entries) // the driver notices a broken answer
}

// stream sends a heartbeat, and once it is told to, the events.
func (n *standingNomad) stream(w http.ResponseWriter, r *http.Request) {
	encoder := json.NewEncoder(w)
	flush := http.NewResponseController(w)
	send := func(message any) error { return errors.Join(encoder.Encode(message), flush.Flush()) }
	if send(struct{}{}) != nil {
		return
	}
	select {
	case <-n.settle:
	case <-r.Context().Done():
		return
	}
	for i := range n.count {
		eval := n.eval(uint32(i))
		if send(event("Evaluation", eval.JobID, map[string]any{"Evaluation": eval})) != nil {
			return
		}
	}
	ended := n.allocStub(0)
	ended.ModifyIndex, ended.ClientStatus = firstIndex+1, api.AllocClientStatusFailed
	for _, task := range ended.TaskStates {
		task.State = "dead"
	}
	if send(event("Allocation", ended.JobID, map[string]any{"Allocation": ended})) != nil {
		return
	}
	<-r.Context().Done()
}

func event(topic, jobID string, payload any) map[string]any {
	return map[string]any{"Index": firstIndex + 1, "Events": []any{map[string]any{
		"Topic": topic, "FilterKeys": []string{jobID}, "Payload": payload,
	}}}
}

func (n *standingNomad) jobStub(i uint32) *api.JobListStub {
	spec := specOf(i, n.began)
	meta := maps.Clone(n.meta)
	maps.Copy(meta, map[string]string{
		jobs.MetaSessionID: spec.SessionID, jobs.MetaChatID: spec.ChatID, jobs.MetaAgentID: spec.AgentID, jobs.MetaVolumeHostPath: spec.VolumeHostPath,
		jobs.MetaCreatedAt: spec.CreatedAt.UTC().Format(time.RFC3339Nano), jobs.MetaExpiresAt: spec.ExpiresAt.UTC().Format(time.RFC3339Nano),
		jobs.MetaSpec: jobs.Fingerprint(spec),
	})
	jobID := jobs.ID(spec.SessionID)
	index := indexOfJob(i)
	return &api.JobListStub{
		ID: jobID, Name: jobID, Namespace: "default", Datacenters: []string{"dc1"}, Type: "batch", Status: "running", Meta: meta,
		JobSummary:  &api.JobSummary{JobID: jobID, Summary: map[string]api.TaskGroupSummary{"sandbox": {Running: 1}}},
		CreateIndex: index, ModifyIndex: index + 4, JobModifyIndex: index, SubmitTime: n.began.UnixNano() + int64(i),
	}
}

// specOf returns the spec of the i-th standing session.
func specOf(i uint32, now time.Time) sandboxes.Spec {
	session := sessionOf(i, now)
	return sandboxes.Spec{
		SessionID: session.SessionID.String(), ChatID: session.ChatID.String(), AgentID: session.AgentID,
		VolumeHostPath: session.VolumeHostPath, CreatedAt: session.CreatedAt, ExpiresAt: session.ExpiresAt, Owner: session.Owner,
	}
}

// indexOfJob is the index at which the i-th job was registered. The next ones are those of
// its evaluation, its allocation and the reports of it.
func indexOfJob(i uint32) uint64 { return 1000 + 5*uint64(i) }

func (n *standingNomad) allocStub(i uint32) *api.AllocationListStub {
	jobID := jobs.ID(ofSession.id(i).String())
	node := i / perNode
	address := fmt.Sprintf("10.%d.%d.%d", node/62500, node/250%250, node%250+1)
	port := api.PortMapping{Label: "http", Value: 20000 + 97*int(i%perNode), To: 8080, HostIP: address}
	network := &api.NetworkResource{Mode: "host", Device: "eth0", CIDR: address + "/32", IP: address, DynamicPorts: []api.Port{{Label: "http", Value: port.Value, To: 8080}}}
	began := n.began.Add(time.Duration(i) * time.Microsecond)
	var events []*api.TaskEvent
	for k, kind := range []string{api.TaskReceived, api.TaskSetup, api.TaskStarted} {
		message := []string{"Task received by client", "Building Task Directory", "Task started by client"}[k]
		events = append(events, &api.TaskEvent{
			Type: kind, Time: began.Add(time.Duration(k) * 50 * time.Millisecond).UnixNano(), DisplayMessage: message,
			Details: map[string]string{"message": message},
		})
	}
	return &api.AllocationListStub{
		ID: ofContainer.id(i).String(), EvalID: ofEvaluation.id(i).String(), Name: jobID + ".sandbox[0]", Namespace: "default",
		NodeID: ofNode.id(node).String(), NodeName: fmt.Sprintf("node-%d.example.net", node), JobID: jobID, JobType: "batch", TaskGroup: "sandbox",
		AllocatedResources: &api.AllocatedResources{
			Tasks: map[string]*api.AllocatedTaskResources{"sandbox": {
				Cpu: api.AllocatedCpuResources{CpuShares: 500}, Memory: api.AllocatedMemoryResources{MemoryMB: 512}, Networks: []*api.NetworkResource{network},
			}},
			Shared: api.AllocatedSharedResources{DiskMB: 300, Networks: []*api.NetworkResource{network}, Ports: []api.PortMapping{port}},
		},
		DesiredStatus: api.AllocDesiredStatusRun, ClientStatus: api.AllocClientStatusRunning, ClientDescription: "Tasks are running",
		TaskStates: map[string]*api.TaskState{"sandbox": {
			State: "running", StartedAt: time.Unix(0, events[len(events)-1].Time).UTC(), Events: events,
		}},
		DeploymentStatus: nil, CreateIndex: indexOfJob(i) + 2, ModifyIndex: indexOfJob(i) + 3,
		CreateTime: began.UnixNano(), ModifyTime: began.Add(time.Second).UnixNano(),
	}
}

func (n *standingNomad) eval(i uint32) *api.Evaluation {
	created := n.began.UnixNano() + int64(i)
	return &api.Evaluation{
		ID: ofEvaluation.id(i).String(), Priority: 50, Type: "batch", TriggeredBy: "job-register", Namespace: "default",
		JobID: jobs.ID(ofSession.id(i).String()), JobModifyIndex: indexOfJob(i), Status: "complete", ClassEligibility: map[string]bool{"v1:1234567890": true},
		QueuedAllocations: map[string]int{"sandbox": 0}, SnapshotIndex: indexOfJob(i),
		CreateIndex: indexOfJob(i), ModifyIndex: indexOfJob(i) + 2, CreateTime: created, ModifyTime: created + int64(20*time.Millisecond),
	}
}

// nomadRow measures the heap of the Nomad driver with few and with many running sandboxes,
// for each of those that are more. The model driver keeps none.
func nomadRow(ctx context.Context, few, many int) (row, error) {
	const what = "heap of the Nomad driver without garbage, per session"
	less, err := nomadHeap(ctx, few)
	if err != nil {
		return row{}, fmt.Errorf("%s: %w", what, err)
	}
	more, err := nomadHeap(ctx, many)
	if err != nil {
		return row{}, fmt.Errorf("%s: %w", what, err)
	}
	return row{what: what, unit: "bytes", many: float64(more-less) / float64(many-few), aim: most(maxPerSandbox)}, nil
}

// maxPerSandbox is how many bytes of heap the Nomad driver may keep for each sandbox.
const maxPerSandbox = 450

// maxSandboxes is how many sandboxes the row of the Nomad driver has at most. It is per
// sandbox, and more of them only take longer: each takes half a millisecond.
const maxSandboxes = 100_000

// nomadHeap returns how many bytes of heap the Nomad driver keeps for a number of running
// sandboxes.
func nomadHeap(ctx context.Context, records int) (bytes int64, err error) {
	template, err := jobs.Load("docker", map[string]string{"image": "sandbox:1"})
	if err != nil {
		return 0, err
	}
	server := &standingNomad{count: records, began: time.Now(), settle: make(chan struct{})}
	job, err := template.Job(specOf(0, server.began), instance)
	if err != nil {
		return 0, err
	}
	server.meta = job.Meta
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	serving := &http.Server{Handler: server, ReadHeaderTimeout: time.Minute}
	client, err := api.NewClient(&api.Config{Address: "http://" + listener.Addr().String()})
	if err != nil {
		return 0, errors.Join(err, listener.Close())
	}
	driver, err := nomad.New(nomad.Config{Client: client, Template: template, Instance: instance, Logger: hclog.NewNullLogger()})
	if err != nil {
		return 0, errors.Join(err, listener.Close())
	}
	before := heap()
	running, stop := context.WithCancel(ctx)
	settled := make(chan struct{}, 1) // the driver reported the end of the first sandbox
	var g errgroup.Group
	g.Go(func() error { return unless(running, serving.Serve(listener)) })
	g.Go(func() error { return unless(running, driver.Run(running)) })
	g.Go(func() error {
		return unless(running, driver.Watch(running, func(sandboxes.Sandbox) {
			select {
			case settled <- struct{}{}:
			default:
			}
		}))
	})
	defer func() {
		stop()
		err = errors.Join(err, serving.Close(), g.Wait())
	}()
	if err := driver.Current(ctx); err != nil {
		return 0, err
	}
	close(server.settle)
	select {
	case <-settled:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	after := heap()
	for same := 0; same < 10; same++ { // until then it is still at work on the last events
		if err := backoff.Sleep(ctx, 200*time.Millisecond); err != nil {
			return 0, err
		}
		if now := heap(); now < after-after/100 {
			after, same = now, 0
		}
	}
	_, err = driver.Inspect(ctx, sandboxOf(0).SessionID) // it still has them
	return after - before, err
}

// unless returns err unless ctx has ended.
func unless(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	return nil
}

// heap returns the bytes of heap in use after a garbage collection. What a finalizer or a
// pool held is free only after the second one.
func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
