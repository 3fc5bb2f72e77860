package nomad

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/jobs"
)

// cache holds the states of this instance's jobs, by job ID. The event stream and
// all other reads from Nomad update it, in any order. For each part of a state the
// newest version wins.
type cache struct {
	instance *instance
	purged   *recent // job IDs that this driver purged: ignore their late events

	mu      sync.Mutex
	entries map[string]*entry
	chats   map[string]map[string]struct{} // IDs of this instance's jobs in entries, by chat
	feeds   map[*feed]struct{}
	current bool   // the event stream is open, and everything before it was read
	breaks  uint64 // how often the stream was lost
}

type entry struct {
	state   state
	changed time.Time
	waiters map[*waiter]struct{}
	chat    string // its chat in the cache's chats; empty if it is in none
}

// waiter is notified when one job's state changes.
type waiter struct{ C chan struct{} }

// feed collects the IDs of all jobs whose state changed.
type feed struct {
	C chan struct{}

	mu      sync.Mutex
	changed map[string]struct{}
}

func newCache(instance *instance) *cache {
	return &cache{
		instance: instance,
		purged:   newRecent(),
		entries:  make(map[string]*entry),
		chats:    make(map[string]map[string]struct{}),
		feeds:    make(map[*feed]struct{}),
	}
}

// get returns what is known about a job. current is true if that is up to date.
func (c *cache) get(jobID string) (s state, current bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.entries[jobID]; e != nil {
		s = e.state
	}
	return s, c.current
}

// ofChat returns the IDs of a chat's jobs, in order. current is true if these are
// all of them.
func (c *cache) ofChat(chatID string) (jobIDs []string, current bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Sorted(maps.Keys(c.chats[chatID])), c.current
}

// reindex updates chats after a job's entry changed or was removed. The caller
// holds mu.
func (c *cache) reindex(jobID string, e *entry) {
	var chat string
	if c.entries[jobID] == e && e.state.known && c.instance.owns(e.state.job.Meta[jobs.MetaInstance]) {
		chat = e.state.job.Meta[jobs.MetaChatID]
	}
	if chat == e.chat {
		return
	}
	delete(c.chats[e.chat], jobID)
	if len(c.chats[e.chat]) == 0 {
		delete(c.chats, e.chat)
	}
	e.chat = chat
	if chat == "" {
		return
	}
	if c.chats[chat] == nil {
		c.chats[chat] = make(map[string]struct{})
	}
	c.chats[chat][jobID] = struct{}{}
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
		e = &entry{waiters: make(map[*waiter]struct{})}
		c.entries[jobID] = e
	}
	e.waiters[w] = struct{}{}
	return w, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(e.waiters, w)
		if len(e.waiters) == 0 && !e.state.known && c.entries[jobID] == e {
			delete(c.entries, jobID)
		}
	}
}

// subscribe returns a feed of all changes, and a function that ends it.
func (c *cache) subscribe() (f *feed, done func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f = &feed{C: make(chan struct{}, 1), changed: make(map[string]struct{})}
	for id := range c.entries {
		f.changed[id] = struct{}{}
	}
	notify(f.C)
	c.feeds[f] = struct{}{}
	return f, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.feeds, f)
	}
}

// take returns the changed jobs since the last call, in order.
func (f *feed) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	changed := slices.Sorted(maps.Keys(f.changed))
	clear(f.changed)
	return changed
}

func (f *feed) add(jobID string) {
	f.mu.Lock()
	f.changed[jobID] = struct{}{}
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
		e = &entry{waiters: make(map[*waiter]struct{})}
	}
	next, news := change(e.state)
	if !news {
		return e.state
	}
	e.state, e.changed = next, time.Now()
	defer c.reindex(jobID, e)
	// A job that is not known to be this instance's is kept only while somebody
	// waits for it.
	if next.known && c.instance.owns(next.job.Meta[jobs.MetaInstance]) {
		c.entries[jobID] = e
	} else if len(e.waiters) == 0 {
		delete(c.entries, jobID)
		if !next.gone {
			return next
		}
	}
	e.wake()
	for f := range c.feeds {
		f.add(jobID)
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
	c.update(jobID, func(s state) (state, bool) { return state{gone: true}, s.known })
}

// keepOnly forgets the jobs that are missing from listed, a complete list made at
// index.
func (c *cache) keepOnly(listed map[string]struct{}, index uint64) {
	c.mu.Lock()
	var missing []string
	for id, e := range c.entries {
		if _, ok := listed[id]; !ok && e.state.known && e.state.job.ModifyIndex < index {
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
		ended := e.state.job.Stop || len(e.state.allocs) > 0
		if len(e.waiters) == 0 && ended && e.state.allEnded() && e.changed.Before(before) {
			delete(c.entries, id)
			c.reindex(id, e)
			for f := range c.feeds {
				f.add(id)
			}
		}
	}
}

// sessionOf returns the session ID in the ID of a Bivouac job.
func sessionOf(jobID string) (string, bool) { return strings.CutPrefix(jobID, jobs.IDPrefix) }

// maxRecent bounds how many of its own actions a driver remembers. It only has to
// remember them until running requests and late events have arrived.
const maxRecent = 4096

// recent is a set of the most recently added names.
type recent struct {
	mu    sync.Mutex
	ring  []string
	next  int
	names map[string]struct{}
}

func newRecent() *recent {
	return &recent{ring: make([]string, maxRecent), names: make(map[string]struct{})}
}

// add adds a name and reports whether it is new.
func (r *recent) add(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.names[name]; ok {
		return false
	}
	delete(r.names, r.ring[r.next])
	r.ring[r.next] = name
	r.names[name] = struct{}{}
	r.next = (r.next + 1) % len(r.ring)
	return true
}

func (r *recent) has(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.names[name]
	return ok
}
