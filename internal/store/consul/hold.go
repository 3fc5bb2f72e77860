package consul

import (
	"sync"
	"time"
)

// hold is what this replica has by one Consul session: leases, while it can
// vouch that the session stands.
type hold struct {
	session string // its ID

	mu       sync.Mutex
	deadline time.Time // of vouching, on the monotonic clock
	ended    bool
	leases   map[*Lease]struct{}
	strays   map[string]stray // by lease ID
	drained  chan struct{}    // once draining: closed when there are no leases
}

func newHold(session string, deadline time.Time) *hold {
	return &hold{
		session:  session,
		deadline: deadline,
		leases:   make(map[*Lease]struct{}),
		strays:   make(map[string]stray),
	}
}

func (h *hold) until() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.deadline
}

func (h *hold) extend(deadline time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.deadline = deadline
}

// over says whether the session can no longer be vouched for. It asks the clock,
// as whoever would have ended the hold in time may have been asleep, too.
func (h *hold) over() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.ended || !time.Now().Before(h.deadline) // safeguard: local deadline of locks
}

// end tells all leases that their locks are lost.
func (h *hold) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ended = true
	for lease := range h.leases {
		close(lease.lost)
	}
	clear(h.leases)
}

// add makes the lease one that is told when the hold ends. It says whether the
// hold still stands.
func (h *hold) add(lease *Lease) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended || h.drained != nil {
		return false
	}
	h.leases[lease] = struct{}{}
	return true
}

// remove forgets a lease that is released, and says whether it was held.
func (h *hold) remove(lease *Lease) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, held := h.leases[lease]
	delete(h.leases, lease)
	if h.drained != nil && len(h.leases) == 0 && held {
		close(h.drained)
	}
	return held
}

// lose tells one lease that its lock is lost.
func (h *hold) lose(lease *Lease) {
	if h.remove(lease) {
		close(lease.lost)
	}
}

// holds says whether the lease's lock can be vouched for.
func (h *hold) holds(lease *Lease) bool {
	if h.over() {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	_, held := h.leases[lease]
	return held
}

// has says whether a lease that is held has its lock at key.
func (h *hold) has(key string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for lease := range h.leases {
		if lease.store.keys.lock(lease.chatID) == key {
			return true
		}
	}
	return false
}

// drain lets no new leases in, and returns a channel that is closed once the
// last is gone.
func (h *hold) drain() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drained = make(chan struct{})
	if len(h.leases) == 0 {
		close(h.drained)
	}
	return h.drained
}
