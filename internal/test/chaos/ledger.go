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

// ledger records the answers to callers and the actions that end sessions. What
// contradicts the ledger is a violation.
type ledger struct {
	log   *timeline
	clock clock

	mu        sync.Mutex
	chats     map[uuid.UUID][]*told
	sessions  map[uuid.UUID]*told
	nodes     map[uuid.UUID]string    // where sessions run, reported or not
	running   map[uuid.UUID]*sandbox  // what the last scan found
	doomed    map[uuid.UUID]time.Time // when a fault was about to end a session, reported or not
	restarted map[uuid.UUID]*restart  // sessions whose task a fault ran again
	lacking   map[uuid.UUID]time.Time // chats whose record a fault deleted and when, until everything has settled
	lacked    map[string]bool         // all such chats
	deletions map[uuid.UUID][]*deletion
	hazards   []hazard
	suspects  []suspect
	given     map[uuid.UUID]uuid.UUID // the chats of sessions, reported or found in a session file
	mute      map[uuid.UUID]span      // when spares did not answer
	confirmed map[string]bool         // what has already been reported
	ends      map[cause]int           // why sandboxes ended that callers knew
	latest    time.Duration           // longest time between an unanswered delete and the end that only it explains
}

// cause is a reason why a session may have ended.
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
	created       time.Time // by this machine's clock, approximately
	expires       time.Time // by the agreed time: the latest that any caller was told …
	expiresTold   time.Time // … and when
	first         time.Time // when a caller was first told of it
	made          bool      // a create reported that it made the session
	deleted       time.Time // when a delete reported that it is gone
	missed        bool      // it was found to be gone
	ended         instant   // when its sandbox was seen to be gone
}

// instant is a time by this machine's clock and by the replicas' clock.
type instant struct{ at, agreed time.Time }

func (l *ledger) instant(at time.Time) instant { return instant{at, l.clock.agreed(at)} }

// deletion is a request that ends at most one session of the chat: the one in
// its answer. If it got no answer, it may end any session until lateLimit after
// the request.
type deletion struct {
	start, end time.Time
	answered   bool
	gone       uuid.UUID // the session that it ended, if known
}

// lateLimit is how long after its caller gave up a delete may still be carried
// out. A paused replica may carry it out until other replicas have its locks.
// If a replica died, others settle what it had begun, and then the sandbox has
// to stop.
const lateLimit = pastTTL + settleLimit + stopTime

// stopTime is how long a sandbox may take to stop.
const stopTime = 10 * time.Second

// restart records that a task ran again in its allocation.
type restart struct {
	first  []int     // processes of the first run
	second time.Time // when a process of another run was first seen
}

// hazard is a node that Nomad counted as lost. When the node is back, it ends
// its sandboxes.
type hazard struct {
	node string
	at   time.Time
}

// span is a time with a beginning and an end. A zero end means that it has not ended.
type span struct{ from, until time.Time }

func (s span) covers(start, end time.Time) bool {
	return !s.from.IsZero() && !start.Before(s.from) && (s.until.IsZero() || !end.After(s.until))
}

// suspect is something that is a violation unless it had a cause. The cause may
// only become known later.
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
		given: make(map[uuid.UUID]uuid.UUID), mute: make(map[uuid.UUID]span),
		deletions: make(map[uuid.UUID][]*deletion), confirmed: make(map[string]bool), ends: make(map[cause]int),
	}
}

// answer is an answer that contains a session.
type answer struct {
	start, end time.Time // of the request
	op         string    // for people
	made       bool      // it reports that it made the session
	session    wire.Session
}

// saw records an answer that reports a session.
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
	l.give(s.SessionID, s.ChatID, a.op)
	if a.made && l.mute[s.SessionID].covers(a.start, a.end) {
		l.report(time.Now(), silentSpare, t, "%s got the spare of session %s, which answered nobody in the meantime", a.op, s.SessionID)
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

// give records that a session belongs to a chat, which never changes.
func (l *ledger) give(session, chat uuid.UUID, source string) {
	first, known := l.given[session]
	if !known {
		l.given[session] = chat
		return
	}
	if key := string(twice) + session.String(); first != chat && !l.confirmed[key] {
		l.confirmed[key] = true
		l.log.violation(twice, session.String(), "%s: session %s belongs to chat %s, and before to chat %s", source, session, chat, first)
	}
}

// claimed records that the session file of a spare names a chat.
func (l *ledger) claimed(s *sandbox) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.give(s.session, s.chat, "its session file")
}

// mutes records that a spare does not answer from now on.
func (l *ledger) mutes(session uuid.UUID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mute[session] = span{from: time.Now()}
}

// unmutes records that a spare may answer again.
func (l *ledger) unmutes(session uuid.UUID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if m, ok := l.mute[session]; ok {
		l.mute[session] = span{m.from, time.Now()}
	}
}

// sawNone records an answer that reports no session for the chat.
func (l *ledger) sawNone(start, end time.Time, chat uuid.UUID, op string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.missing(start, end, chat, uuid.Nil, op+" finds no session")
}

// missing suspects the loss of all sessions of the chat that were reported
// before start, except the session but.
func (l *ledger) missing(start, end time.Time, chat, but uuid.UUID, text string) {
	for _, t := range l.chats[chat] {
		if t.session != but && !t.missed && t.first.Before(start) {
			t.missed = true
			l.suspects = append(l.suspects, suspect{loss, t, l.instant(end), text, false})
		}
	}
}

// deleting records the start of a delete. The function that it returns records
// the end. gone is the session that the answer names, or the nil UUID for none;
// answered is false if there was no answer.
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

// cleaned records a session that a cleanup reports as ended because it had
// expired.
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

// doom records that a fault is about to end a session.
func (l *ledger) doom(session uuid.UUID) { l.doomAt(session, time.Now()) }

// doomAt records that a fault at an earlier time may end a session.
func (l *ledger) doomAt(session uuid.UUID, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.doomed[session]; !ok {
		l.doomed[session] = at
	}
}

// acquit records that what was to end a session did not.
func (l *ledger) acquit(session uuid.UUID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.doomed, session)
}

// restartLimit is how long after the start of a second run a replica may take
// the session for unchanged. The replica may be cut off from Nomad, and Nomad
// from the node.
const restartLimit = time.Minute

// restarts records that a fault is about to run a sandbox's task again.
func (l *ledger) restarts(s *sandbox) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.restarted[s.session] == nil {
		l.restarted[s.session] = &restart{first: s.pids}
	}
}

// firstRun returns the sandbox's processes that belong to the first run of its
// task.
func (l *ledger) firstRun(s *sandbox) []int {
	r := l.restarted[s.session]
	if r == nil {
		return s.pids
	}
	return slices.DeleteFunc(slices.Clone(s.pids), func(pid int) bool { return !slices.Contains(r.first, pid) })
}

// secondRun returns the sandbox's processes that belong to a later run of its
// task.
func (l *ledger) secondRun(s *sandbox) []int {
	l.mu.Lock()
	defer l.mu.Unlock()
	first := l.firstRun(s)
	return slices.DeleteFunc(slices.Clone(s.pids), func(pid int) bool { return slices.Contains(first, pid) })
}

// loses records that a fault is about to delete a chat's record. Until the
// record is back, callers may be told that there is no session; the sandbox
// must not end.
func (l *ledger) loses(chat uuid.UUID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lacked[chat.String()] = true
	if _, ok := l.lacking[chat]; !ok {
		l.lacking[chat] = time.Now()
	}
}

// misses reports whether a record was deleted since everything last settled.
func (l *ledger) misses() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.lacking) > 0
}

// missed reports whether the chat's record was ever deleted.
func (l *ledger) missed(chat string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lacked[chat]
}

// lost records that Nomad counted a node as lost.
func (l *ledger) lost(h hazard) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hazards = append(l.hazards, h)
}

// runs records that a sandbox runs.
func (l *ledger) runs(s *sandbox) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.nodes[s.session], l.running[s.session] = s.node, s
}

// alive records that a scan that began at the given time found a sandbox alive.
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

// ended records that a sandbox is gone.
func (l *ledger) ended(s *sandbox, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.running, s.session)
	if t := l.sessions[s.session]; t != nil {
		t.ended = l.instant(at)
		l.suspects = append(l.suspects, suspect{loss, t, t.ended, fmt.Sprintf("the sandbox of session %s ended", s.session), true})
	}
}

// silent records that a sandbox did not answer at the endpoint in an answer.
func (l *ledger) silent(a answer, at time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.sessions[a.session.SessionID]
	kind := wrong
	if a.made && a.session.Warm {
		kind = silentSpare
	}
	l.suspects = append(l.suspects, suspect{kind, t, l.instant(at), fmt.Sprintf("%s told of session %s, and its sandbox does not answer: %v", a.op, t.session, err), false})
}

// judge decides on the suspects.
func (l *ledger) judge() {
	l.mu.Lock()
	defer l.mu.Unlock()
	// In order of time, because an unanswered delete ends at most one session.
	slices.SortStableFunc(l.suspects, func(a, b suspect) int { return a.when.at.Compare(b.when.at) })
	for _, s := range l.suspects {
		cause := l.cause(s.told, s.when)
		since, lacks := l.lacking[s.told.chat]
		if cause == noCause && s.kind == loss && !s.ended && lacks && !s.when.at.Before(since) {
			continue // it was not found and will be adopted
		}
		if s.ended {
			l.ends[cause]++
		}
		if cause == noCause {
			l.report(s.when.at, s.kind, s.told, "%s, for no reason (chat %s, told to expire at %s)", s.text, s.told.chat, s.told.expires.Format(time.TimeOnly))
		}
	}
	l.suspects = nil
	clear(l.lacking)
	for chat, all := range l.chats { // drop sessions that are long over
		var kept []*told
		for _, t := range all {
			if !t.missed {
				kept = append(kept, t)
			}
		}
		l.chats[chat] = kept
	}
}

// expirySlack is how far a replica's time may be ahead of our estimate.
const expirySlack = 3 * time.Second

// cause returns why a session may have ended by the given time. If its sandbox
// was already seen to be gone before that, the earlier time counts.
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

// deletedLate reports whether an unanswered delete may have ended the session.
// It then assigns that delete to the session, so that it explains no other end.
func (l *ledger) deletedLate(t *told, at time.Time) bool {
	var first *deletion // the one that can explain later ends for the shortest time
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

// howTheyEnded counts the ended sandboxes by cause.
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

func (l *ledger) wrong(t *told, format string, args ...any) {
	l.report(time.Now(), wrong, t, format, args...)
}

// report reports a violation that was seen at the given time, each kind once per session.
func (l *ledger) report(at time.Time, kind violation, t *told, format string, args ...any) {
	key := string(kind) + t.session.String()
	if !l.confirmed[key] {
		l.confirmed[key] = true
		l.log.violationAt(at, kind, t.chat.String(), format, args...)
	}
}
