package consul

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/scheduler"
)

const (
	// sessionTTL is the least that Consul takes. It ends a session that was not
	// renewed for so long, and at the latest after twice as long.
	sessionTTL = 10 * time.Second
	// renewInterval leaves room for two failed tries.
	renewInterval = 3 * time.Second
	// renewTimeout bounds one try.
	renewTimeout = 2 * time.Second
	// vouchFor is how long after the start of a renewal the session is relied
	// on. It is less than the TTL, since clocks run at different speeds.
	vouchFor = sessionTTL - time.Second
	// drainLimit is how long a clean end waits for leases to be released.
	drainLimit = 5 * time.Second
	// tellEvery is how often an outage is told of that goes on.
	tellEvery = time.Minute
)

// keeper has this replica's Consul session, and makes a new one when it ends.
type keeper struct {
	store *Store
	name  string
	wake  chan struct{} // asks for a look at the session now

	mu      sync.Mutex
	hold    *hold         // nil while there is no session
	failed  error         // why there is none, once it is known
	changed chan struct{} // closed when hold or failed changes
}

func newKeeper(store *Store, name string) *keeper {
	return &keeper{store: store, name: name, wake: make(chan struct{}, 1), changed: make(chan struct{})}
}

// current returns the hold on a session that can be relied on. While one is
// being made it waits for that, within a limit.
func (k *keeper) current(ctx context.Context) (*hold, error) {
	limited, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	for {
		k.mu.Lock()
		hold, failed, changed := k.hold, k.failed, k.changed
		k.mu.Unlock()
		switch {
		case hold != nil && !hold.over():
			return hold, nil
		case failed != nil:
			return nil, noSession(failed)
		}
		select {
		case <-changed:
		case <-limited.Done():
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, fmt.Errorf("%w: no Consul session within %v", scheduler.ErrUnavailable, requestTimeout)
		}
	}
}

// trouble says why there is no session, nil where there is one or will soon be.
func (k *keeper) trouble() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.failed != nil {
		return noSession(k.failed)
	}
	return nil
}

func noSession(why error) error {
	what := "no Consul session: "
	if strings.Contains(why.Error(), "Missing node registration") {
		what = "no Consul session, which only the datacenter of the Consul agent that is asked can give; do not set consul { datacenter } to another: "
	}
	return unavailable(what, why)
}

func (k *keeper) set(hold *hold, failed error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.hold, k.failed = hold, failed
	close(k.changed)
	k.changed = make(chan struct{})
}

// look asks for a renewal soon, where there is reason to think that the session
// is gone or that a lock was left behind.
func (k *keeper) look() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// run keeps a session of the instance until ctx ends, and then ends it.
func (k *keeper) run(ctx context.Context, instance string) {
	var last string // session that may still stand in Consul
	var told backoff.Throttle
	wait := backoff.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
	for ctx.Err() == nil {
		hold, err := k.create(ctx, instance)
		if err != nil {
			k.set(nil, err)
			k.store.log.Log(told.Level(), "cannot create a Consul session", "error", err)
			_ = backoff.Sleep(ctx, wait.Next())
			continue
		}
		wait.Reset()
		told.Reset()
		k.destroy(ctx, last) // or its locks would stand in our own way until its TTL
		last = hold.session
		k.store.log.Debug("created a Consul session", "session", hold.session)
		k.set(hold, nil)
		k.keep(ctx, hold)
		hold.end()
		k.set(nil, nil)
	}
	k.set(nil, errors.New("shutting down"))
	k.destroy(context.WithoutCancel(ctx), last)
}

// create makes a session that depends on no health check: an agent that is
// thought dead for a moment must not cost its replicas their locks. Its lock
// keys vanish with it. A lock-delay would protect nothing, as writes are
// fenced; 0 would mean Consul's default of 15 s, so it is the least above.
func (k *keeper) create(ctx context.Context, instance string) (*hold, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	began := time.Now()
	id, _, err := k.store.client.Session().CreateNoChecks(&api.SessionEntry{
		Name:      "bivouac " + instance + " on " + k.name,
		TTL:       sessionTTL.String(),
		LockDelay: time.Nanosecond, // which the client makes 1 ms
		Behavior:  api.SessionBehaviorDelete,
	}, (&api.WriteOptions{}).WithContext(ctx))
	if err != nil {
		return nil, err
	}
	return newHold(id, began.Add(vouchFor)), nil
}

// keep renews the session, until it is over or ctx ended and no lease is left.
func (k *keeper) keep(ctx context.Context, h *hold) {
	// What is held when ctx ends is still held until it is released.
	renewing := context.WithoutCancel(ctx)
	stop := ctx.Done()
	var drained <-chan struct{}
	var limit <-chan time.Time
	next := time.NewTimer(renewInterval)
	defer next.Stop()
	for {
		select { // first: there is nothing left to renew it for
		case <-drained:
			return
		default:
		}
		select {
		case <-stop:
			stop, drained, limit = nil, h.drain(), time.After(drainLimit)
			k.set(nil, errors.New("shutting down"))
			continue
		case <-drained:
			return
		case <-limit:
			k.store.log.Warn("ending the Consul session while locks are held", "session", h.session)
			return
		case <-next.C:
		case <-k.wake:
		}
		select { // one look is enough for both
		case <-k.wake:
		default:
		}
		stands, err := k.renew(renewing, h)
		switch {
		case !stands:
			k.store.log.Warn("the Consul session is gone, and all locks with it", "session", h.session)
			return
		case err == nil:
			next.Reset(renewInterval)
		case h.over():
			k.store.log.Warn("the Consul session could not be renewed in time, all locks are given up",
				"session", h.session, "error", err)
			return
		default:
			k.store.log.Debug("cannot renew the Consul session", "session", h.session, "error", err)
			next.Reset(min(renewInterval/6, time.Until(h.until())))
		}
		k.store.clearStrays(renewing, h)
	}
}

// renew makes one try. stands is false only where Consul said that there is no
// such session.
func (k *keeper) renew(ctx context.Context, h *hold) (stands bool, err error) {
	began := time.Now()
	until := h.until()
	if limit := began.Add(renewTimeout); limit.Before(until) {
		until = limit
	}
	ctx, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	entry, _, err := k.store.client.Session().Renew(h.session, (&api.WriteOptions{}).WithContext(ctx))
	if err != nil {
		return true, err
	}
	if entry == nil {
		return false, nil
	}
	h.extend(began.Add(vouchFor))
	return true, nil
}

// destroy ends a session that we no longer use. Where that fails its TTL ends it.
func (k *keeper) destroy(ctx context.Context, session string) {
	if session == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	if _, err := k.store.client.Session().Destroy(session, (&api.WriteOptions{}).WithContext(ctx)); err != nil {
		k.store.log.Warn("cannot destroy a Consul session, it ends by itself", "session", session, "error", err)
	}
}
