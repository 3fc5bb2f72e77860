package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	consulapi "github.com/hashicorp/consul/api"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/test/stack"
)

const (
	// sessionTTL is the TTL of a replica's Consul session.
	sessionTTL = 10 * time.Second
	// pastTTL is longer than twice sessionTTL. After that time, others can take
	// a replica's locks.
	pastTTL = 2*sessionTTL + 4*time.Second
	// farOff is how far a replica's clock may be off, in either direction, so
	// that two clocks differ by up to 5 minutes.
	farOff = 150 * time.Second
)

// replicaFaults returns the faults that hit one replica. At least one of the
// three replicas is always spared.
func (w *world) replicaFaults(r *replica) []fault {
	suffers := func(name string, lasts time.Duration, f func(context.Context) error) fault {
		return fault{name, lasts, w.out, func(ctx context.Context) error {
			err := f(ctx)
			if readyErr := w.recovered(ctx, r, r.WaitReady(ctx)); readyErr != nil {
				return readyErr
			}
			return err
		}}
	}
	troubled := func(name string, p *proxy, t trouble, from, to time.Duration) fault {
		return suffers(name, to+5*time.Second, func(ctx context.Context) error {
			r.awaitBusy(ctx)
			p.trouble(t)
			defer p.trouble(trouble{})
			pause(ctx, w.between(from, to))
			return nil
		})
	}
	holderPaused := func(before string, p *proxy, at moment, ask func(context.Context, *replica, uuid.UUID)) fault {
		return suffers("replica paused past 2 x TTL before "+before, 40*time.Second, func(ctx context.Context) error {
			return w.pauseAt(ctx, r, p, at, ask)
		})
	}
	lossy := trouble{loseReply: 0.25, loseRequest: 0.1, late: 0.15}
	faults := []fault{
		suffers("replica killed", 15*time.Second, func(ctx context.Context) error { return w.killAndStart(ctx, r) }),
		suffers("replica killed, back with its clock off", 15*time.Second, func(ctx context.Context) error {
			r.clock = w.between(-farOff, farOff)
			w.log.note("the clock of %s is off by %s", r.name, r.clock)
			return w.killAndStart(ctx, r)
		}),
		suffers("replica paused for less than the TTL", 15*time.Second, func(ctx context.Context) error {
			return w.pauseReplica(ctx, r, w.between(time.Second, sessionTTL-time.Second))
		}),
		holderPaused("register", r.consul, recorded("creating"), w.recreate),
		holderPaused("the last write", r.nomad, startSent, w.recreate),
		holderPaused("a stop", r.consul, recorded("stopping"), w.createAndDelete),
		suffers("replica told to stop", 20*time.Second, func(ctx context.Context) error {
			r.awaitBusy(ctx)
			return r.restart(ctx, w.log)
		}),
		troubled("replica cut off from Consul", r.consul, trouble{cut: true}, 12*time.Second, 22*time.Second),
		troubled("replica cut off from Nomad", r.nomad, trouble{cut: true}, 5*time.Second, 14*time.Second),
		troubled("replies of Consul lost or late", r.consul, lossy, 5*time.Second, 9*time.Second),
		troubled("replies of Nomad lost or late", r.nomad, lossy, 5*time.Second, 9*time.Second),
		troubled("429 from Consul", r.consul, trouble{refuse: 0.7}, 4*time.Second, 7*time.Second),
		troubled("429 from Nomad", r.nomad, trouble{refuse: 0.7}, 4*time.Second, 7*time.Second),
	}
	if w.pools == nil {
		return faults
	}
	return append(faults,
		suffers("replica killed while it fills the pool", 25*time.Second, func(ctx context.Context) error {
			return w.killFilling(ctx, r)
		}),
		suffers("pool resized on one replica", 20*time.Second, func(ctx context.Context) error {
			return w.reconfigure(ctx, r, func(p *pooling) {
				p.size = leastSpares + (p.size-leastSpares+1+w.below(mostSpares-leastSpares))%(mostSpares-leastSpares+1)
			})
		}),
		suffers("job template changed on one replica", 20*time.Second, func(ctx context.Context) error {
			return w.reconfigure(ctx, r, func(p *pooling) { p.memory++ })
		}),
	)
}

// recovered returns err. If the replica ended by itself, it records a violation
// and starts the replica again instead.
func (w *world) recovered(ctx context.Context, r *replica, err error) error {
	if !errors.Is(err, stack.ErrEnded) {
		return err
	}
	w.log.violation(wrong, r.name, "%v", err)
	return r.start(ctx)
}

// awaitBusy waits until the replica is in the middle of a request, at most 3 s.
func (r *replica) awaitBusy(ctx context.Context) {
	limit := time.Now().Add(3 * time.Second)
	for r.busy.Load() == 0 && ctx.Err() == nil && time.Now().Before(limit) {
		pause(ctx, 2*time.Millisecond)
	}
}

func (w *world) killAndStart(ctx context.Context, r *replica) error {
	r.awaitBusy(ctx)
	pause(ctx, w.between(0, 200*time.Millisecond))
	if err := r.Kill(); err != nil {
		return err
	}
	pause(ctx, w.between(0, 4*time.Second))
	return r.start(ctx)
}

func (w *world) pauseReplica(ctx context.Context, r *replica, d time.Duration) error {
	r.awaitBusy(ctx)
	pause(ctx, w.between(0, 200*time.Millisecond))
	if err := r.Pause(); err != nil {
		return err
	}
	pause(ctx, d)
	return r.Resume()
}

// pauseAt pauses the replica until its locks have expired, at a moment of an
// operation that ask starts: the server has carried out a request, and the
// replica has not received the answer.
func (w *world) pauseAt(ctx context.Context, r *replica, p *proxy, at moment, ask func(context.Context, *replica, uuid.UUID)) error {
	var once sync.Once
	reached := make(chan error, 1)
	p.tell(func(req *http.Request, body []byte) {
		if at(req, body) {
			once.Do(func() { reached <- r.halt() })
		}
	})
	defer p.tell(nil)
	var asking errgroup.Group
	asking.Go(func() error { ask(ctx, r, w.chats[w.below(len(w.chats)/2)]); return nil })
	defer func() { _ = asking.Wait() }() // it returns no error
	select {
	case err := <-reached:
		if err != nil {
			return err
		}
	case <-time.After(8 * time.Second):
		once.Do(func() { reached <- errMissed })
		if err := <-reached; err != nil {
			return err
		}
	}
	pause(ctx, pastTTL)
	return r.Resume()
}

// halt pauses the replica and returns when it is paused.
func (r *replica) halt() error {
	err := r.Pause()
	if !r.Running() {
		return errMissed
	}
	return err
}

// recreate deletes a chat's session through another replica and creates it
// again through r. The calls record their results.
func (w *world) recreate(ctx context.Context, r *replica, chat uuid.UUID) {
	_ = w.load.delete(ctx, w.another(r), chat, tryLimit)
	_ = w.load.create(ctx, r, chat, w.load.input("agent-1", 10*time.Minute), tryLimit)
}

// createAndDelete creates a chat's session through another replica and deletes
// it through r. The calls record their results.
func (w *world) createAndDelete(ctx context.Context, r *replica, chat uuid.UUID) {
	_ = w.load.create(ctx, w.another(r), chat, w.load.input("agent-1", 10*time.Minute), tryLimit)
	_ = w.load.delete(ctx, r, chat, tryLimit)
}

// another draws a replica other than than.
func (w *world) another(than *replica) *replica {
	for {
		if r := w.replicas[w.below(replicas)]; r != than {
			return r
		}
	}
}

// moment reports whether a request marks a certain moment in a replica's
// operation.
type moment func(r *http.Request, body []byte) bool

// jobSent is the moment when Nomad has received a job.
func jobSent(r *http.Request, _ []byte) bool {
	return r.Method == http.MethodPut && r.URL.Path == "/v1/jobs"
}

// startSent is the moment when Nomad has received a job, or has answered a claim what it
// knows about the spare's node.
func startSent(r *http.Request, body []byte) bool {
	return jobSent(r, body) || r.Method == http.MethodGet && r.URL.Path == "/v1/nodes"
}

// recorded returns the moment when Consul has a session's record in the given
// state.
func recorded(state string) moment {
	return func(r *http.Request, body []byte) bool {
		var ops consulapi.TxnOps
		if r.Method != http.MethodPut || r.URL.Path != "/v1/txn" || json.Unmarshal(body, &ops) != nil {
			return false
		}
		for _, op := range ops {
			if op.KV == nil || !strings.HasPrefix(op.KV.Key, prefix+"v1/sessions/") {
				continue
			}
			var rec record
			if json.Unmarshal(op.KV.Value, &rec) == nil && rec.State == state {
				return true
			}
		}
		return false
	}
}
