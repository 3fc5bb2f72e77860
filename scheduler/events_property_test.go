package scheduler_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/store/memory"
	"github.com/bivouac/bivouac/scheduler"
)

// TestEvents_are_all_that_happened_after_an_index has readers on two replicas beside
// random changes, restarts, and outages of the store. Each must get all changes after its
// index that it may see, once and in order, until it is told that some are missing.
func TestEvents_are_all_that_happened_after_an_index(t *testing.T) {
	ends := map[string]int{}
	for seed := range uint64(200) {
		synctest.Test(t, func(t *testing.T) {
			p := &play{
				world: newWorld(t, func(c *scheduler.Config) { c.Now = time.Now }), t: t, seed: seed,
				random: rand.New(rand.NewPCG(seed, 0)), // a seed repeats a run
			}
			p.replicas = []*playReplica{p.start(), p.start()}
			for range 60 {
				p.step()
			}
			for end, n := range p.end() {
				ends[end] += n
			}
		})
	}
	for _, end := range []string{"", "canceled", "index_too_old", "store_unavailable"} {
		must.Positive(t, ends[end], must.Sprintf("readers that end with %q", end))
	}
}

// play is one run of the test.
type play struct {
	*world
	t        *testing.T
	seed     uint64
	random   *rand.Rand
	replicas []*playReplica
	readers  []*playReader
	isBig    bool // the changes may not all fit into the memory of a replica
}

type playReplica struct {
	*scheduler.Scheduler
	store *patient
	stop  func()
}

type playReader struct {
	replica *playReplica
	query   scheduler.EventQuery
	sees    func(scheduler.Change) bool
	seesAll bool
	stored  []scheduler.Change // when it began

	gate  chan struct{} // lets it go on after a batch
	open  func()        // lets it go on always
	leave context.CancelFunc
	done  chan struct{}

	batches []scheduler.EventBatch
	err     error
}

func (p *play) start() *playReplica {
	c := p.peerConfig()
	replica := &playReplica{store: newPatient(p.store)}
	c.Store = replica.store
	var err error
	replica.Scheduler, err = scheduler.New(c)
	must.NoError(p.t, err)
	replica.stop = run(p.t, replica.Scheduler)
	return replica
}

func (p *play) step() {
	i := p.random.IntN(2)
	replica := p.replicas[i]
	switch p.random.IntN(12) {
	default:
		p.change("")
	case 0:
		p.isBig = true
		p.change(big)
	case 1, 2, 3:
		p.read(replica)
	case 4, 5:
		for _, r := range p.readers {
			if r.replica != replica {
				continue
			}
			select {
			case r.gate <- struct{}{}:
			default: // it does not wait, or has ended
			}
		}
	case 6:
		p.shut(replica)
		p.replicas[i] = p.start()
	case 7:
		replica.store.fall()
	case 8:
		replica.store.rise()
		pass(time.Duration(p.random.IntN(10)) * time.Second)
	case 9:
		synctest.Wait()
	}
}

// shut ends a replica and its readers.
func (p *play) shut(replica *playReplica) {
	for _, r := range p.readers {
		if r.replica == replica {
			r.leave()
			r.open()
			<-r.done
		}
	}
	replica.stop()
}

// change writes a record with up to two changes for a reason.
func (p *play) change(reason string) {
	session := scheduler.Session{ChatID: uuid.New(), SessionID: uuid.New(), State: scheduler.StateRunning, ExpiresAt: time.Now().Add(time.Hour)}
	lease, err := memory.NewLocker(p.store).Lock(p.t.Context(), session.ChatID, 0)
	must.NoError(p.t, err)
	changes := make([]scheduler.Change, p.random.IntN(3))
	for i := range changes {
		changes[i] = scheduler.Change{
			Time: time.Now(), ChatID: uuid.New(), Reason: reason,
			AgentID: []string{"mine", "other"}[p.random.IntN(2)],
		}
	}
	must.NoError(p.t, lease.Write(p.t.Context(), &session, scheduler.Release, changes...))
}

// stored returns all changes.
func (p *play) stored() []scheduler.Change {
	all, err := p.store.Changes(p.t.Context(), 0, 0)
	must.NoError(p.t, err)
	return all
}

func (p *play) read(replica *playReplica) {
	r := &playReader{
		replica: replica, gate: make(chan struct{}), done: make(chan struct{}), stored: p.stored(), seesAll: p.random.IntN(2) == 0,
		query: scheduler.EventQuery{Follow: p.random.IntN(3) > 0},
	}
	if p.random.IntN(4) > 0 {
		r.query.After = new(p.random.Uint64N(60))
	}
	ctx, cancel := context.WithCancel(p.t.Context())
	r.leave, r.open = cancel, sync.OnceFunc(func() { close(r.gate) })
	r.sees = func(scheduler.Change) bool { return true }
	if !r.seesAll {
		ctx = scheduler.WithCaller(ctx, scheduler.CallerFrom(as(p.t, rule("mine", scheduler.CapRead))))
		r.sees = func(c scheduler.Change) bool { return c.AgentID == "mine" }
	}
	p.readers = append(p.readers, r)
	go func() {
		defer close(r.done)
		for batch, err := range replica.Events(ctx, r.query) {
			r.err = err
			if err == nil {
				r.batches = append(r.batches, batch)
			}
			<-r.gate
		}
	}()
	synctest.Wait()
}

// end lets all readers read to their ends, checks what they got, and counts how they
// ended.
func (p *play) end() map[string]int {
	for _, r := range p.readers {
		if slices.Contains(p.replicas, r.replica) {
			r.open()
		}
	}
	running := p.replicas
	for _, replica := range running {
		replica.store.rise()
	}
	pass(time.Minute)
	for _, replica := range running {
		p.shut(replica)
	}
	all, ends := p.stored(), map[string]int{}
	for _, r := range p.readers {
		p.check(r, all, slices.Contains(running, r.replica))
		end := ""
		if r.err != nil {
			end = scheduler.Kind(r.err)
		}
		ends[end]++
	}
	return ends
}

func (p *play) check(r *playReader, all []scheduler.Change, toTheEnd bool) {
	about := must.Sprintf("seed %d, %+v", p.seed, r.query)
	if len(r.batches) == 0 { // it has been refused
		must.Error(p.t, r.err, about)
		isUnknown := r.query.After != nil && !slices.ContainsFunc(r.stored, func(c scheduler.Change) bool {
			return c.Index >= *r.query.After && (r.seesAll || c.Index == *r.query.After && r.sees(c))
		})
		if scheduler.Kind(r.err) == "index_too_old" {
			must.True(p.t, isUnknown || p.isBig, about)
		}
		return
	}
	begin, after := r.batches[0].Index, uint64(0)
	switch {
	case r.query.After != nil:
		after = *r.query.After
		must.Eq(p.t, after, begin, about)
	case len(r.stored) > 0:
		after = r.stored[len(r.stored)-1].Index
		if !p.isBig {
			must.Eq(p.t, r.lines(r.stored, after), r.lines(r.stored, begin), about)
		}
	}
	want, stored, got := r.lines(all, after), r.lines(r.stored, after), []string{}
	for _, batch := range r.batches[1:] {
		got = append(got, r.lines(batch.Changes, batch.Index-1)...)
		must.SliceEmpty(p.t, r.lines(batch.Changes, batch.Index), about)
	}
	if p.isBig && after == 0 { // it began at the oldest that the replica had
		if len(got) == 0 {
			return
		}
		want = want[slices.Index(want, got[0]):]
		stored = stored[max(0, slices.Index(stored, got[0])):]
	}
	must.LessEq(p.t, len(want), len(got), about)
	must.Eq(p.t, want[:len(got)], got, about)
	switch kind := scheduler.Kind(r.err); {
	case r.err == nil:
		must.Eq(p.t, stored, got, about)
	case kind == "canceled" && toTheEnd:
		must.Eq(p.t, want, got, about)
	case kind == "index_too_old":
		must.True(p.t, p.isBig, about)
	default:
		must.Eq(p.t, "canceled", kind, about)
	}
}

// lines returns the changes after an index that the reader may see.
func (r *playReader) lines(changes []scheduler.Change, after uint64) []string {
	lines := []string{}
	for _, c := range changes {
		if r.sees(c) && c.Index > after {
			lines = append(lines, fmt.Sprint(c.Index, c.ChatID))
		}
	}
	return lines
}
