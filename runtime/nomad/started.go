package nomad

import (
	"context"
	"fmt"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/backoff"
)

// Docker opens a container's port on the node before the container's network is up. A
// connection in between has Linux ask for the container's address, and ask again only
// after a second. All connections wait for that, so a check that begins too early makes
// the start a second longer, however often it tries.
//
// Docker 28 and later announce the address by unsolicited ARPs once the network is up. Such
// an ARP ends the wait of connections at once. (Tried with a bridge and an ARP made by hand,
// not with Docker 28: 500 ms instead of 1,024, if the bridge did not drop it.) There a check
// that begins early loses nothing as a rule, and one that asks first loses at most the
// pause between two questions.
//
// So the check waits until the node says that the container has started. Nomad's servers
// report that up to a second late. But the Nomad client refuses to read the logs of a
// task that has not started, and it knows at once.

const (
	// maxLooks bounds the concurrent questions whether a task has started or ended.
	maxLooks = 8
	// lookLimit is how long one may take.
	lookLimit = 2 * time.Second
	// Pauses between two of them.
	minLookPause = 5 * time.Millisecond
	maxLookPause = 50 * time.Millisecond
	// lookShare makes a pause 1/32 of the time waited so far, so a start is noticed 3 %
	// later at most.
	lookShare = 32
	// rememberedStarts is how many of the last starts decide when the questions begin.
	rememberedStarts = 16
)

// dockerTasks returns the names of a job's main tasks that run in Docker.
func dockerTasks(job *api.Job) []string {
	var names []string
	for _, group := range job.TaskGroups {
		for _, task := range group.Tasks {
			if task.Driver == "docker" && task.Lifecycle == nil {
				names = append(names, task.Name)
			}
		}
	}
	return names
}

// awaitStart returns once all the launch's Docker tasks have started, or once ctx ends.
// If the Nomad client does not tell, it waits for Nomad's servers to say so if certain is
// set, and otherwise returns at once.
func (l *launch) awaitStart(ctx context.Context, allocID string, certain bool) {
	if len(l.docker) == 0 {
		return
	}
	began := time.Now()
	// No start was faster than half of the fastest of the last ones.
	pause := l.driver.starts.fastest() / 2
	for _, task := range l.docker {
		for backoff.Sleep(ctx, pause) == nil && !l.hasStarted() {
			starting, err := l.driver.isStarting(ctx, allocID, task)
			if err != nil && !certain {
				return
			}
			if err == nil && !starting {
				break
			}
			pause = min(max(time.Since(began)/lookShare, minLookPause), maxLookPause)
		}
		pause = 0
	}
	if ctx.Err() == nil {
		l.driver.starts.add(time.Since(began))
	}
}

// hasStarted reports whether Nomad's servers say that all tasks have started.
func (l *launch) hasStarted() bool {
	s, _ := l.driver.cache.get(l.jobID)
	alloc := s.sandboxAlloc()
	return alloc != nil && allStarted(alloc)
}

// isStarting reports whether a Nomad client has received an allocation but not yet
// started its task, or has not received it yet. It returns an error if the client does
// not tell.
func (d *Driver) isStarting(ctx context.Context, allocID, task string) (bool, error) {
	path := fmt.Sprintf("/v1/client/fs/logs/%s?%s", allocID, url.Values{
		"task": {task}, "type": {"stdout"}, "plain": {"true"}, "origin": {"end"},
	}.Encode())
	err := d.query(ctx, limits{"look", d.looks, lookLimit}, func(opts *api.QueryOptions) error {
		body, err := d.client.Raw().Response(path, opts)
		if err != nil {
			return err
		}
		return body.Close()
	})
	switch {
	case isNotStarted(err), isUnknownAlloc(err):
		return true, nil
	case isNotFound(err): // it has started, and has no logs
		return false, nil
	default:
		return false, err
	}
}

// startTimes remembers how long the last starts took.
type startTimes struct {
	mu   sync.Mutex
	last []time.Duration // oldest first
}

func (s *startTimes) add(took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = append(s.last, took)
	if len(s.last) > rememberedStarts {
		s.last = slices.Delete(s.last, 0, len(s.last)-rememberedStarts)
	}
}

// fastest returns the shortest of the last starts, or 0 if there was none.
func (s *startTimes) fastest() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.last) == 0 {
		return 0
	}
	return slices.Min(s.last)
}
