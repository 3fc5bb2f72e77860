package main

import (
	"bufio"
	"context"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"
)

// containerStarts tells when Docker starts containers, by the UUID at the end of their
// names: the allocation's ID in those of Nomad. It asks the Docker engine of this machine,
// which no Nomad job can do for other nodes.
type containerStarts struct {
	mu   sync.Mutex
	all  map[string]*containerStart
	stop func()
}

// containerStart is the start of one container. The fields are valid once done is closed.
type containerStart struct {
	done chan struct{}
	id   string
	at   time.Time
}

func followContainerStarts(ctx context.Context) (*containerStarts, error) {
	ctx, cancel := context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, "docker", "events", "--filter=event=start", "--format={{.TimeNano}} {{.ID}} {{.Actor.Attributes.name}}")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("docker events: %w", err)
	}
	c := &containerStarts{all: make(map[string]*containerStart)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			var ns int64
			var id, name string
			if _, err := fmt.Sscan(lines.Text(), &ns, &id, &name); err != nil || len(name) < uuidLen {
				continue // a container of somebody else
			}
			start := c.of(name[len(name)-uuidLen:])
			if start.id == "" { // its first start
				start.id, start.at = id, time.Unix(0, ns)
				close(start.done)
			}
		}
	}()
	c.stop = func() {
		cancel()
		<-ended
		_ = cmd.Wait() // it was killed
	}
	return c, nil
}

const uuidLen = len("00000000-0000-0000-0000-000000000000")

func (c *containerStarts) of(uuid string) *containerStart {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all[uuid] == nil {
		c.all[uuid] = &containerStart{done: make(chan struct{})}
	}
	return c.all[uuid]
}

// times returns when Docker began to create a container, and when it had started it.
func (c *containerStarts) times(ctx context.Context, uuid string) (created, started time.Time, err error) {
	start := c.of(uuid)
	select {
	case <-start.done:
	case <-ctx.Done():
		return time.Time{}, time.Time{}, ctx.Err()
	}
	out, err := exec.CommandContext(ctx, "docker", "inspect", "--format={{.Created}}", start.id).Output()
	if err != nil {
		return time.Time{}, time.Time{}, fmt.Errorf("docker inspect: %w", err)
	}
	created, err = time.Parse(time.RFC3339Nano, strings.TrimSpace(string(out)))
	return created, start.at, err
}

// untilAnswersAtBest is like untilAnswers, but first connects when the container has
// started. No caller of Nomad's API can know a better moment.
func (r *rawNomad) untilAnswersAtBest(ctx context.Context, id string, starts *containerStarts) error {
	return r.untilAnswersAfter(ctx, id, func(alloc *api.Allocation) error {
		select {
		case <-starts.of(alloc.ID).done:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
}
