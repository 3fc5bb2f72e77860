package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/uuid"
)

// scanEvery is the interval between scans of the processes.
const scanEvery = 120 * time.Millisecond

// census counts the running sandboxes by their processes.
type census struct {
	chats map[uuid.UUID]bool // the chats of this run
	log   *timeline
	told  *ledger
	// nomad is the directory of a Nomad of this run alone. All its sandboxes count, too.
	// Empty: there is none, and no spare counts.
	nomad string
	// unrecorded are warm sessions whose record a fault deleted while a replica may not have
	// heard of their claim. Their chats may get another sandbox.
	unrecorded sync.Map // of uuid.UUID

	scans atomic.Int64
	pause atomic.Int64 // the longest between two scans, in ns

	pids   map[int]*process // all processes of the last scan
	double map[string]bool  // sandboxes that were seen at the same time

	mu   sync.Mutex
	live map[uuid.UUID]*sandbox // by allocation
	seen map[uuid.UUID]start    // all allocations ever
	cold int                    // those of them that were started for their chat
}

// start is when and where an allocation was first seen.
type start struct {
	session uuid.UUID
	node    string
	at      time.Time
}

// process is a process of this machine, of a sandbox or not.
type process struct {
	since   time.Time
	sandbox *sandbox // nil: no sandbox
}

// sandbox is one allocation with its processes. A session has one sandbox;
// another allocation of the same session counts as a second sandbox.
type sandbox struct {
	session, chat uuid.UUID // a spare has no chat
	alloc         uuid.UUID
	node          string // "client-0"
	pids          []int
	file          string // of a spare: the file with its chat, which appears at the claim
}

func newCensus(chats []uuid.UUID, log *timeline, told *ledger) *census {
	c := &census{
		chats: make(map[uuid.UUID]bool), log: log, told: told,
		pids: make(map[int]*process), double: make(map[string]bool),
		live: make(map[uuid.UUID]*sandbox), seen: make(map[uuid.UUID]start),
	}
	for _, chat := range chats {
		c.chats[chat] = true
	}
	return c
}

// run scans until ctx is done.
func (c *census) run(ctx context.Context) {
	tick := time.NewTicker(scanEvery)
	defer tick.Stop()
	last := time.Now()
	for ctx.Err() == nil {
		c.scan()
		c.scans.Add(1)
		now := time.Now()
		c.pause.Store(max(c.pause.Load(), int64(now.Sub(last))))
		last = now
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// youth is how long a process is looked at again after it was first seen.
// Between fork and exec, it has its parent's environment.
const youth = 2 * time.Second

func (c *census) scan() {
	began := time.Now()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		c.log.note("cannot read /proc: %v", err)
		return
	}
	pids := make(map[int]*process, len(entries))
	live := make(map[uuid.UUID]*sandbox)
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		p := c.pids[pid]
		if p == nil {
			p = &process{since: began}
		}
		if p.sandbox == nil && began.Sub(p.since) < youth {
			p.sandbox = c.look(pid)
		}
		pids[pid] = p
		if p.sandbox == nil {
			continue
		}
		if !isAlive(pid) {
			continue
		}
		c.readChat(p.sandbox)
		s := live[p.sandbox.alloc]
		if s == nil {
			s = &sandbox{session: p.sandbox.session, chat: p.sandbox.chat, alloc: p.sandbox.alloc, node: p.sandbox.node, file: p.sandbox.file}
			live[s.alloc] = s
		}
		s.pids = append(s.pids, pid)
	}
	c.pids = pids
	c.compare(live, began)
}

// compare reports changes since the last scan and everything that must not
// happen.
func (c *census) compare(live map[uuid.UUID]*sandbox, began time.Time) {
	c.mu.Lock()
	before := c.live
	c.live = live
	for id, s := range live {
		if _, known := c.seen[id]; known {
			continue
		}
		c.seen[id] = start{s.session, s.node, began}
		if s.file == "" {
			c.cold++
		}
	}
	c.mu.Unlock()
	byChat := make(map[uuid.UUID][]*sandbox)
	for id, s := range live {
		if before[id] == nil {
			c.log.note("process chat %s session %s runs as %s on %s, pids %v", s.chat, s.session, id, s.node, s.pids)
			c.told.runs(s)
		}
		c.told.alive(s, began)
		if _, lacks := c.unrecorded.Load(s.session); s.chat != uuid.Nil && !lacks {
			byChat[s.chat] = append(byChat[s.chat], s)
		}
	}
	for id, s := range before {
		if live[id] == nil {
			c.log.note("process chat %s session %s is gone as %s from %s", s.chat, s.session, id, s.node)
			c.told.ended(s, time.Now()) // not began: a fault may have hit it since then
		}
	}
	for chat, several := range byChat {
		if len(several) > 1 {
			c.doubt(chat, several)
		}
	}
}

// doubt looks again at sandboxes of one chat. They were found one after the
// other, and only sandboxes that live at the same time are a violation.
func (c *census) doubt(chat uuid.UUID, several []*sandbox) {
	var still []*sandbox
	for _, s := range several {
		// All were found alive before this, so those that still live have lived
		// at the same time.
		if slices.ContainsFunc(s.pids, isAlive) {
			still = append(still, s)
		}
	}
	if len(still) < 2 {
		return
	}
	var names []string
	for _, s := range still {
		names = append(names, fmt.Sprintf("session %s as %s on %s, pids %v", s.session, s.alloc, s.node, s.pids))
	}
	slices.Sort(names)
	key := strings.Join(names, "; ")
	if !c.double[key] {
		c.double[key] = true
		c.log.violation(duplicate, chat.String(), "chat %s has %d live sandboxes: %s", chat, len(still), key)
	}
}

// look returns the sandbox that a process belongs to, or nil if it belongs to
// none of ours.
func (c *census) look(pid int) *sandbox {
	environ, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil || !bytes.Contains(environ, []byte("BIVOUAC_SESSION_ID=")) {
		return nil // most belong to others or are gone
	}
	s, folder := &sandbox{}, ""
	for kv := range bytes.SplitSeq(environ, []byte{0}) {
		name, value, _ := strings.Cut(string(kv), "=")
		switch name {
		case "BIVOUAC_SESSION_ID":
			s.session, err = uuid.Parse(value)
		case "BIVOUAC_CHAT_ID":
			s.chat, err = uuid.Parse(value)
		case "NOMAD_ALLOC_ID":
			s.alloc, err = uuid.Parse(value)
		case "BIVOUAC_SESSION_FILE":
			s.file = value
		case "NOMAD_ALLOC_DIR":
			s.node, folder = nodeIn(value), value
		}
		if err != nil {
			return nil
		}
	}
	if !c.chats[s.chat] && (c.nomad == "" || !strings.HasPrefix(folder, c.nomad+"/")) {
		return nil
	}
	return s
}

// readChat reads the chat of a spare, if it has been claimed.
func (c *census) readChat(s *sandbox) {
	if s.file == "" {
		return
	}
	text, err := os.ReadFile(s.file) // raw_exec: the sandbox sees the files of this machine
	if err != nil {
		return // it has not been claimed
	}
	var session struct {
		ChatID uuid.UUID `json:"chat_id"`
	}
	if json.Unmarshal(text, &session) != nil || session.ChatID == s.chat {
		return
	}
	s.chat = session.ChatID
	c.log.note("process chat %s session %s was a spare until now", s.chat, s.session)
	c.told.claimed(s)
}

// nodeIn finds the agent's name in a path below its directory.
func nodeIn(path string) string {
	for part := range strings.SplitSeq(path, "/") {
		if strings.HasPrefix(part, "client-") {
			return part
		}
	}
	return ""
}

// isAlive reports whether a process exists and is not a zombie.
func isAlive(pid int) bool {
	state := stateOf(pid)
	return state != gone && state != 'Z' && state != 'X'
}

// gone is the state of a process that does not exist.
const gone = 0

// stateOf returns the state of a process as ps shows it.
func stateOf(pid int) byte {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return gone
	}
	// See proc_pid_stat(5): the state follows the name, which may contain
	// anything.
	if i := bytes.LastIndexByte(stat, ')'); i >= 0 && i+2 < len(stat) {
		return stat[i+2]
	}
	return gone
}

// running returns the running sandboxes by session.
func (c *census) running() map[uuid.UUID]*sandbox {
	c.mu.Lock()
	defer c.mu.Unlock()
	bySession := make(map[uuid.UUID]*sandbox)
	for _, s := range c.live {
		bySession[s.session] = s
	}
	return bySession
}

// spared returns how many sandboxes were started as spares.
func (c *census) spared() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.seen) - c.cold
}

// startedAbout returns the sessions whose sandboxes were started on a node about the given
// time.
func (c *census) startedAbout(node string, at time.Time) (sessions []uuid.UUID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.seen {
		if s.node == node && s.at.After(at.Add(-time.Second)) && s.at.Before(at.Add(time.Second)) {
			sessions = append(sessions, s.session)
		}
	}
	return sessions
}

func (c *census) total() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.seen)
}

// signal sends a signal to all processes of a sandbox.
func (s *sandbox) signal(sig syscall.Signal) {
	for _, pid := range s.pids {
		_ = syscall.Kill(pid, sig) // it may have ended already
	}
}
