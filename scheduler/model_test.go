package scheduler_test

import (
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/scheduler"
)

// model is what the scheduler is held against: the three use cases of the
// reference, the intents around them, and what was added since, done by one hand
// on plain values. It tells errors by their kinds; the empty kind is success.
type model struct {
	now        time.Time
	records    map[uuid.UUID]*modelSession
	sandboxes  map[string]*modelSandbox // by session name
	sessions   int                      // ever written
	containers int                      // ever started

	// For one step:
	faults  map[effect]modelFault
	lost    bool // the lock that the use case holds was lost
	freed   bool // it was released
	gets    int  // reads of the record
	metrics map[string]int64
	logs    []string
}

type modelSession struct {
	name, agent, volume, container, reason string
	state                                  scheduler.State
	expires                                time.Time
}

type modelSandbox struct {
	container, reason string
	state             scheduler.State // running, dead or lost
	runs              bool
}

// modelFault is what happens at an effect.
type modelFault struct {
	after bool   // it happens and the answer is lost; else it does not happen
	later bool   // it succeeds once
	lock  bool   // the lock is lost before it
	kind  string // of the error
}

func newModel() *model {
	return &model{
		now:       noon,
		records:   make(map[uuid.UUID]*modelSession),
		sandboxes: make(map[string]*modelSandbox),
		faults:    make(map[effect]modelFault),
		metrics:   make(map[string]int64),
	}
}

// try lets an effect happen as the step's faults will have it.
func (m *model) try(chat uuid.UUID, name string, happen func()) string {
	fault, faulty := m.faults[effect{chat, name}]
	if faulty && !fault.after {
		return fault.kind
	}
	happen()
	if faulty {
		return fault.kind
	}
	return ""
}

func (m *model) log(level, event string, more ...any) {
	line := level + " " + event
	for pair := range slices.Chunk(more, 2) {
		line += fmt.Sprintf(" %v=%v", pair...)
	}
	m.logs = append(m.logs, line)
}

func named(chat uuid.UUID, s modelSession, more ...any) []any {
	return append([]any{"chat_id", chatNames[chat], "session_id", s.name, "container_id", s.container}, more...)
}

func (m *model) count(metric string, labels map[string]string) { m.metrics[point(metric, labels, 0)]++ }

func (m *model) countResult(metric, result string) {
	m.count(metric, map[string]string{"result": result})
}

// get reads the record. It may be that only the second read of a step fails.
func (m *model) get(chat uuid.UUID) string {
	m.gets++
	if m.faults[effect{chat, "get"}].later && m.gets == 1 {
		return ""
	}
	return m.try(chat, "get", func() {})
}

func (m *model) lock(chat uuid.UUID) string {
	m.lost, m.freed = false, false
	return m.try(chat, "lock", func() {})
}

func (m *model) release(chat uuid.UUID) {
	if m.freed {
		return
	}
	m.freed = true
	if kind := m.try(chat, "release", func() {}); kind != "" {
		m.log("warn", "lock_release_failed", "error", kind)
	}
}

func (m *model) write(chat uuid.UUID, next *modelSession, free bool) string {
	name := "remove"
	if next != nil {
		name = "write " + string(next.state)
	}
	if free {
		name += " + release"
	}
	fault, faulty := m.faults[effect{chat, name}]
	if fault.lock {
		m.lost, faulty = true, false
	}
	switch {
	case faulty && !fault.after:
		return fault.kind
	case m.lost || m.freed:
		return "lock_lost"
	}
	if next == nil {
		delete(m.records, chat)
	} else {
		written := *next
		m.records[chat] = &written
	}
	m.freed = free
	if faulty {
		return fault.kind
	}
	return ""
}

// observe is the record in the light of what the runtime sees.
func (m *model) observe(chat uuid.UUID) modelSession {
	s := *m.records[chat]
	if s.state != scheduler.StateRunning && s.state != scheduler.StateLost {
		return s
	}
	if m.try(chat, "driver.inspect", func() {}) != "" {
		return s
	}
	switch sandbox, ok := m.sandboxes[s.name]; {
	case !ok:
		s.state, s.reason = scheduler.StateLost, "the runtime no longer knows the sandbox"
	case sandbox.container != s.container:
		s.state, s.reason = scheduler.StateLost, "another sandbox has taken its place: "+sandbox.container
	default:
		s.state, s.reason = sandbox.state, sandbox.reason
	}
	return s
}

// inspect is a look at a sandbox that is to be stopped.
func (m *model) inspect(chat uuid.UUID) string { return m.try(chat, "driver.inspect", func() {}) }

// find is a look for sandboxes of the chat beside that of its record. There are none.
func (m *model) find(chat uuid.UUID) string { return m.try(chat, "driver.find", func() {}) }

// endSandbox stops a session's sandbox, or asks it whether it answers if the
// runtime no longer knows it, which it does not.
func (m *model) endSandbox(chat uuid.UUID, s modelSession, stop func(uuid.UUID, string) string) string {
	if m.sandboxes[s.name] == nil && s.state != scheduler.StateCreating {
		return m.try(chat, "driver.answers", func() {})
	}
	return stop(chat, s.name)
}

func (m *model) stop(chat uuid.UUID, session string) string {
	return m.try(chat, "driver.stop", func() {
		if s := m.sandboxes[session]; s != nil && s.runs {
			s.runs, s.state, s.reason = false, scheduler.StateDead, "stopped"
		}
	})
}

func (m *model) delete(chat uuid.UUID, session string) string {
	return m.try(chat, "driver.delete", func() { delete(m.sandboxes, session) })
}
