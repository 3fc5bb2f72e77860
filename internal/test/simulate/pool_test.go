package simulate

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/internal/test/changelog"
	"github.com/bivouac/bivouac/internal/test/simulate/network"
	"github.com/bivouac/bivouac/internal/test/simulate/nomadmodel"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/scheduler"
)

const (
	poolName     = "pool"
	sparesPrefix = prefix + "spares/"
)

// These are the names under which things are counted that happen in runs with a pool.
const (
	withPool      = "with a pool"
	warmCreates   = "warm creates"
	failedClaims  = "claims that failed"
	refusedSecond = "claims of a claimed spare, refused"
	strayWarm     = "claimed sandboxes that lost their record"
	unheardWarm   = "those of them that a replica may not have heard of"
)

// fillLimit is how long after the last fault a pool may be short of spares. The leader
// waits up to a minute after starts that failed.
const fillLimit = settleLimit + time.Minute

// poolPlan is how the pool is configured in replicas that start now.
type poolPlan struct {
	size    int // 0: no pool
	variant int // of the template
}

func (p poolPlan) config() []scheduler.Pool {
	if p.size == 0 {
		return nil
	}
	return []scheduler.Pool{{Name: poolName, Runtime: "nomad", Size: p.size}}
}

func (w *world) poolsNow() poolPlan {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pools
}

// changePool resizes the pool, removes it or changes the template, and restarts the
// replicas one after the other, as an operator rolls a new configuration out.
func (w *world) changePool(n int, f fault) {
	w.mu.Lock()
	switch f.which % 4 {
	case 0:
		w.pools.size = 0
	case 1:
		w.pools.variant = 1 - w.pools.variant
	default:
		w.pools.size = 1 + (w.pools.size+f.which)%maxPool
	}
	next := w.pools
	w.mu.Unlock()
	w.note("the pool becomes %+v", next)
	w.hits.count(f.kind, true)
	for i := range w.replicas {
		r := w.replica(i)
		r.stop()
		r.crash()
		wait(w.ctx, f.lasts/time.Duration(len(w.replicas)))
		w.restart(n, i, r)
	}
}

// hitSpare hits one of the live spares, if there are any.
func (w *world) hitSpare(f fault, hit func(allocID string)) {
	spares := slices.DeleteFunc(w.processes(), func(p nomadmodel.Process) bool { return w.chatOf(p.Meta) != "" })
	if len(spares) > 0 {
		p := spares[f.which%len(spares)]
		w.died(p.Meta[jobs.MetaSessionID], f.kind)
		w.hits.count(f.kind, true)
		hit(p.AllocID)
	}
}

// mute keeps a spare from answering.
func (w *world) mute(allocID string) {
	w.nomad.Mute(allocID)
	for _, p := range w.processes() {
		if p.AllocID == allocID {
			w.mu.Lock()
			w.muted[p.Meta[jobs.MetaSessionID]] = w.now()
			w.mu.Unlock()
		}
	}
}

// chatOf returns the chat whose sandbox a process is, or "" if it is that of a spare.
func (w *world) chatOf(meta map[string]string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.chatOfLocked(meta)
}

func (w *world) chatOfLocked(meta map[string]string) string {
	if meta[jobs.MetaChatID] != "" {
		return meta[jobs.MetaChatID]
	}
	return w.bound[meta[jobs.MetaSessionID]].chat
}

// sandboxes returns the live processes that are not spares.
func (w *world) sandboxes() []nomadmodel.Process {
	return slices.DeleteFunc(w.processes(), func(p nomadmodel.Process) bool { return w.chatOf(p.Meta) == "" })
}

// noteOrder checks that no spare is given to two chats, even if its helper would refuse.
func (w *world) noteOrder(order nodeapi.Order) {
	w.mu.Lock()
	before, again := w.ordered[order.SessionID]
	w.ordered[order.SessionID] = order.ChatID
	excused := w.edited[before]
	w.mu.Unlock()
	if again && before != order.ChatID {
		w.hits.count(refusedSecond, true)
		if !excused {
			w.violate("spare %s is given to chat %s and to chat %s", order.SessionID, before, order.ChatID)
		}
	}
}

// binding is what a helper gave to a spare.
type binding struct {
	chat   string // whose volume it has
	nodeID string
	at     time.Duration
}

// noteBound counts a spare whose helper has given it a chat's volume as a process of
// that chat.
func (w *world) noteBound(p nomadmodel.Process, chat string) {
	session := p.Meta[jobs.MetaSessionID]
	w.mu.Lock()
	w.bound[session] = binding{chat, p.NodeID, w.now()}
	w.alive[chat]++
	n := w.alive[chat]
	w.mu.Unlock()
	if n > 1 {
		w.violate("%d processes of chat %s live, the last of session %s, a spare", n, chat, session)
	}
}

// hearingLimit is the time within which all replicas have heard of a claim from the node's
// helper, even if an answer of the helper is lost.
func (w *world) hearingLimit() time.Duration {
	if w.odds == (network.Odds{}) {
		return 2 * time.Second
	}
	return 90 * time.Second
}

// loseTrack takes claimed sandboxes whose records are gone from the count of their chats, if
// a replica may not have heard of the claim. Nomad's jobs do not show which chat has claimed
// them, so a create of the chat may not find them then.
func (w *world) loseTrack() {
	recorded := make(map[string]bool)
	for _, pair := range w.consul.Keys(prefix + "sessions/") {
		var r record
		if json.Unmarshal(pair.Value, &r) == nil {
			recorded[r.SessionID] = true
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for session, b := range w.bound {
		if recorded[session] || w.astray[session] || w.living[session] == 0 {
			continue
		}
		if !w.unrecorded[session] {
			w.unrecorded[session] = true
			w.hits.count(strayWarm, true)
		}
		// Replicas that ran before the claim hear of it, and others ask when they start.
		isNew := w.now() < b.at+w.hearingLimit()
		asked := w.lastStart > b.at
		unheard := w.helpers.hasFailed(b.nodeID) || w.odds != (network.Odds{}) && w.now() < w.lastStart+w.hearingLimit()
		if isNew || asked && unheard {
			w.hits.count(unheardWarm, true)
			w.astray[session] = true
			w.alive[b.chat] -= w.living[session]
		}
	}
}

// witness is Consul as a replica reaches it. It notices when the replica writes the record
// of a spare.
type witness struct {
	w *world
	i int // number of the replica
}

// Serve implements [network.Server].
func (s witness) Serve(ctx context.Context, req *http.Request, body []byte) *http.Response {
	resp := s.w.consul.Serve(ctx, req, body)
	if req.Method == http.MethodPut && bytes.Contains(body, []byte(`"Key":"`+sparesPrefix)) && !bytes.Contains(body, []byte(`"Verb":"get`)) {
		s.w.mu.Lock()
		s.w.written.happens(s.i)
		s.w.mu.Unlock()
		s.w.checkGiven()
	}
	return resp
}

// checkGiven checks that no session ID is in two records.
func (w *world) checkGiven() {
	owners := make(map[string]string) // by session ID
	keys := w.consul.Keys(prefix)
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		var r record
		if !isOf(key, "sessions") && !isOf(key, "spares") || json.Unmarshal(keys[key].Value, &r) != nil {
			continue
		}
		if other := owners[r.SessionID]; other != "" {
			w.violate("session %s is in two records: %s and %s", r.SessionID, other, key)
		}
		owners[r.SessionID] = key
	}
}

// checkWarm checks that a caller got no spare that did not answer.
func (w *world) checkWarm(c call) {
	if !c.warm || c.told != "created" && c.told != "replaced" {
		return
	}
	w.hits.count(warmCreates, true)
	w.mu.Lock()
	since, muted := w.muted[c.session]
	chat := w.bound[c.session].chat
	w.mu.Unlock()
	switch {
	case muted && since < c.began:
		w.violate("caller %d is given spare %s, which has not answered since %v", c.caller, c.session, since)
	case chat != w.chatIDs[c.chat].String():
		w.violate("caller %d is given spare %s, which has the volume of chat %q", c.caller, c.session, chat)
	}
}

// countFailedClaims counts the creates whose claim failed and that started a sandbox
// instead, as the changes tell.
func (w *world) countFailedClaims(changes []changelog.Change) {
	for i := range len(changes) - 1 {
		was, is := changes[i], changes[i+1]
		w.hits.count(failedClaims, was.Type == "start_failed" && is.Type == "created" && was.Index == is.Index)
	}
}

// spareRecord holds the fields of a spare's record that the checks need.
type spareRecord struct {
	SessionID   string `json:"session_id"`
	ContainerID string `json:"container_id"`
	State       string `json:"state"`
	Variant     string `json:"variant"`
}

// spareRecords returns the records of spares, by session ID.
func (w *world) spareRecords() map[string]spareRecord {
	spares := make(map[string]spareRecord)
	for _, pair := range w.consul.Keys(sparesPrefix) {
		var s spareRecord
		if err := json.Unmarshal(pair.Value, &s); err != nil {
			w.violate("%s: %v", pair.Key, err)
		}
		spares[s.SessionID] = s
	}
	return spares
}

// unfilled compares the spares with what the pool should be.
func (w *world) unfilled() []string {
	var left []string
	pools := w.poolsNow()
	if w.pool == 0 {
		return nil
	}
	runs := make(map[string]nomadmodel.Process)
	for _, p := range w.processes() {
		runs[p.Meta[jobs.MetaSessionID]] = p
	}
	ready := 0
	for id, s := range w.spareRecords() {
		p, lives := runs[id]
		switch {
		case s.State != "ready":
			left = append(left, fmt.Sprintf("spare %s is %s", id, s.State))
		case !lives:
			left = append(left, fmt.Sprintf("spare %s is ready, and no process is", id))
		case p.AllocID != s.ContainerID || p.Run > 1:
			left = append(left, fmt.Sprintf("spare %s has container %s, and run %d of %s lives", id, s.ContainerID, p.Run, p.AllocID))
		case s.Variant != w.templates[pools.variant].Variant():
			left = append(left, fmt.Sprintf("spare %s is of another variant", id))
		default:
			ready++
		}
	}
	if ready != pools.size {
		left = append(left, fmt.Sprintf("the pool has %d spares that are ready, and its size is %d", ready, pools.size))
	}
	return left
}
