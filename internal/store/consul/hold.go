package consul

import (
	"sync"
	"time"
)

// heldSession is one Consul session of this replica with its leases. It is valid until its
// deadline, before which Consul cannot have ended the session.
type heldSession struct {
	session string // the Consul session's ID

	mu        sync.Mutex
	deadline  time.Time // on the monotonic clock
	ended     bool
	leases    map[*Lease]struct{}
	leftovers map[string]leftoverLock // by lease ID
	drained   chan struct{}           // set by drain; closed when there are no leases
}

func newHold(session string, deadline time.Time) *heldSession {
	return &heldSession{
		session:   session,
		deadline:  deadline,
		leases:    make(map[*Lease]struct{}),
		leftovers: make(map[string]leftoverLock),
	}
}

func (h *heldSession) until() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.deadline
}

func (h *heldSession) extend(deadline time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.deadline = deadline
}

// over reports whether the hold is no longer valid. It looks at the clock, because
// the goroutine that ends the hold in time may have been suspended too.
func (h *heldSession) over() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.ended || !time.Now().Before(h.deadline) // safeguard: local deadline of locks
}

// end ends the hold and closes the lost channel of all its leases.
func (h *heldSession) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ended = true
	for lease := range h.leases {
		close(lease.lost)
	}
	clear(h.leases)
}

// add adds a lease. It returns false if the hold has ended or is being drained.
func (h *heldSession) add(lease *Lease) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended || h.drained != nil {
		return false
	}
	h.leases[lease] = struct{}{}
	return true
}

// remove removes a lease, and reports whether it was held.
func (h *heldSession) remove(lease *Lease) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, held := h.leases[lease]
	delete(h.leases, lease)
	if h.drained != nil && len(h.leases) == 0 && held {
		close(h.drained)
	}
	return held
}

// lose removes one lease and closes its lost channel.
func (h *heldSession) lose(lease *Lease) {
	if h.remove(lease) {
		close(lease.lost)
	}
}

// holds reports whether the lease surely has its lock.
func (h *heldSession) holds(lease *Lease) bool {
	if h.over() {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	_, held := h.leases[lease]
	return held
}

// has reports whether a held lease has its lock at key.
func (h *heldSession) has(key string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for lease := range h.leases {
		if lease.store.keys.lock(lease.chatID) == key {
			return true
		}
	}
	return false
}

// drain refuses new leases, and returns a channel that is closed once the last one
// is removed.
func (h *heldSession) drain() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drained = make(chan struct{})
	if len(h.leases) == 0 {
		close(h.drained)
	}
	return h.drained
}
