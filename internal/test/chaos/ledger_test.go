package main

import (
	"os"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/wire"
)

// gonePID is no process's ID: it is larger than any that Linux assigns.
const gonePID = 1 << 23

// TestLedgerFindsWhatMustNotBe shows that the ledger reports what contradicts
// the answers to callers, and does not report an end that has a cause.
func TestLedgerFindsWhatMustNotBe(t *testing.T) {
	start := time.Now()
	chat, session, other := uuid.New(), uuid.New(), uuid.New()
	told := func(id uuid.UUID, ttl time.Duration, state string) wire.Session {
		return wire.Session{SessionID: id, ChatID: chat, CreatedAt: start, ExpiresAt: start.Add(ttl), State: state}
	}
	at := func(s float64) time.Time { return start.Add(time.Duration(s * float64(time.Second))) }
	here := &sandbox{session: session, chat: chat, node: "client-0"}

	for _, c := range []struct {
		name  string
		after func(*ledger) // a create has reported the session
		want  int
	}{
		{"nothing more", func(*ledger) {}, 0},
		{"its sandbox ends", func(l *ledger) { l.ended(here, at(10)) }, 1},
		{"its sandbox ends when it expires", func(l *ledger) { l.ended(here, at(60)) }, 0},
		{"its sandbox ends after a fault hit it", func(l *ledger) {
			l.doom(session)
			l.ended(here, at(10))
		}, 0},
		{"its sandbox ends with its node", func(l *ledger) {
			l.runs(here)
			l.lost(hazard{"client-0", at(9)})
			l.ended(here, at(10))
		}, 0},
		{"its sandbox ends while another node is lost", func(l *ledger) {
			l.runs(here)
			l.lost(hazard{"client-1", at(9)})
			l.ended(here, at(10))
		}, 1},
		{"a get finds none", func(l *ledger) { l.sawNone(at(5), at(6), chat, "get") }, 1},
		{"a get finds none after a delete", func(l *ledger) {
			l.deleting(chat)(true, session)
			l.sawNone(at(5), at(6), chat, "get")
		}, 0},
		{"a get finds none while a delete has no answer", func(l *ledger) {
			l.deleting(chat)(false, uuid.Nil)
			l.sawNone(at(5), at(6), chat, "get")
		}, 0},
		{"a get finds none long after a delete that had no answer", func(l *ledger) {
			l.deleting(chat)(false, uuid.Nil)
			l.saw(answer{start: at(5), end: at(6), op: "renew", session: told(session, time.Hour, "running")})
			late := lateLimit.Seconds() + 5
			l.sawNone(at(late), at(late), chat, "get")
		}, 1},
		{"a get finds none before any delete", func(l *ledger) {
			l.sessions[session].first = at(-10)
			l.sawNone(at(-5), at(-1), chat, "get")
			l.deleting(chat)(true, session)
		}, 1},
		{"it ends after a delete that ended another", func(l *ledger) {
			l.deleting(chat)(true, other)
			l.ended(here, at(5))
		}, 1},
		{"it ends, and a get finds none, while a delete has no answer", func(l *ledger) {
			l.deleting(chat)(false, uuid.Nil)
			l.ended(here, at(5))
			l.sawNone(at(6), at(7), chat, "get")
		}, 0},
		{"it and the next one end while a delete has no answer", func(l *ledger) {
			l.deleting(chat)(false, uuid.Nil)
			l.ended(here, at(5))
			l.saw(answer{start: at(6), end: at(7), op: "create", made: true, session: told(other, time.Hour, "running")})
			l.ended(&sandbox{session: other, chat: chat, node: "client-0"}, at(8))
		}, 1},
		{"it and the next one end while two deletes have no answer", func(l *ledger) {
			l.deleting(chat)(false, uuid.Nil)
			l.deleting(chat)(false, uuid.Nil)
			l.ended(here, at(5))
			l.saw(answer{start: at(6), end: at(7), op: "create", made: true, session: told(other, time.Hour, "running")})
			l.ended(&sandbox{session: other, chat: chat, node: "client-0"}, at(8))
		}, 0},
		{"a get finds none after a delete that found none", func(l *ledger) {
			l.deleting(chat)(true, uuid.Nil)
			l.sawNone(at(5), at(6), chat, "get")
		}, 1},
		{"a get tells of it after its delete", func(l *ledger) {
			l.deleting(chat)(true, session)
			l.saw(answer{start: at(5), end: at(6), op: "get", session: told(session, time.Minute, "running")})
		}, 1},
		{"it runs after its delete", func(l *ledger) {
			l.deleting(chat)(true, session)
			l.alive(here, at(5))
		}, 1},
		{"another create makes it again", func(l *ledger) {
			l.saw(answer{start: at(5), end: at(6), op: "create", made: true, session: told(session, time.Minute, "running")})
		}, 1},
		{"another create makes another one", func(l *ledger) {
			l.saw(answer{start: at(5), end: at(6), op: "create", made: true, session: told(other, time.Minute, "running")})
		}, 1},
		{"it is to expire sooner", func(l *ledger) {
			l.saw(answer{start: at(5), end: at(6), op: "get", session: told(session, 50*time.Second, "running")})
		}, 1},
		{"it is told to be dead", func(l *ledger) {
			l.saw(answer{start: at(5), end: at(6), op: "get", session: told(session, time.Minute, "dead")})
		}, 1},
		{"it is told to be dead after a fault hit it", func(l *ledger) {
			l.doom(session)
			l.saw(answer{start: at(5), end: at(6), op: "get", session: told(session, time.Minute, "dead")})
		}, 0},
		{"it is told to be dead while it runs, whatever hit it", func(l *ledger) {
			l.doom(session)
			l.runs(&sandbox{session: session, chat: chat, node: "client-0", pids: []int{os.Getpid()}})
			l.saw(answer{start: at(5), end: at(6), op: "get", session: told(session, time.Minute, "dead")})
		}, 1},
		{"it is told to be dead while only a second run of its task lives", func(l *ledger) {
			l.doom(session)
			l.restarts(&sandbox{session: session, pids: []int{gonePID}})
			l.runs(&sandbox{session: session, chat: chat, node: "client-0", pids: []int{os.Getpid()}})
			l.saw(answer{start: at(5), end: at(6), op: "get", session: told(session, time.Minute, "running")})
			l.saw(answer{start: at(7), end: at(8), op: "get", session: told(session, time.Minute, "dead")})
		}, 0},
		{"it is handed out long after a second run of its task was seen", func(l *ledger) {
			l.doom(session)
			l.restarts(&sandbox{session: session, pids: []int{gonePID}})
			l.alive(&sandbox{session: session, chat: chat, node: "client-0", pids: []int{os.Getpid()}}, at(5))
			late := 6 + restartLimit.Seconds()
			l.saw(answer{start: at(late), end: at(late), op: "create", session: told(session, time.Minute, "running")})
		}, 1},
		{"its session file names another chat", func(l *ledger) {
			l.claimed(&sandbox{session: session, chat: other})
			l.claimed(&sandbox{session: session, chat: other})
		}, 1},
		{"its session file names its chat", func(l *ledger) { l.claimed(here) }, 0},
		{"a create gets a spare that does not answer", func(l *ledger) {
			l.sessions[session].made = false
			l.mute[session] = span{from: at(5)}
			l.saw(answer{start: at(6), end: at(7), op: "create", made: true, session: told(session, time.Hour, "running")})
		}, 1},
		{"a create gets a spare that answers again", func(l *ledger) {
			l.sessions[session].made = false
			l.mute[session] = span{at(5), at(8)}
			l.saw(answer{start: at(6), end: at(9), op: "create", made: true, session: told(session, time.Hour, "running")})
		}, 0},
		{"a create began before its spare stopped answering", func(l *ledger) {
			l.sessions[session].made = false
			l.mute[session] = span{from: at(5)}
			l.saw(answer{start: at(4), end: at(7), op: "create", made: true, session: told(session, time.Hour, "running")})
		}, 0},
		{"a get finds none after its record was deleted", func(l *ledger) {
			l.loses(chat)
			l.sawNone(at(5), at(6), chat, "get")
		}, 0},
		{"a get finds none after its record was deleted and all had settled", func(l *ledger) {
			l.loses(chat)
			l.judge()
			l.sawNone(at(5), at(6), chat, "get")
		}, 1},
		{"its sandbox ends after its record was deleted", func(l *ledger) {
			l.loses(chat)
			l.ended(here, at(10))
		}, 1},
		{"a cleanup ends it early", func(l *ledger) { l.cleaned(told(session, time.Minute, "running")) }, 1},
		{"its sandbox does not answer", func(l *ledger) {
			l.silent(answer{op: "create", session: told(session, time.Minute, "running")}, at(5), nil)
		}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			log, err := newTimeline(t.TempDir())
			must.NoError(t, err)
			l := newLedger(log)
			l.saw(answer{start: start, end: at(1), op: "create", made: true, session: told(session, time.Minute, "running")})
			c.after(l)
			l.judge()
			must.Eq(t, c.want, log.violations(), must.Sprint(log.worst()))
			must.NoError(t, log.close())
		})
	}
}

// TestLedgerGoesByTheAgreedTime shows that sessions expire by the replicas'
// agreed time if it differs from this machine's time.
func TestLedgerGoesByTheAgreedTime(t *testing.T) {
	for _, c := range []struct {
		name  string
		left  time.Duration // until it expires by this machine's clock
		ahead time.Duration // lead of the agreed time
		want  int
	}{
		{"expired by both", -30 * time.Second, 0, 0},
		{"expired by none", 30 * time.Second, 0, 1},
		{"expired by the agreed time alone", 30 * time.Second, time.Minute, 0},
		{"expired by a time that a fault wrote alone", 30 * time.Second, 24 * time.Hour, 1},
		{"expired by this machine's time alone", -30 * time.Second, -time.Minute, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			log, err := newTimeline(t.TempDir())
			must.NoError(t, err)
			l, now := newLedger(log), time.Now()
			l.clock.take("replica " + now.Add(c.ahead).UTC().Format(time.RFC3339Nano))
			s := wire.Session{SessionID: uuid.New(), ChatID: uuid.New(), CreatedAt: now.Add(c.ahead), ExpiresAt: now.Add(c.left), State: "running"}
			l.saw(answer{start: now, end: now, op: "create", made: true, session: s})
			l.ended(&sandbox{session: s.SessionID, chat: s.ChatID}, now)
			l.judge()
			must.Eq(t, c.want, log.violations(), must.Sprint(log.worst()))
			must.NoError(t, log.close())
		})
	}
}

// TestSandboxEndsWhenItIsSeenToBeGone shows that a fault counts as the cause of
// an end if it hits the sandbox while a scan is running.
func TestSandboxEndsWhenItIsSeenToBeGone(t *testing.T) {
	log, err := newTimeline(t.TempDir())
	must.NoError(t, err)
	l := newLedger(log)
	s := &sandbox{session: uuid.New(), chat: uuid.New(), alloc: uuid.New(), node: "client-0"}
	c := newCensus([]uuid.UUID{s.chat}, log, l)
	began := time.Now()
	c.compare(map[uuid.UUID]*sandbox{s.alloc: s}, began)
	l.saw(answer{start: began, end: began, op: "create", session: wire.Session{
		SessionID: s.session, ChatID: s.chat, CreatedAt: began, ExpiresAt: began.Add(time.Hour), State: "running",
	}})
	began = time.Now()
	l.doom(s.session)
	c.compare(nil, began)
	l.judge()
	must.Eq(t, 0, log.violations(), must.Sprint(log.worst()))
	must.NoError(t, log.close())
}

// TestPoolProblems shows what counts as a spare that is left over.
func TestPoolProblems(t *testing.T) {
	a, b, c := uuid.New(), uuid.New(), uuid.New()
	ready := record{State: "ready"}
	spare, claimed := &sandbox{file: "session.json"}, &sandbox{file: "session.json", chat: uuid.New()}
	for _, test := range []struct {
		name    string
		spares  map[uuid.UUID]record
		running map[uuid.UUID]*sandbox
		leaked  int
		lacking bool
	}{
		{"a full pool", map[uuid.UUID]record{a: ready, b: ready}, map[uuid.UUID]*sandbox{a: spare, b: spare, c: claimed}, 0, false},
		{"a pool with too few", map[uuid.UUID]record{a: ready}, map[uuid.UUID]*sandbox{a: spare}, 0, true},
		{"a pool with too many", map[uuid.UUID]record{a: ready, b: ready, c: ready}, map[uuid.UUID]*sandbox{a: spare, b: spare, c: spare}, 1, false},
		{"a spare without a record", map[uuid.UUID]record{a: ready, b: ready}, map[uuid.UUID]*sandbox{a: spare, b: spare, c: spare}, 1, false},
		{"a record without a spare", map[uuid.UUID]record{a: ready, b: ready, c: ready}, map[uuid.UUID]*sandbox{a: spare, b: spare}, 1, false},
		{"a spare that nobody ends", map[uuid.UUID]record{a: ready, b: {State: "ending"}}, map[uuid.UUID]*sandbox{a: spare, b: spare}, 1, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := &world{pools: &pools{now: pooling{size: 2}}}
			leaked, lacking := w.poolProblems(test.spares, test.running)
			must.Len(t, test.leaked, leaked)
			must.Eq(t, test.lacking, lacking != "")
		})
	}
}
