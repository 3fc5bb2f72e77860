package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	consulapi "github.com/hashicorp/consul/api"
	nomadapi "github.com/hashicorp/nomad/api"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/api/wire"
)

// settleLimit is the time within which everything must settle once all parts
// run again. A replica's locks end at the latest after twice the TTL of its
// Consul session, which is 10 s. What it left in flight is settled within a few
// passes of 5 s after that.
//
// Because intents are written first, no sandbox lacks a record, except those
// whose record a fault deleted: see adoptLimit.
const settleLimit = 45 * time.Second

// adoptLimit is the time within which a sandbox whose record was deleted is
// adopted. Bivouac looks at it twice, a minute apart.
const adoptLimit = 3 * time.Minute

// cleanupDelay is how long a session may remain after its expiry while nothing
// is broken: until the next cleanup has stopped its sandbox.
const cleanupDelay = 20 * time.Second

// settle waits until nothing is left of the faults. What is left after
// settleLimit is a violation.
func (w *world) settle(ctx context.Context) error {
	began := time.Now()
	w.log.note("QUIET")
	if err := w.back(ctx); err != nil {
		return err
	}
	limit := settleLimit
	if w.told.misses() {
		limit = adoptLimit
	}
	var now found
	var clean time.Duration // how long spares were left
	for {
		now = w.survey(ctx)
		if len(now.leaked) > 0 {
			clean = time.Since(began)
		}
		if len(now.left)+len(now.leaked) == 0 || time.Since(began) > limit || ctx.Err() != nil {
			break
		}
		pause(ctx, 500*time.Millisecond)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	w.settled, w.cleaned = append(w.settled, time.Since(began)), append(w.cleaned, clean)
	for _, l := range now.left {
		w.log.violation(leak, mentioned(l), "left after %s of quiet: %s", limit, l)
	}
	for _, l := range now.leaked {
		w.log.violation(spareLeak, mentioned(l), "left after %s of quiet: %s", limit, l)
	}
	w.awaitPool(ctx, began)
	w.told.judge()
	w.settledWarm()
	w.log.note("SETTLED after %s", time.Since(began).Round(time.Millisecond))
	return nil
}

// fillLimit is the time within which the pool must be full again. After failed starts the
// leader pauses for up to a minute.
const fillLimit = 3 * time.Minute

// awaitPool waits until the pool is full.
func (w *world) awaitPool(ctx context.Context, began time.Time) {
	if w.pools == nil {
		return
	}
	for {
		lacking := w.survey(ctx).lacking
		took := time.Since(began)
		switch {
		case ctx.Err() != nil:
			return
		case lacking == "":
			w.filled = append(w.filled, took)
			return
		case took > fillLimit:
			w.log.violation(wrong, poolName, "after %s of quiet: %s", fillLimit, lacking)
			return
		}
		pause(ctx, 500*time.Millisecond)
	}
}

// serveLimit is how long a create may take while nothing is broken, on a
// machine that is busy with other things.
const serveLimit = 30 * time.Second

// neighbourTTL is longer than a run.
const neighbourTTL = 2 * time.Hour

// serve asks every replica for a sandbox of each chat while nothing is broken.
// Doing no harm is not enough if nobody is served.
func (w *world) serve(ctx context.Context) {
	defer w.load.serve(false) // nobody asks until the next round
	for _, r := range w.replicas {
		var all errgroup.Group
		all.SetLimit(4)
		for _, chat := range w.chats {
			all.Go(func() error { w.serveOne(ctx, r, chat); return nil })
		}
		_ = all.Wait() // its functions return no error
	}
	w.serveNeighbour(ctx)
}

// serveNeighbour asks the neighbour for its sandboxes. The ledger then knows
// them, so an end without a cause is a violation.
func (w *world) serveNeighbour(ctx context.Context) {
	for _, chat := range w.theirs {
		w.serveOne(ctx, w.neighbour, chat)
	}
}

func (w *world) serveOne(ctx context.Context, r *replica, chat uuid.UUID) {
	ttl := 10 * time.Minute
	if r == w.neighbour {
		ttl = neighbourTTL
	}
	err := w.load.create(ctx, r, chat, w.load.input("agent-1", ttl), serveLimit)
	switch {
	case ctx.Err() != nil:
	case err == nil || codeOf(err) == wire.CodeConflict: // the chat has a session of another agent
		w.served.Add(1)
	default:
		w.log.violation(wrong, chat.String(), "nothing is broken, and a create of chat %s on %s is answered: %s", chat, r.name, describe(err))
	}
}

// mentioned returns the chat or session in a leftover's text, or the whole
// text.
func mentioned(text string) string {
	for word := range strings.FieldsSeq(text) {
		if _, err := uuid.Parse(word); err == nil {
			return word
		}
	}
	return text
}

// back waits until all servers and replicas work again.
func (w *world) back(ctx context.Context) error {
	for _, r := range w.replicas {
		r.consul.trouble(trouble{})
		r.nomad.trouble(trouble{})
	}
	var servers errgroup.Group
	for _, a := range w.agents() {
		servers.Go(func() error { return a.WaitReady(ctx) })
	}
	if err := servers.Wait(); err != nil {
		return fmt.Errorf("not back after the last fault: %w", err)
	}
	for _, r := range w.all() {
		err := w.recovered(ctx, r, r.WaitReady(ctx))
		if err != nil && ctx.Err() == nil {
			w.log.violation(wrong, r.name, "all servers are back: %v", err)
		}
		if err != nil {
			return err
		}
	}
	for _, r := range w.replicas { // an operator finishes what was begun on one replica
		if r.pools != nil && r.pooling != r.pools.current() {
			w.log.note("%s is configured with %+v, and the others with %+v", r.name, r.pooling, r.pools.current())
			if err := r.restart(ctx, w.log); err != nil {
				return err
			}
		}
	}
	return w.noteLostNodes(ctx)
}

// record holds the fields that are read from a session's record in Consul.
type record struct {
	SessionID uuid.UUID `json:"session_id"`
	ChatID    uuid.UUID `json:"chat_id"`
	State     string    `json:"state"`
	Reason    string    `json:"reason"`
	ExpiresAt time.Time `json:"expires_at"`
	Warm      bool      `json:"warm"`
}

// stored is what Consul has below a prefix.
type stored struct {
	records, spares map[uuid.UUID]record // by session
	chats           map[string]bool      // those with a record
	entries         []string             // keys of indexes
	instance        string
	left            []string // what has not settled
	damaged         []error  // what cannot be read
	keys            int
}

// readStore reads all keys below a prefix.
func (w *world) readStore(ctx context.Context, prefix string) (stored, error) {
	s := stored{records: make(map[uuid.UUID]record), spares: make(map[uuid.UUID]record), chats: make(map[string]bool)}
	pairs, _, err := w.kv.KV().List(prefix, (&consulapi.QueryOptions{RequireConsistent: true}).WithContext(ctx))
	if err != nil {
		return s, err
	}
	s.keys = len(pairs)
	for _, pair := range pairs {
		key := strings.TrimPrefix(pair.Key, prefix+"v1/")
		folder, _, _ := strings.Cut(key, "/")
		name := key[strings.LastIndexByte(key, '/')+1:] // mostly a chat's ID
		switch folder {
		case "sessions":
			if r, ok := s.read(pair, "record of chat "+name); ok {
				s.records[r.SessionID], s.chats[name] = r, true
			}
		case "spares":
			if r, ok := s.read(pair, "record of spare "+name); ok {
				s.spares[r.SessionID] = r
			}
		case "locks":
			if name != uuid.Nil.String() { // the leader's
				s.left = append(s.left, fmt.Sprintf("lock of chat %s, held by session %q", name, pair.Session))
			}
		case "flight":
			s.left = append(s.left, "in flight: chat "+name)
		case "identity":
			var own struct{ Instance string }
			if err := json.Unmarshal(pair.Value, &own); err != nil {
				s.damaged = append(s.damaged, fmt.Errorf("the identity cannot be read: %w", err))
			}
			s.instance = own.Instance
		case "agents", "expiry", "warm":
			s.entries = append(s.entries, key)
		}
	}
	return s, nil
}

// read returns the record of a session or a spare, if it can be read.
func (s *stored) read(pair *consulapi.KVPair, what string) (record, bool) {
	r, err := decode(pair)
	if err != nil {
		s.damaged = append(s.damaged, fmt.Errorf("%s cannot be read: %w", what, err))
	}
	return r, err == nil
}

// decode returns the record of a session or a spare.
func decode(pair *consulapi.KVPair) (r record, err error) {
	err = json.Unmarshal(pair.Value, &r)
	return r, err
}

// found is what the store has, compared with what runs.
type found struct {
	records map[uuid.UUID]record // by session
	left    []string             // what has not settled
	leaked  []string             // spares that must not be there
	lacking string               // what the pool lacks to be full, or ""
}

// survey reads the store and compares it with what runs.
func (w *world) survey(ctx context.Context) found {
	store, err := w.readStore(ctx, prefix)
	if err != nil {
		return found{left: []string{"Consul cannot be read: " + err.Error()}, lacking: "Consul cannot be read"}
	}
	records, spares, left := store.records, store.spares, store.left
	for _, err := range store.damaged {
		left = append(left, err.Error())
	}
	for _, key := range store.entries {
		// Entries of a deleted record are removed when they are due.
		if chat := key[strings.LastIndexByte(key, '/')+1:]; !store.chats[chat] && !w.told.missed(chat) {
			left = append(left, "index entry without a record: "+key)
		}
	}
	running, now := w.census.running(), w.told.clock.agreed(time.Now())
	for id, r := range records {
		_, runs := running[id]
		switch {
		case r.State == "running" && !runs:
			left = append(left, fmt.Sprintf("record without a process: chat %s session %s", r.ChatID, id))
		case r.State != "running" && runs:
			left = append(left, fmt.Sprintf("process whose record says %s (%s): chat %s session %s", r.State, r.Reason, r.ChatID, id))
		case r.State == "lost":
			left = append(left, fmt.Sprintf("lost while all nodes are there: chat %s session %s (%s)", r.ChatID, id, r.Reason))
		case now.Sub(r.ExpiresAt) > cleanupDelay:
			left = append(left, fmt.Sprintf("expired %s ago: chat %s session %s", now.Sub(r.ExpiresAt).Round(time.Second), r.ChatID, id))
		}
	}
	for id, s := range running {
		if slices.Contains(w.theirs, s.chat) || s.spare() {
			continue
		}
		if pids := w.told.secondRun(s); len(pids) > 0 {
			left = append(left, fmt.Sprintf("second run of a sandbox: chat %s session %s on %s, pids %v", s.chat, id, s.node, pids))
		}
		if _, ok := records[id]; !ok {
			left = append(left, fmt.Sprintf("process without a record: chat %s session %s on %s, pids %v", s.chat, id, s.node, s.pids))
		}
	}
	w.log.note("%d records, %d spares, %d processes, %d keys", len(records), len(spares), len(running), store.keys)
	all := found{records: records}
	all.leaked, all.lacking = w.poolProblems(spares, running)
	jobs, spareJobs := w.liveJobs(ctx, store.instance, records, spares)
	all.left, all.leaked = slices.Concat(left, jobs), append(all.leaked, spareJobs...)
	slices.Sort(all.left)
	slices.Sort(all.leaked)
	return all
}

// liveJobs lists the jobs without a record that run or are about to run. leaked are those
// that were started as spares.
func (w *world) liveJobs(ctx context.Context, own string, records, spares map[uuid.UUID]record) (left, leaked []string) {
	list, err := w.jobsWithMeta(ctx)
	if err != nil {
		return []string{"Nomad cannot be read: " + err.Error()}, nil
	}
	for _, job := range list {
		if job.Meta["bivouac_instance"] != own || job.Stop || job.Status == "dead" {
			continue
		}
		id, err := uuid.Parse(job.Meta["session_id"])
		_, isSession := records[id]
		_, isSpare := spares[id]
		lacks := w.lacksRecord(id)
		switch pool := job.Meta["bivouac_pool"]; {
		case err == nil && (isSession || isSpare):
		case pool != "" && !lacks:
			leaked = append(leaked, fmt.Sprintf("job of a spare without a record: %s is %s, session %s", job.ID, job.Status, id))
		default:
			left = append(left, fmt.Sprintf("job without a record: %s is %s, chat %s", job.ID, job.Status, job.Meta["chat_id"]))
		}
	}
	return left, leaked
}

func (w *world) jobsWithMeta(ctx context.Context) ([]*nomadapi.JobListStub, error) {
	list, _, err := w.jobs.Jobs().ListOptions(&nomadapi.JobListOptions{Fields: &nomadapi.JobListFields{Meta: true}},
		(&nomadapi.QueryOptions{}).WithContext(ctx))
	return list, err
}
