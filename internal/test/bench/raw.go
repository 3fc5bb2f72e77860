package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// rawNomad does directly what Bivouac has Nomad do: it registers the same jobs,
// watches them through one event stream and runs the same readiness check.
type rawNomad struct {
	client   *api.Client
	template *jobs.Template
	volume   string

	mu      sync.Mutex
	waiting map[string]chan *api.Allocation // by job ID
	close   func()                          // ends the event stream
	ended   chan struct{}
}

// newRawNomad uses the named job template. Call close when done.
func newRawNomad(ctx context.Context, w *world, templateName string) (*rawNomad, error) {
	vars := map[string]string{"command": w.binary}
	if templateName == "docker" {
		vars = map[string]string{"image": w.image}
	}
	template, err := jobs.Load(templateName, vars)
	if err != nil {
		return nil, err
	}
	client, err := w.nomad.Client()
	if err != nil {
		return nil, err
	}
	volume, err := w.volume()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	events, err := client.EventStream().Stream(ctx, map[api.Topic][]string{api.TopicAllocation: {"*"}}, 0, nil)
	if err != nil {
		cancel()
		return nil, err
	}
	r := &rawNomad{client: client, template: template, volume: volume,
		waiting: make(map[string]chan *api.Allocation), ended: make(chan struct{})}
	r.close = func() {
		cancel()
		<-r.ended
	}
	go func() {
		defer close(r.ended)
		for batch := range events {
			for _, e := range batch.Events {
				if alloc, err := e.Allocation(); err == nil && alloc != nil {
					r.tell(alloc)
				}
			}
		}
	}()
	return r, nil
}

func (r *rawNomad) tell(alloc *api.Allocation) {
	r.mu.Lock()
	ch := r.waiting[alloc.JobID]
	r.mu.Unlock()
	if ch != nil {
		select {
		case ch <- alloc:
		default: // nobody reads that many events
		}
	}
}

// register registers a session's job. It calls done with each event of the
// job's allocation until done returns true.
func (r *rawNomad) register(ctx context.Context, id string, done func(*api.Allocation) (bool, error)) error {
	now := time.Now()
	job, err := r.template.Job(runtime.Spec{SessionID: id, ChatID: uuid.NewString(), AgentID: "bench",
		VolumeHostPath: r.volume, CreatedAt: now, ExpiresAt: now.Add(time.Hour)}, "raw")
	if err != nil {
		return err
	}
	ch := make(chan *api.Allocation, 64)
	r.mu.Lock()
	r.waiting[*job.ID] = ch
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		delete(r.waiting, *job.ID)
		r.mu.Unlock()
	}()
	if _, _, err := r.client.Jobs().Register(job, nil); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		select {
		case alloc := <-ch:
			if alloc.ClientStatus == api.AllocClientStatusFailed {
				return fmt.Errorf("allocation %s failed", alloc.ID)
			}
			if ok, err := done(alloc); ok || err != nil {
				return err
			}
		case <-r.ended:
			return errors.New("the event stream ended")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// untilAnswers registers a job and returns when its port answers.
func (r *rawNomad) untilAnswers(ctx context.Context, id string) error {
	return r.untilAnswersAfter(ctx, id, func(*api.Allocation) error { return nil })
}

// untilAnswersAfter is like untilAnswers, but first connects once await has returned, which
// gets the allocation with its port.
func (r *rawNomad) untilAnswersAfter(ctx context.Context, id string, await func(*api.Allocation) error) error {
	return r.register(ctx, id, func(alloc *api.Allocation) (bool, error) {
		if alloc.AllocatedResources == nil || len(alloc.AllocatedResources.Shared.Ports) == 0 {
			return false, nil
		}
		port := alloc.AllocatedResources.Shared.Ports[0]
		ip, err := netip.ParseAddr(port.HostIP)
		if err != nil {
			return false, err
		}
		if err := await(alloc); err != nil {
			return false, err
		}
		return true, r.template.Ready().Check.Wait(ctx, runtime.Endpoint{IP: ip, Port: uint16(port.Value)}, id)
	})
}

// untilRunning registers a job and returns when Nomad reports it as running.
func (r *rawNomad) untilRunning(ctx context.Context, id string) error {
	return r.register(ctx, id, func(alloc *api.Allocation) (bool, error) {
		return alloc.ClientStatus == api.AllocClientStatusRunning, nil
	})
}

// remove stops a job and waits until its allocations have ended.
func (r *rawNomad) remove(ctx context.Context, id string) error {
	if _, _, err := r.client.Jobs().Deregister(jobs.ID(id), false, nil); err != nil {
		return err
	}
	var index uint64
	for {
		q := (&api.QueryOptions{WaitIndex: index, WaitTime: 30 * time.Second}).WithContext(ctx)
		allocs, meta, err := r.client.Jobs().Allocations(jobs.ID(id), true, q)
		if err != nil {
			return err
		}
		live := 0
		for _, a := range allocs {
			if a.ClientStatus == api.AllocClientStatusPending || a.ClientStatus == api.AllocClientStatusRunning {
				live++
			}
		}
		if live == 0 {
			_, _, err := r.client.Jobs().Deregister(jobs.ID(id), true, nil)
			return err
		}
		index = meta.LastIndex
	}
}

// dockerRun runs the demo image as a docker user would and returns when its
// port answers.
func dockerRun(ctx context.Context, image, volume, id string, check func(context.Context, runtime.Endpoint) error) error {
	port, err := stack.FreePort(0)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "docker", "run", "--detach", "--name=bench-"+id,
		fmt.Sprintf("--publish=127.0.0.1:%d:8080", port), "--volume="+volume+":/workspace",
		"--env=PORT=8080", "--env=BIVOUAC_BIND=0.0.0.0", "--env=BIVOUAC_SESSION_ID="+id, image)
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("docker run: %w: %s", err, strings.TrimSpace(string(text)))
	}
	return check(ctx, runtime.Endpoint{IP: netip.MustParseAddr("127.0.0.1"), Port: uint16(port)})
}

func dockerRemove(ctx context.Context, id string) error {
	cmd := exec.CommandContext(ctx, "docker", "rm", "--force", "bench-"+id)
	cmd.Stderr = os.Stderr
	return cmd.Run()
}
