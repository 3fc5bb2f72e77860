package simulate

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/bivouac/bivouac/internal/test/simulate/network"
	"github.com/bivouac/bivouac/internal/test/simulate/nomadmodel"
	"github.com/bivouac/bivouac/jobs"
)

// These are the prefixes and keys of Bivouac in Consul.
const (
	prefix      = "bivouac/v1/"
	locksPrefix = prefix + "locks/"
	clockKey    = prefix + "clock"
	nobody      = "00000000-0000-0000-0000-000000000000" // the leader's lock has the all-zero UUID
)

// settleLimit is the time after the last fault and the last request by which
// nothing may be left over. The README promises this limit.
const settleLimit = 45 * time.Second

// adoptLimit is the same limit for a run that lost records: within that time, a
// sandbox without its record is adopted.
const adoptLimit = 3 * time.Minute

// record holds the fields of a record that the checks need.
type record struct {
	SessionID   string    `json:"session_id"`
	ChatID      string    `json:"chat_id"`
	AgentID     string    `json:"agent_id"`
	ContainerID string    `json:"container_id"`
	State       string    `json:"state"`
	ExpiresAt   time.Time `json:"expires_at"`
	Warm        bool      `json:"warm"`
}

// processStarted counts the live processes of each chat.
func (w *world) processStarted(p nomadmodel.Process) {
	if isNeighbours(p.Meta) {
		return
	}
	session := p.Meta[jobs.MetaSessionID]
	w.mu.Lock()
	chat := w.chatOfLocked(p.Meta)
	if w.cutNodes[p.NodeID] > 0 {
		w.deaths = append(w.deaths, death{session, w.now(), "started on a node that is cut off"})
	}
	n := 0
	if chat != "" && !w.astray[session] {
		w.alive[chat]++
		n = w.alive[chat]
	}
	w.living[session]++
	w.tokens[session] = p.Env["BIVOUAC_ACCESS_TOKEN"]
	for i := range w.nodes {
		if w.nomad.NodeID(i) == p.NodeID {
			w.started.happens(i)
		}
	}
	w.mu.Unlock()
	if n > 1 {
		w.violate("%d processes of chat %s live, the last of session %s", n, chat, session)
	}
}

func (w *world) processEnded(p nomadmodel.Process) {
	if isNeighbours(p.Meta) {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	session := p.Meta[jobs.MetaSessionID]
	if chat := w.chatOfLocked(p.Meta); chat != "" && !w.astray[session] {
		w.alive[chat]--
	}
	w.living[session]--
}

// checkTold compares an answer about a session's end with the truth: an unknown
// state is not a dead sandbox. A session that has ended stays ended, so a
// process that lives at the time of the answer also lived when Bivouac looked.
// Whether the session should have ended is checked by the history. checkTold also
// compares the access token with the one that the sandbox has.
func (w *world) checkTold(c call) {
	if most := slices.Max(w.skews) + skewLimit; c.session != "" && c.ahead > most {
		w.violate("the agreed time is %v ahead, and no machine's clock by more than %v", c.ahead, most)
	}
	w.mu.Lock()
	lives := w.living[c.session] > 0
	token, hasRun := w.tokens[c.session]
	w.mu.Unlock()
	if hasRun && c.token != "" && c.token != token { // a session that was adopted has none
		w.violate("caller %d is told an access token of session %s that its sandbox does not have", c.caller, c.session)
	}
	switch {
	case c.told == "dead" && lives:
		w.violate("caller %d is told that session %s is dead, and its process lives", c.caller, c.session)
	case (c.told == "dead" || c.told == "lost") && !lives && !w.hasRun(c.session):
		w.violate("caller %d is told that session %s is %s, and it never ran", c.caller, c.session, c.told)
	case c.told == "lost" && lives && w.stands(c.session) && !w.hasDied(c.session):
		w.violate("caller %d is told that session %s is lost, and it lives, and nothing had happened to it", c.caller, c.session)
	}
}

// stands reports whether the session's job has not been stopped. A delete that
// is in progress stops it.
func (w *world) stands(sessionID string) bool {
	for _, meta := range w.nomad.Jobs() {
		if meta[jobs.MetaSessionID] == sessionID {
			return true
		}
	}
	return false
}

// hasRun reports whether a process of the session was ever started.
func (w *world) hasRun(sessionID string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, ok := w.living[sessionID]
	return ok
}

// settle waits until nothing is left over and fails after the limit. It first
// waits for requests that arrive late.
func (w *world) settle() {
	if w.odds.Late > 0 {
		wait(w.ctx, w.calm+network.MaxLate-w.now())
	}
	began, limit := w.now(), settleLimit
	if len(w.edited) > 0 {
		limit = adoptLimit
	}
	since := began // when nothing was left over; later a session may expire, and is being stopped for a while
	for {
		left := w.leftOver()
		if len(left) == 0 {
			since = w.now()
		}
		unfilled := w.unfilled()
		if len(left)+len(unfilled) == 0 {
			w.mu.Lock()
			w.settled = w.now() - began
			w.mu.Unlock()
			return
		}
		if w.now()-since <= limit {
			left = nil // may still come about
		}
		if w.now()-began > max(limit, fillLimit) {
			left = append(left, unfilled...)
		}
		for _, l := range left {
			w.violate("%v after the last fault: %s", w.now()-began, l)
		}
		if len(left) > 0 {
			return
		}
		wait(w.ctx, time.Second)
	}
}

// leftOver lists the records, locks, indexes and sandboxes that do not match.
func (w *world) leftOver() []string {
	var left []string
	keys := w.consul.Keys(prefix)
	sessions := w.consul.Sessions()
	expected := make(map[string]bool)
	records := make(map[string]record) // by session ID
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		pair := keys[key]
		switch folder, _, _ := strings.Cut(strings.TrimPrefix(key, prefix), "/"); folder {
		case "locks":
			if !strings.HasSuffix(key, nobody) || sessions[pair.Session] == "" {
				left = append(left, "a lock stands: "+key)
			}
		case "sessions":
			var r record
			if err := json.Unmarshal(pair.Value, &r); err != nil {
				left = append(left, fmt.Sprintf("%s: %v", key, err))
				continue
			}
			records[r.SessionID] = r
			for _, entry := range r.index() {
				expected[entry] = true
			}
			if r.State == "creating" || r.State == "stopping" {
				left = append(left, fmt.Sprintf("session %s is still %s", r.SessionID, r.State))
			}
		}
	}
	for key := range keys {
		folder, _, _ := strings.Cut(strings.TrimPrefix(key, prefix), "/")
		if slices.Contains([]string{"agents", "expiry", "flight", "warm"}, folder) && !expected[key] && !w.isEdited(key[strings.LastIndexByte(key, '/')+1:]) {
			left = append(left, "an index entry that no record has: "+key)
		}
	}
	for key := range expected {
		if _, ok := keys[key]; !ok {
			left = append(left, "an index entry is missing: "+key)
		}
	}
	return append(left, w.unmatched(records)...)
}

// index returns the index keys that the record must have.
func (r record) index() []string {
	sum := sha256.Sum256([]byte(r.AgentID))
	entries := []string{prefix + "agents/" + hex.EncodeToString(sum[:16]) + "/" + r.ChatID}
	if r.State != "creating" {
		entries = append(entries, prefix+"expiry/"+r.ExpiresAt.UTC().Format("200601021504")+"/"+r.ChatID)
	}
	if r.State == "creating" || r.State == "stopping" {
		entries = append(entries, prefix+"flight/"+r.ChatID)
	}
	if r.Warm {
		entries = append(entries, prefix+"warm/"+r.SessionID+"/"+r.ChatID)
	}
	return entries
}

// unmatched compares sessions with running processes.
func (w *world) unmatched(records map[string]record) []string {
	var left []string
	runs := make(map[string]nomadmodel.Process)
	spares := w.spareRecords()
	for _, p := range w.processes() {
		id := p.Meta[jobs.MetaSessionID]
		if _, ok := spares[id]; ok {
			continue
		}
		runs[id] = p
		switch r, ok := records[id]; {
		case !ok:
			left = append(left, "a process without a record: session "+id)
		case r.ContainerID != p.AllocID:
			left = append(left, fmt.Sprintf("session %s has container %s, and %s runs", id, r.ContainerID, p.AllocID))
		case p.Run > 1:
			left = append(left, fmt.Sprintf("session %s is %s, and what runs is its run %d", id, r.State, p.Run))
		case r.State != "running":
			left = append(left, fmt.Sprintf("session %s is %s, and its process lives", id, r.State))
		}
	}
	for id, r := range records {
		if _, ok := runs[id]; r.State == "running" && !ok {
			left = append(left, fmt.Sprintf("session %s is running, and no process is", id))
		}
		if (r.State == "dead" || r.State == "lost") && !w.hasDied(id) && !w.isEdited(r.ChatID) {
			left = append(left, fmt.Sprintf("session %s is %s, and nothing but a delete ended it", id, r.State))
		}
	}
	for id, meta := range w.nomad.Jobs() {
		session := meta[jobs.MetaSessionID]
		// If a sandbox without a record has died, its job stays until Nomad
		// forgets it.
		isOver := w.isEdited(w.chatOf(meta)) && w.hasDied(session) || w.isAstray(session)
		_, isSpare := spares[session]
		if _, ok := records[session]; !ok && !isSpare && !isOver && !isNeighbours(meta) {
			left = append(left, "a job without a record: "+id)
		}
	}
	return left
}

// isAstray reports whether the record of a spare or of a claimed one may have been lost.
func (w *world) isAstray(session string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.edited) > 0 && w.living[session] == 0
}

func (w *world) hasDied(sessionID string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.ContainsFunc(w.deaths, func(d death) bool { return d.sessionID == sessionID })
}

// checkAnswers finds callers that got an error although nothing failed.
func (w *world) checkAnswers() {
	if len(w.faults) > 0 || w.odds != (network.Odds{}) {
		return
	}
	// Nomad may have no room, and a sandbox may fail to start.
	expected := []string{"not_found", "expired", "not_running", "not_placed", "not_ready"}
	for _, c := range w.history {
		if c.err != nil && c.patient == 0 && !slices.Contains(expected, c.told) {
			w.violate("nothing failed, and a caller is told %v", c.err)
		}
	}
}

// lastLook asks every replica for the state of each chat, for the history.
func (w *world) lastLook() {
	caller := 1 + len(w.callers)
	for i := range w.replicas {
		for chat := range w.chats {
			w.ask(caller, request{kind: "get", chat: chat, replica: i}, w.replica(i))
		}
	}
}

// createAgain starts the replicas again that were killed, creates the session of each chat
// once more, and waits until the pool is full again.
func (w *world) createAgain() {
	for i := range w.replicas {
		if r := w.replica(i); r.isDead() {
			w.restart(0, i, r)
		}
	}
	for chat := range w.chats {
		w.call(1+len(w.callers), []request{{kind: "create", chat: chat, agent: "agent-1", after: time.Second}})
	}
	w.settle()
}
