package nomad

import (
	"context"
	"hash/maphash"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/internal/broadcast"
	"github.com/bivouac/bivouac/jobs"
)

// cache holds the states of this instance's jobs, by job ID. The event stream and
// all other reads from Nomad update it, in any order. For each part of a state the
// newest version wins. The states are packed. The events of a running sandbox's tasks
// are kept only while somebody waits for it.
type cache struct {
	instance *instance
	purged   *recent[struct{}] // job IDs that this driver purged: ignore their late events
	past     *recent[state]    // the last states of jobs that were purged, for Explain
	seed     maphash.Seed

	mu      sync.Mutex
	entries map[string]*entry
	chats   map[uint64][]string // IDs of this instance's jobs in entries, by the hash of their chat
	feeds   map[*feed]struct{}
	current bool           // the event stream is open, and everything before it was read
	became  broadcast.Cond // current
	breaks  uint64         // how often the stream was lost
}

// entry has as few bytes as possible, because there is one for each sandbox.
type entry struct {
	packed  packed
	waiters map[*waiter]struct{} // nil if there are none
	ended   int64                // when its state last changed, in seconds since 1970, if that is ended; otherwise 0
}

// waiter is notified when one job's state changes.
type waiter struct{ C chan struct{} }

// feed collects the IDs of all jobs whose state changed.
type feed struct {
	C chan struct{}

	mu      sync.Mutex
	changed map[string]*state // for a job that is no longer in the cache, its last state
}

// change is a job whose state changed.
type change struct {
	jobID   string
	removed *state // its last state, if it is no longer in the cache
}

func newCache(instance *instance) *cache {
	c := &cache{
		instance: instance,
		purged:   newRecent[struct{}](maxRecent),
		past:     newRecent[state](maxPast),
		seed:     maphash.MakeSeed(),
		entries:  make(map[string]*entry),
		chats:    make(map[uint64][]string),
		feeds:    make(map[*feed]struct{}),
	}
	c.became.L = &c.mu
	return c
}

// get returns what is known about a job. current is true if that is up to date.
func (c *cache) get(jobID string) (s state, current bool) {
	c.mu.Lock()
	var p packed
	if e := c.entries[jobID]; e != nil {
		p = e.packed
	}
	current = c.current
	c.mu.Unlock()
	return p.unpack(jobID), current
}

// ofChat returns the IDs of a chat's jobs, in order. current is true if these are
// all of them.
func (c *cache) ofChat(chatID string) (jobIDs []string, current bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, jobID := range c.chats[c.hash(chatID)] {
		if c.chatOf(c.entries[jobID].packed.unpack(jobID)) == chatID {
			jobIDs = append(jobIDs, jobID)
		}
	}
	slices.Sort(jobIDs)
	return jobIDs, c.current
}

func (c *cache) hash(chatID string) uint64 { return maphash.String(c.seed, chatID) }

// chatOf returns the chat under which a job is in chats, or "" if it is in none.
func (c *cache) chatOf(s state) string {
	if !c.isOurs(s) {
		return ""
	}
	return s.meta()[jobs.MetaChatID]
}

// isOurs reports whether a job exists and is this instance's.
func (c *cache) isOurs(s state) bool {
	return s.known && c.instance.owns(s.job.Meta[jobs.MetaInstance])
}

// reindex updates chats after the state of a job changed. The caller holds mu.
func (c *cache) reindex(jobID string, before, after state) {
	from, to := c.chatOf(before), c.chatOf(after)
	if from == to {
		return
	}
	if from != "" {
		key := c.hash(from)
		c.chats[key] = slices.DeleteFunc(c.chats[key], func(id string) bool { return id == jobID })
		if len(c.chats[key]) == 0 {
			delete(c.chats, key)
		}
	}
	if to != "" {
		key := c.hash(to)
		c.chats[key] = append(c.chats[key], jobID)
	}
}

func (c *cache) isCurrent() bool {
	current, _ := c.stream()
	return current
}

// stream reports whether the event stream is open, and how often it was lost. If
// that number has not changed, no event was missed in between.
func (c *cache) stream() (current bool, breaks uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.current, c.breaks
}

// setCurrent sets whether the cache is current and wakes all waiters and feeds.
func (c *cache) setCurrent(current bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current && !current {
		c.breaks++
	}
	c.current = current
	c.became.Broadcast()
	for _, e := range c.entries {
		e.wake()
	}
	for f := range c.feeds {
		notify(f.C)
	}
}

func (e *entry) wake() {
	for w := range e.waiters {
		notify(w.C)
	}
}

func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// await returns a waiter for one job, and a function that ends the waiting.
func (c *cache) await(jobID string) (w *waiter, done func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	w = &waiter{C: make(chan struct{}, 1)}
	e := c.entries[jobID]
	if e == nil {
		e = new(entry)
		c.entries[jobID] = e
	}
	if e.waiters == nil {
		e.waiters = make(map[*waiter]struct{})
	}
	e.waiters[w] = struct{}{}
	return w, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(e.waiters, w)
		if len(e.waiters) > 0 {
			return
		}
		e.waiters = nil
		s := e.packed.unpack(jobID)
		if e.packed = pack(s, false); !s.known && c.entries[jobID] == e {
			delete(c.entries, jobID)
		}
	}
}

// subscribe returns a feed of all changes, and a function that ends it.
func (c *cache) subscribe() (f *feed, done func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f = &feed{C: make(chan struct{}, 1), changed: make(map[string]*state)}
	for id := range c.entries {
		f.changed[id] = nil
	}
	notify(f.C)
	c.feeds[f] = struct{}{}
	return f, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.feeds, f)
	}
}

// take returns the changed jobs since the last call, in order of their IDs.
func (f *feed) take() []change {
	f.mu.Lock()
	changed := f.changed
	f.changed = make(map[string]*state) // the old one may be large
	f.mu.Unlock()
	changes := make([]change, 0, len(changed))
	for jobID, removed := range changed {
		changes = append(changes, change{jobID, removed})
	}
	slices.SortFunc(changes, func(a, b change) int { return strings.Compare(a.jobID, b.jobID) })
	return changes
}

// add adds a change. removed is nil unless the job was removed from the cache.
func (f *feed) add(jobID string, removed *state) {
	f.mu.Lock()
	if removed != nil || f.changed[jobID] == nil {
		f.changed[jobID] = removed
	}
	f.mu.Unlock()
	notify(f.C)
}

// update changes a job's state and returns the new one. It keeps other instances'
// jobs only while somebody waits for them.
func (c *cache) update(jobID string, change func(state) (state, bool)) state {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[jobID]
	if e == nil {
		e = new(entry)
	}
	before := e.packed.unpack(jobID)
	next, news := change(before)
	if !news {
		return before
	}
	e.packed, e.ended = pack(next, len(e.waiters) > 0), 0
	if next.isOver() {
		e.ended = time.Now().Unix()
	}
	c.reindex(jobID, before, next)
	// A job that is not known to be this instance's is kept only while somebody
	// waits for it.
	if c.isOurs(next) {
		if c.entries[jobID] == nil { // else it would keep another copy of the ID than chats does
			c.entries[jobID] = e
		}
	} else if len(e.waiters) == 0 {
		delete(c.entries, jobID)
		if !next.gone {
			return next
		}
	}
	var removed *state
	if c.isOurs(before) && !c.isOurs(next) {
		removed = &before
	}
	e.wake()
	for f := range c.feeds {
		f.add(jobID, removed)
	}
	return next
}

func (c *cache) updateJob(job jobFields) {
	if !c.purged.has(job.ID) {
		c.update(job.ID, func(s state) (state, bool) { return s.withJob(job) })
	}
}

func (c *cache) updateAlloc(alloc *api.AllocationListStub) {
	c.update(alloc.JobID, func(s state) (state, bool) { return s.withAlloc(alloc) })
}

func (c *cache) updateEval(eval *api.Evaluation) {
	c.update(eval.JobID, func(s state) (state, bool) { return s.withEval(eval) })
}

// setReady records that an allocation's endpoint has answered.
func (c *cache) setReady(jobID, allocID string) {
	c.update(jobID, func(s state) (state, bool) {
		s.ready = allocID
		return s, true
	})
}

// setClaim records what a node's helper says that a spare was claimed for. It ignores what
// the helper cannot know: the spare must run on its node. It returns false if the spare is
// not known.
func (c *cache) setClaim(jobID, nodeID string, claim claim) (known bool) {
	c.update(jobID, func(s state) (state, bool) {
		alloc := s.sandboxAlloc()
		known = alloc != nil
		if !known || alloc.ID != claim.allocID || alloc.NodeID != nodeID || s.claim.allocID == claim.allocID {
			return s, false
		}
		s.claim = claim
		return s, true
	})
	return known
}

// setCollected records that a Nomad client has removed an allocation.
func (c *cache) setCollected(jobID, allocID string) {
	c.update(jobID, func(s state) (state, bool) {
		s.collected = allocID
		return s, true
	})
}

// setWhole records that all of a job was read.
func (c *cache) setWhole(jobID string) {
	c.update(jobID, func(s state) (state, bool) {
		news := s.known && !s.whole
		s.whole = s.whole || s.known
		return s, news
	})
}

// forget records that a job was purged.
func (c *cache) forget(jobID string) {
	c.update(jobID, func(s state) (state, bool) {
		if s.known {
			c.past.add(jobID, s)
		}
		return state{gone: true}, s.known
	})
}

// keepOnly forgets the jobs that are missing from listed, a complete list made at
// index.
func (c *cache) keepOnly(listed map[string]struct{}, index uint64) {
	c.mu.Lock()
	var missing []string
	for id, e := range c.entries {
		if _, ok := listed[id]; ok {
			continue
		}
		if s := e.packed.unpack(id); s.known && s.job.ModifyIndex < index {
			missing = append(missing, id)
		}
	}
	c.mu.Unlock()
	for _, id := range missing {
		c.forget(id)
	}
}

const (
	sweepEvery = time.Minute
	// keepEnded is how long ended sandboxes stay in memory. Nomad keeps them longer,
	// so later questions are answered by a request to Nomad.
	keepEnded = 10 * time.Minute
)

func (c *cache) sweepUntil(ctx context.Context) {
	for backoff.Sleep(ctx, sweepEvery) == nil {
		c.sweep(time.Now().Add(-keepEnded))
	}
}

// sweep removes ended sandboxes whose last change is before a time.
func (c *cache) sweep(before time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, e := range c.entries {
		if len(e.waiters) > 0 || e.ended == 0 || e.ended >= before.Unix() {
			continue
		}
		s := e.packed.unpack(id)
		delete(c.entries, id)
		c.reindex(id, s, state{})
		for f := range c.feeds {
			f.add(id, &s)
		}
	}
}

// sessionOf returns the session ID in the ID of a Bivouac job.
func sessionOf(jobID string) (string, bool) { return strings.CutPrefix(jobID, jobs.IDPrefix) }
