package main

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/wire"
)

// ledger is what callers were told, and what was done that ends sessions. What
// contradicts it is a violation.
type ledger struct {
	log   *timeline
	clock clock

	mu        sync.Mutex
	chats     map[uuid.UUID][]*told
	sessions  map[uuid.UUID]*told
	nodes     map[uuid.UUID]string    // where sessions run, told or not
	running   map[uuid.UUID]*sandbox  // what the last look at processes found
	doomed    map[uuid.UUID]time.Time // when a fault was to end a session, told or not
	restarted map[uuid.UUID]*restart  // sessions whose task a fault had run once more
	lacking   map[uuid.UUID]time.Time // chats whose record a fault deleted, since when, until all has settled
	lacked    map[string]bool         // all such chats
	deletions map[uuid.UUID][]*deletion
	hazards   []hazard
	suspects  []suspect
	confirmed map[string]bool // what was reported already
	ends      map[cause]int   // why sandboxes ended that callers had been told of
	latest    time.Duration   // how long after the last delete without an answer it must have been one that ended a session
}

// cause is why a session may have ended.
type cause string

const (
	noCause    cause = "no cause"
	expiry     cause = "expired"
	deleted    cause = "deleted"
	hit        cause = "hit by a fault"
	nodeWasOut cause = "with a node that Nomad took for lost"
)

// told is a session as callers know it.
type told struct {
	session, chat uuid.UUID
	agent         string
	created       time.Time // by this machine's clock, about
	expires       time.Time // by the agreed time: the latest that anybody was told …
	expiresTold   time.Time // … and when
	first         time.Time // when it was first told
	made          bool      // a create said that it made it
	deleted       time.Time // when a delete said that it is gone
	missed        bool      // it was found to be gone
	ended         instant   // when its sandbox was seen to have ended
}

// instant is a time by this machine's clock, and by that of the replicas.
type instant struct{ at, agreed time.Time }

func (l *ledger) instant(at time.Time) instant { return instant{at, l.clock.agreed(at)} }

// deletion is a request that ends one session of the chat at most: the one that its
// answer names, or, where nobody got an answer, any until lateLimit after its end.
type deletion struct {
	start, end time.Time
	answered   bool
	gone       uuid.UUID // the session that it ended, as far as is known
}

// lateLimit is how long after nobody waits for its answer any more a delete may yet
// be carried out: by a replica that was paused until its locks were another's, or by
// those that settle what a dead one had begun, and then until the sandbox has stopped.
const lateLimit = pastTTL + settleLimit + stopTime

// stopTime is within what time a sandbox ends that is stopped.
const stopTime = 10 * time.Second

// restart is that a task was run once more in its allocation.
type restart struct {
	first  []int     // the processes of its first run
	second time.Time // when one of another run was first seen
}

// hazard is a node that Nomad took for lost. When it is back it ends what ran
// there.
type hazard struct {
	node string
	at   time.Time
}

// suspect is something that is wrong unless there was a cause, which may only be
// known later.
type suspect struct {
	kind violation
	told *told
	when instant
	text string

	ended bool // its sandbox was seen to end
}

func newLedger(log *timeline) *ledger {
	return &ledger{
		log: log, chats: make(map[uuid.UUID][]*told), sessions: make(map[uuid.UUID]*told),
		nodes: make(map[uuid.UUID]string), running: make(map[uuid.UUID]*sandbox), doomed: make(map[uuid.UUID]time.Time),
		restarted: make(map[uuid.UUID]*restart), lacking: make(map[uuid.UUID]time.Time), lacked: make(map[string]bool),
		deletions: make(map[uuid.UUID][]*deletion), confirmed: make(map[string]bool), ends: make(map[cause]int),
	}
}

// answer is a session in the answer to a request.
type answer struct {
	start, end time.Time // of the request
	op         string    // for a person
	made       bool      // it says that it made the session
	session    wire.Session
}

// saw takes in an answer that says that a session stands.
func (l *ledger) saw(a answer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := a.session
	t := l.sessions[s.SessionID]
	if t == nil {
		t = &told{session: s.SessionID, chat: s.ChatID, agent: s.AgentID, created: l.clock.ours(s.CreatedAt), first: a.end}
		if t.created.After(a.end) { // by the clock of another Bivouac
			t.created = a.end
		}
		l.sessions[s.SessionID] = t
		l.chats[s.ChatID] = append(l.chats[s.ChatID], t)
	}
	switch {
	case t.made && a.made:
		l.wrong(t, "%s says that it made session %s, which another one made", a.op, s.SessionID)
	case !t.deleted.IsZero() && t.deleted.Before(a.start):
		l.wrong(t, "%s tells of session %s, which was deleted %s before", a.op, s.SessionID, a.start.Sub(t.deleted))
	case t.expiresTold.Before(a.start) && !t.expiresTold.IsZero() && s.ExpiresAt.Before(t.expires):
		l.wrong(t, "%s says that session %s expires at %s, after %s was told", a.op, s.SessionID, s.ExpiresAt, t.expires)
	}
	t.made = t.made || a.made
	if s.ExpiresAt.After(t.expires) {
		t.expires, t.expiresTold = s.ExpiresAt, a.end
	}
	if runs := l.running[s.SessionID]; s.State == "dead" && runs != nil && slices.ContainsFunc(l.firstRun(runs), isAlive) {
		l.wrong(t, "%s says that session %s is dead, and it runs on %s, pids %v", a.op, s.SessionID, runs.node, runs.pids)
	}
	switch s.State {
	case "dead", "lost", "stopping":
		l.suspects = append(l.suspects, suspect{wrong, t, l.instant(a.end), fmt.Sprintf("%s says that session %s is %s: %s", a.op, s.SessionID, s.State, s.Reason), false})
	case "running":
		if r := l.restarted[s.SessionID]; r != nil && !r.second.IsZero() && a.start.After(r.second.Add(restartLimit)) {
			l.wrong(t, "%s says that session %s runs, %s after its second run was seen", a.op, s.SessionID, a.start.Sub(r.second))
		}
	default:
		l.wrong(t, "%s tells of session %s in state %q", a.op, s.SessionID, s.State)
	}
	l.missing(a.start, a.end, s.ChatID, s.SessionID, a.op+" tells of session "+s.SessionID.String())
}

// sawNone takes in an answer that says that the chat has no session.
func (l *ledger) sawNone(start, end time.Time, chat uuid.UUID, op string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.missing(start, end, chat, uuid.Nil, op+" finds no session")
}

// missing suspects the loss of the chat's sessions that were told before start,
// but for one.
func (l *ledger) missing(start, end time.Time, chat, but uuid.UUID, text string) {
	for _, t := range l.chats[chat] {
		if t.session != but && !t.missed && t.first.Before(start) {
			t.missed = true
			l.suspects = append(l.suspects, suspect{loss, t, l.instant(end), text, false})
		}
	}
}

// deleting notes the start of a delete, and returns what notes its end. gone is
// the session that it says it deleted, the nil UUID for none; answered is false
// where it did not say.
func (l *ledger) deleting(chat uuid.UUID) (done func(answered bool, gone uuid.UUID)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := &deletion{start: time.Now()}
	l.deletions[chat] = append(l.deletions[chat], d)
	return func(answered bool, gone uuid.UUID) {
		l.mu.Lock()
		defer l.mu.Unlock()
		d.end, d.answered, d.gone = time.Now(), answered, gone
		if !answered {
			return
		}
		if gone == uuid.Nil { // it ended nothing
			l.deletions[chat] = slices.DeleteFunc(l.deletions[chat], func(other *deletion) bool { return other == d })
		}
		if t := l.sessions[gone]; t != nil && t.deleted.IsZero() {
			t.deleted = d.end
		}
	}
}

// cleaned takes in a session that a cleanup says it ended because it had expired.
func (l *ledger) cleaned(s wire.Session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.sessions[s.SessionID]
	if t == nil {
		return
	}
	if now := l.clock.agreed(time.Now()); now.Before(t.expires.Add(-expirySlack)) {
		l.wrong(t, "a cleanup ended session %s, which was told to expire at %s", t.session, t.expires)
	}
	if t.deleted.IsZero() {
		t.deleted = time.Now()
	}
}

// doom notes that a fault is about to end a session.
func (l *ledger) doom(session uuid.UUID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.doomed[session]; !ok {
		l.doomed[session] = time.Now()
	}
}

// restartLimit is how long after a second run of a task began a replica may take the
// session for what it was, as it may be cut off from Nomad, and Nomad from the node.
const restartLimit = time.Minute

// restarts notes that a fault is about to run a sandbox's task once more.
func (l *ledger) restarts(s *sandbox) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.restarted[s.session] == nil {
		l.restarted[s.session] = &restart{first: s.pids}
	}
}

// firstRun returns the processes of a sandbox that are of its task's first run.
func (l *ledger) firstRun(s *sandbox) []int {
	r := l.restarted[s.session]
	if r == nil {
		return s.pids
	}
	return slices.DeleteFunc(slices.Clone(s.pids), func(pid int) bool { return !slices.Contains(r.first, pid) })
}

// secondRun returns the processes of a sandbox that are of a later run of its task.
func (l *ledger) secondRun(s *sandbox) []int {
	l.mu.Lock()
	defer l.mu.Unlock()
	first := l.firstRun(s)
	return slices.DeleteFunc(slices.Clone(s.pids), func(pid int) bool { return slices.Contains(first, pid) })
}

// loses notes that a fault is about to delete a chat's record. Until the record is
// back, callers may be told that there is none; its sandbox must not end.
func (l *ledger) loses(chat uuid.UUID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lacked[chat.String()] = true
	if _, ok := l.lacking[chat]; !ok {
		l.lacking[chat] = time.Now()
	}
}

// misses says whether a record was deleted since all had settled.
func (l *ledger) misses() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.lacking) > 0
}

// missed says whether the record of a chat was ever deleted.
func (l *ledger) missed(chat string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lacked[chat]
}

// lost notes that Nomad took a node for lost.
func (l *ledger) lost(h hazard) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hazards = append(l.hazards, h)
}

// runs notes that a sandbox was found to run.
func (l *ledger) runs(s *sandbox) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.nodes[s.session], l.running[s.session] = s.node, s
}

// alive notes that a sandbox was found alive by a look that began at a time.
func (l *ledger) alive(s *sandbox, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r := l.restarted[s.session]; r != nil && r.second.IsZero() && len(l.firstRun(s)) < len(s.pids) {
		r.second = at
		l.log.note("second run of chat %s session %s, pids %v", s.chat, s.session, s.pids)
	}
	if t := l.sessions[s.session]; t != nil && !t.deleted.IsZero() && t.deleted.Before(at) {
		l.wrong(t, "session %s was deleted and still runs on %s, pids %v", s.session, s.node, s.pids)
	}
}

// ended notes that a sandbox that ran is gone.
func (l *ledger) ended(s *sandbox, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.running, s.session)
	if t := l.sessions[s.session]; t != nil {
		t.ended = l.instant(at)
		l.suspects = append(l.suspects, suspect{loss, t, t.ended, fmt.Sprintf("the sandbox of session %s ended", s.session), true})
	}
}

// silent notes that a sandbox did not answer at the endpoint that was told.
func (l *ledger) silent(a answer, at time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.sessions[a.session.SessionID]
	l.suspects = append(l.suspects, suspect{wrong, t, l.instant(at), fmt.Sprintf("%s told of session %s, and its sandbox does not answer: %v", a.op, t.session, err), false})
}

// judge decides on what was suspected.
func (l *ledger) judge() {
	l.mu.Lock()
	defer l.mu.Unlock()
	// In their order, since a delete without an answer ends no more than one.
	slices.SortStableFunc(l.suspects, func(a, b suspect) int { return a.when.at.Compare(b.when.at) })
	for _, s := range l.suspects {
		cause := l.cause(s.told, s.when)
		since, lacks := l.lacking[s.told.chat]
		if cause == noCause && s.kind == loss && !s.ended && lacks && !s.when.at.Before(since) {
			continue // it was not found, and will be adopted
		}
		if s.ended {
			l.ends[cause]++
		}
		if cause == noCause {
			l.report(s.kind, s.told, "%s, for no reason (chat %s, told to expire at %s)", s.text, s.told.chat, s.told.expires.Format(time.TimeOnly))
		}
	}
	l.suspects = nil
	clear(l.lacking)
	for chat, all := range l.chats { // what is long over is not needed any more
		var kept []*told
		for _, t := range all {
			if !t.missed {
				kept = append(kept, t)
			}
		}
		l.chats[chat] = kept
	}
}

// expirySlack is how far a replica's time may be ahead of what we take for it.
const expirySlack = 3 * time.Second

// cause says why a session may have ended by a time. What is said of one whose
// sandbox had ended before has the cause of that.
func (l *ledger) cause(t *told, when instant) cause {
	if !t.ended.at.IsZero() && t.ended.at.Before(when.at) {
		when = t.ended
	}
	at := when.at
	if doomed, ok := l.doomed[t.session]; ok && !at.Before(doomed) {
		return hit
	}
	if slices.ContainsFunc(l.deletions[t.chat], func(d *deletion) bool { return d.gone == t.session && !at.Before(d.start) }) {
		return deleted
	}
	if !when.agreed.Before(t.expires.Add(-expirySlack)) {
		return expiry
	}
	node, known := l.nodes[t.session]
	for _, h := range l.hazards {
		if (!known || h.node == node) && at.After(h.at.Add(-time.Second)) && at.Before(h.at.Add(2*time.Minute)) && t.created.Before(h.at) {
			return nodeWasOut
		}
	}
	if l.deletedLate(t, at) {
		return deleted
	}
	return noCause
}

// deletedLate says whether a delete without an answer may have ended the session,
// and has it end no other.
func (l *ledger) deletedLate(t *told, at time.Time) bool {
	var first *deletion // the one that can be the cause for the shortest time to come
	late := lateLimit
	for _, d := range l.deletions[t.chat] {
		may := !d.answered && d.gone == uuid.Nil && !at.Before(d.start) && !at.After(d.end.Add(lateLimit))
		if may && (first == nil || d.end.Before(first.end)) {
			first = d
		}
		if may {
			late = min(late, at.Sub(d.end))
		}
	}
	if first == nil {
		return false
	}
	first.gone = t.session
	l.latest = max(l.latest, late)
	return true
}

// howTheyEnded counts the sandboxes that ended by why they did.
func (l *ledger) howTheyEnded() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var parts []string
	for _, c := range []cause{deleted, expiry, hit, nodeWasOut, noCause} {
		parts = append(parts, fmt.Sprintf("%d %s", l.ends[c], c))
	}
	return fmt.Sprintf("%s; by deletes that had no answer until %.1f s before, or less (limit %s)",
		strings.Join(parts, ", "), l.latest.Seconds(), lateLimit)
}

func (l *ledger) wrong(t *told, format string, args ...any) { l.report(wrong, t, format, args...) }

// report makes a violation known, each kind once per session.
func (l *ledger) report(kind violation, t *told, format string, args ...any) {
	key := string(kind) + t.session.String()
	if !l.confirmed[key] {
		l.confirmed[key] = true
		l.log.violation(kind, t.chat.String(), format, args...)
	}
}
