package simulate

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/bivouac/bivouac/internal/test/simulate/nomadmodel"
	"github.com/bivouac/bivouac/jobs"
)

// provoke starts a fault and ends it after its time.
func (w *world) provoke(n int, f fault) {
	wait(w.ctx, f.at)
	if f.into > 0 {
		when := w.asked
		if f.ofStart {
			when = w.started
		} else if f.ofSpare {
			when = w.written
		}
		if i, ok := w.next(when); ok {
			f.which = i
		}
		wait(w.ctx, f.into)
	}
	w.note("FAULT %v", f)
	r := w.replica(f.which)
	switch f.kind {
	case "crash", "stop", "pause", "cut consul", "cut nomad", "cut both":
		w.hits.count(f.kind, !r.isDead())
	case "consul leader", "nomad leader", "no room", "clock set ahead", "clock set back", "clock deleted":
		w.hits.count(f.kind, true)
	}
	switch f.kind {
	case "crash":
		r.crash()
		wait(w.ctx, f.lasts)
		w.restart(n, f.which, r)
	case "stop":
		r.stop()
		r.crash() // callers that still wait are cut off
		wait(w.ctx, f.lasts)
		w.restart(n, f.which, r)
	case "pause":
		r.host.Pause()
		wait(w.ctx, f.lasts)
		r.host.Resume()
	case "cut consul", "cut nomad", "cut both":
		if f.kind != "cut nomad" {
			r.consul.Cut()
		}
		if f.kind != "cut consul" {
			r.nomad.Cut()
		}
		wait(w.ctx, f.lasts)
		r.consul.Heal()
		r.nomad.Heal()
	case "consul leader":
		w.consul.LoseLeader()
		wait(w.ctx, f.lasts/4)
		w.consul.ElectLeader()
	case "nomad leader":
		w.nomad.LoseLeader()
		wait(w.ctx, f.lasts/4)
		w.nomad.ElectLeader()
	case "node cut", "node agent dead", "node reboots":
		w.loseNode(f)
	case "sandbox dies":
		w.hitProcess(f, func(p nomadmodel.Process) { w.nomad.Kill(p.AllocID) })
	case "task restarted":
		w.hitProcess(f, func(p nomadmodel.Process) { w.nomad.Restart(p.AllocID) })
	case "job stopped":
		w.hitProcess(f, func(p nomadmodel.Process) { w.nomad.StopJob(p.JobID) })
	case "stop hangs":
		if alive := w.processes(); len(alive) > 0 {
			release := w.nomad.Hang(alive[f.which%len(alive)].NodeID)
			wait(w.ctx, f.lasts)
			w.hits.count(f.kind, release() > 0)
		}
	case "token without rights":
		token := r.tokens[f.which%len(r.tokens)]
		token.lost.Add(1)
		wait(w.ctx, f.lasts)
		token.lost.Add(-1)
		w.hits.count(f.kind, token.denied.Load() > 0)
	case "no room":
		w.nomad.SetCapacity(0)
		wait(w.ctx, f.lasts)
		w.nomad.SetCapacity(w.capacity)
	case "streams break":
		w.hits.count(f.kind, w.nomad.BreakStreams() > 0)
	case "session destroyed":
		if ids := w.sessionsInConsul(); len(ids) > 0 {
			w.hits.count(f.kind, true)
			w.consul.DestroySession(ids[f.which%len(ids)])
		}
	case "lock deleted":
		for key := range w.consul.Keys(locksPrefix) {
			if !strings.HasSuffix(key, nobody) {
				w.hits.count(f.kind, true)
				w.consul.DeleteKey(key)
			}
		}
	case "clock set ahead", "clock set back":
		off := 24 * time.Hour
		if f.kind == "clock set back" {
			off = -off
		}
		value := "hand " + time.Now().Add(off).UTC().Format(time.RFC3339Nano)
		w.consul.SetKey(clockKey, value)
		wait(w.ctx, f.lasts)
		// If no replica knew the time, the health check says to delete the key.
		if string(w.consul.Keys(clockKey)[clockKey].Value) == value {
			w.consul.DeleteKey(clockKey)
		}
	case "clock deleted":
		w.consul.DeleteKey(clockKey)
	case "helper down":
		w.hits.count(f.kind, w.helpers.fail(f.which%w.nodes, f.lasts, false))
	case "helper hangs":
		w.hits.count(f.kind, w.helpers.fail(f.which%w.nodes, f.lasts, true))
	case "spare dies":
		w.hitSpare(f, w.nomad.Kill)
	case "spare does not answer":
		w.hitSpare(f, w.mute)
	case "pool changed":
		w.changePool(n, f)
	case "record deleted":
		w.hits.count(f.kind, w.loseRecord(f.which))
	case "store set back":
		w.hits.count(f.kind, w.setBack(f.lasts))
	case "store wiped":
		w.hits.count(f.kind, w.wipe(f.lasts))
	default:
		panic("no such fault: " + f.kind)
	}
}

// hitProcess ends one of the processes that live, if there are any.
func (w *world) hitProcess(f fault, hit func(nomadmodel.Process)) {
	if alive := w.sandboxes(); len(alive) > 0 {
		p := alive[f.which%len(alive)]
		w.died(p.Meta[jobs.MetaSessionID], f.kind)
		w.hits.count(f.kind, true)
		hit(p)
	}
}

// hits counts the faults of each kind that took effect.
type hits struct {
	mu    sync.Mutex
	times map[string]int
}

func (h *hits) count(kind string, took bool) {
	if took {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.times[kind]++
	}
}

// stoppedByNode is the name under which stops by a node that is cut off for
// long are counted.
const stoppedByNode = "node cut: it stops what runs"

// startedTwice is the name under which ends of sandboxes are counted that a node's agent has
// started twice.
const startedTwice = "node agent dead: it had just started a sandbox"

// occasion is an event that faults can wait for. The world's mutex guards it.
type occasion struct {
	next  chan struct{} // closed at the next event
	which int           // replica or node of the last event
}

func newOccasion() *occasion { return &occasion{next: make(chan struct{})} }

func (o *occasion) happens(which int) {
	o.which = which
	close(o.next)
	o.next = make(chan struct{})
}

// next waits for the next event and gives up after 5 s.
func (w *world) next(o *occasion) (which int, ok bool) {
	w.mu.Lock()
	next := o.next
	w.mu.Unlock()
	patience := time.NewTimer(5 * time.Second)
	defer patience.Stop()
	select {
	case <-next:
		w.mu.Lock()
		defer w.mu.Unlock()
		return o.which, true
	case <-patience.C:
		return 0, false
	}
}

func (w *world) restart(n, which int, old *replica) {
	i := which % len(w.replicas)
	if w.replica(i) == old {
		w.start(i, fmt.Sprintf("replica-%d-%c", i, 'b'+n))
	}
}

// loseNode cuts a node off. Sandboxes that run there, or start there in the
// meantime, may end because of that.
func (w *world) loseNode(f fault) {
	i := f.which % w.nodes
	id := w.nomad.NodeID(i)
	w.mu.Lock()
	w.cutNodes[id]++
	w.mu.Unlock()
	for _, p := range w.processes() {
		if p.NodeID == id {
			w.died(p.Meta[jobs.MetaSessionID], f.kind)
		}
	}
	if f.kind == "node reboots" {
		w.hits.count(f.kind, w.nomad.PowerOff(i))
	} else {
		w.hits.count(f.kind, w.nomad.Disconnect(i, f.kind == "node agent dead"))
	}
	wait(w.ctx, f.lasts)
	w.nomad.Reconnect(i)
	w.mu.Lock()
	w.cutNodes[id]--
	w.mu.Unlock()
}

func (w *world) died(sessionID, why string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.deaths = append(w.deaths, death{sessionID, w.now(), why})
}

func (w *world) sessionsInConsul() []string {
	var ids []string
	for id := range w.consul.Sessions() {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}
