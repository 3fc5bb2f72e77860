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
	"github.com/bivouac/bivouac/internal/broadcast"
	"github.com/bivouac/bivouac/scheduler"
)

const (
	// sessionTTL is the shortest TTL that Consul accepts. Consul ends a session that
	// was not renewed for that long, at the latest after twice that time.
	sessionTTL = 10 * time.Second
	// renewInterval leaves time for two failed tries.
	renewInterval = 3 * time.Second
	// renewTimeout bounds one try.
	renewTimeout = 2 * time.Second
	// vouchFor is how long a renewal is relied on, counted from its start. It is less
	// than the TTL, because clocks run at different speeds.
	vouchFor = sessionTTL - time.Second
	// drainLimit is how long a clean shutdown waits until leases are released.
	drainLimit = 5 * time.Second
	// tellEvery is how often a lasting outage is logged.
	tellEvery = time.Minute
)

// sessionKeeper keeps this replica's Consul session, and creates a new one when it ends.
type sessionKeeper struct {
	store *Store
	self  Replica
	wake  chan struct{} // requests a renewal now

	mu      sync.Mutex
	hold    *heldSession // nil while there is no session
	failed  error        // why there is none, once that is known
	changed broadcast.Cond
}

func newKeeper(store *Store, self Replica) *sessionKeeper {
	k := &sessionKeeper{store: store, self: self, wake: make(chan struct{}, 1)}
	k.changed.L = &k.mu
	return k
}

// current returns a valid hold. If the Consul session is just being created, it waits
// for that, within a limit.
func (k *sessionKeeper) current(ctx context.Context) (*heldSession, error) {
	limited, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	var hold *heldSession
	var failed error
	err := k.changed.Wait(limited, func() bool {
		hold, failed = k.hold, k.failed
		return failed != nil || hold != nil && !hold.over()
	})
	switch {
	case ctx.Err() != nil && err != nil:
		return nil, ctx.Err()
	case err != nil:
		return nil, fmt.Errorf("%w: no Consul session within %v", scheduler.ErrUnavailable, requestTimeout)
	case failed != nil:
		return nil, noSession(failed)
	}
	return hold, nil
}

// trouble returns why there is no Consul session, or nil if there is one or soon will
// be.
func (k *sessionKeeper) trouble() error {
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
		what = "no Consul session: only the Consul agent's own datacenter can create one; do not set consul { datacenter } to another: "
	}
	return unavailable(what, why)
}

func (k *sessionKeeper) set(hold *heldSession, failed error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.hold, k.failed = hold, failed
	k.changed.Broadcast()
}

// look requests a renewal now. It is called if the Consul session may be gone or a lock
// may have been left behind.
func (k *sessionKeeper) look() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// run keeps a Consul session of the instance until ctx ends, and then destroys it.
func (k *sessionKeeper) run(ctx context.Context, instance string) {
	var last string // a session that may still exist in Consul
	var told backoff.Throttle
	wait := backoff.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
	for ctx.Err() == nil {
		hold, err := k.create(ctx, instance)
		if err != nil {
			k.set(nil, err)
			k.store.log.Log(told.Level(), "consul_session_create_failed", "error", err)
			_ = backoff.Sleep(ctx, wait.Next())
			continue
		}
		wait.Reset()
		told.Reset()
		k.destroy(ctx, last) // otherwise its locks would block this replica until its TTL
		last = hold.session
		k.store.log.Debug("consul_session_created", "session", hold.session)
		k.set(hold, nil)
		k.keep(ctx, hold)
		hold.end()
		k.set(nil, nil)
	}
	k.set(nil, errors.New("shutting down"))
	k.destroy(context.WithoutCancel(ctx), last)
}

// create creates a Consul session without health checks, because a Consul agent that
// seems dead for a moment must not take away its replicas' locks. Consul deletes the
// session's lock keys with the session. The session needs no lock-delay, because every
// write checks its lock. But 0 would mean Consul's default of 15 s, so the lock-delay
// is the shortest possible.
func (k *sessionKeeper) create(ctx context.Context, instance string) (*heldSession, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	began := time.Now()
	id, _, err := k.store.client.Session().CreateNoChecks(&api.SessionEntry{
		Name:      "bivouac " + instance + " on " + k.self.Name,
		TTL:       sessionTTL.String(),
		LockDelay: time.Nanosecond, // the client makes this 1 ms
		Behavior:  api.SessionBehaviorDelete,
	}, (&api.WriteOptions{}).WithContext(ctx))
	if err != nil {
		return nil, err
	}
	return newHold(id, began.Add(vouchFor)), nil
}

// keep renews the Consul session until it is lost, or until ctx has ended and no lease
// is left.
func (k *sessionKeeper) keep(ctx context.Context, h *heldSession) {
	// Locks that are held when ctx ends stay valid until they are released.
	renewing := context.WithoutCancel(ctx)
	stop := ctx.Done()
	var drained <-chan struct{}
	var limit <-chan time.Time
	next := time.NewTimer(renewInterval)
	defer next.Stop()
	registered := k.register(renewing, h, 0)
	for {
		select { // check this first: nothing is left to renew the session for
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
			k.store.log.Warn("consul_session_ended_with_locks", "session", h.session)
			return
		case <-next.C:
		case <-k.wake:
		}
		select { // one renewal is enough for both
		case <-k.wake:
		default:
		}
		stands, err := k.renew(renewing, h)
		switch {
		case !stands:
			k.store.log.Warn("consul_session_lost", "session", h.session)
			return
		case err == nil:
			registered = k.register(renewing, h, registered)
			next.Reset(renewInterval)
		case h.over():
			k.store.log.Warn("consul_session_not_renewed", "session", h.session, "error", err)
			return
		default:
			k.store.log.Debug("consul_session_renew_failed", "session", h.session, "error", err)
			next.Reset(min(renewInterval/6, time.Until(h.until())))
		}
		k.store.clearLeftovers(renewing, h)
	}
}

// renew tries to renew the Consul session once. stands is false only if Consul answers
// that there is no such session.
func (k *sessionKeeper) renew(ctx context.Context, h *heldSession) (stands bool, err error) {
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

// destroy destroys a Consul session that is no longer used. If that fails, the session
// ends with its TTL.
func (k *sessionKeeper) destroy(ctx context.Context, session string) {
	if session == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	if _, err := k.store.client.Session().Destroy(session, (&api.WriteOptions{}).WithContext(ctx)); err != nil {
		k.store.log.Warn("consul_session_destroy_failed", "session", session, "error", err)
	}
}
