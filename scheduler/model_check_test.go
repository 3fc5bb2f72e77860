package scheduler_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"
	"pgregory.net/rapid"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// Random sequences of commands, steps of the clock, deaths of sandboxes and
// failures: after each step the scheduler and the model must agree on the
// result, the records, the sandboxes that really run, what was counted and what
// was logged. Whatever happened, nothing is left in the end.
//
// A sequence that fails is made as short as it can be, and printed with the seed
// that repeats it.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := &modelCheck{world: newWorld(t), model: newModel()}
		t.Repeat(map[string]func(*rapid.T){
			"create":  c.Create,
			"again":   c.CreateAgain,
			"delete":  c.Delete,
			"renew":   c.Renew,
			"cleanup": c.Cleanup,
			"settle":  c.Settle,
			"get":     c.Get,
			"list":    c.List,
			"clock":   c.Clock,
			"sandbox": c.Sandbox,
			"":        c.Invariants,
		})
		c.NothingIsLeft(t)
	})
}

// modelCheck does everything twice: to the world, and to the model.
type modelCheck struct {
	*world
	model *model
}

var (
	chats  = rapid.SampledFrom([]uuid.UUID{chatA, chatB, chatC})
	ttls   = rapid.SampledFrom([]time.Duration{0, scheduler.MinTTL, time.Minute, defaultTTL, maxTTL})
	agents = rapid.SampledFrom([]string{"agent-1", "agent-1", "agent-2"})
	paths  = rapid.SampledFrom([]string{"/data/a", "/data/a", "/data/b"})
)

// A failure is an error and the kind that it is to be reported as.
type failure struct {
	err  error
	kind string
}

var (
	unreachable = failure{fmt.Errorf("%w: injected", scheduler.ErrUnavailable), "store_unavailable"}
	damaged     = failure{fmt.Errorf("%w: injected", scheduler.ErrDamaged), "damaged_record"}
	timedOut    = failure{fmt.Errorf("%w: injected", scheduler.ErrLockTimeout), "lock_timeout"}

	noRuntime  = failure{fmt.Errorf("%w: injected", runtime.ErrUnavailable), "runtime_unavailable"}
	unknown    = failure{errors.New("of no known kind"), "runtime_unavailable"}
	notPlaced  = failure{fmt.Errorf("%w: injected", runtime.ErrNotPlaced), "not_placed"}
	notReady   = failure{fmt.Errorf("%w: injected", runtime.ErrNotReady), "not_ready"}
	impossible = failure{fmt.Errorf("%w: injected", runtime.ErrInvalid), "runtime_invalid"}
	tooSlow    = failure{context.DeadlineExceeded, "deadline_exceeded"}
)

// failures says how each effect can fail.
var failures = []struct {
	name   string
	all    bool // it concerns no single chat
	before []failure
	after  []failure
	lock   bool // the lock can be lost before it
}{
	{name: "get", before: []failure{unreachable, damaged}},
	{name: "list expired", all: true, before: []failure{unreachable}},
	{name: "list in flight", all: true, before: []failure{unreachable}},
	{name: "lock", before: []failure{unreachable, timedOut, damaged}},
	{name: "release", after: []failure{unreachable}},
	{name: "write creating", before: []failure{unreachable}, after: []failure{unreachable}, lock: true},
	{name: "write running + release", before: []failure{unreachable}, after: []failure{unreachable}, lock: true},
	{name: "write stopping", before: []failure{unreachable}, after: []failure{unreachable}, lock: true},
	{name: "remove + release", before: []failure{unreachable}, after: []failure{unreachable}, lock: true},
	{
		name:   "driver.create",
		before: []failure{noRuntime, unknown, notPlaced, notReady, impossible, tooSlow},
		after:  []failure{noRuntime, unknown, notReady, tooSlow},
		lock:   true,
	},
	{name: "driver.stop", before: []failure{noRuntime, unknown, tooSlow}, after: []failure{noRuntime, unknown}},
	{name: "driver.delete", before: []failure{noRuntime, unknown, tooSlow}, after: []failure{noRuntime, unknown}},
	{name: "driver.inspect", before: []failure{noRuntime, unknown}},
	{name: "driver.find", before: []failure{noRuntime, unknown}},
	{name: "driver.answers", before: []failure{noRuntime, unknown}},
}

// break lets up to three effects fail in this step, on one chat each. Locks are
// lost only where one use case runs on one chat.
func (c *modelCheck) breakSome(t *rapid.T, chat uuid.UUID) {
	c.model.faults = make(map[effect]modelFault)
	c.model.metrics = make(map[string]int64)
	c.model.logs, c.model.gets = nil, 0
	c.effects.heal()
	if !rapid.Bool().Draw(t, "faulty") {
		return
	}
	for range rapid.IntRange(1, 3).Draw(t, "faults") {
		how := failures[rapid.IntRange(0, len(failures)-1).Draw(t, "effect")]
		at := effect{Chat: chat, Name: how.name}
		switch {
		case how.all:
			at.Chat = uuid.Nil
		case chat == uuid.Nil:
			at.Chat = chats.Draw(t, "fault's chat")
		}
		if how.lock && chat != uuid.Nil && rapid.Bool().Draw(t, "lock lost") {
			c.effects.hook(at, hook{before: c.loseLock(how.name)})
			c.model.faults[at] = modelFault{lock: true}
			continue
		}
		if len(how.before) > 0 && (len(how.after) == 0 || rapid.Bool().Draw(t, "before")) {
			f := rapid.SampledFrom(how.before).Draw(t, "failure")
			later := how.name == "get" && rapid.Bool().Draw(t, "later")
			passes := 0
			if later {
				passes = 1
			}
			c.effects.hook(at, hook{before: func(context.Context) error {
				if passes--; passes >= 0 {
					return nil
				}
				return f.err
			}})
			c.model.faults[at] = modelFault{kind: f.kind, later: later}
			continue
		}
		f := rapid.SampledFrom(how.after).Draw(t, "failure")
		c.effects.hook(at, hook{after: func(context.Context) error { return f.err }})
		c.model.faults[at] = modelFault{kind: f.kind, after: true}
	}
}

// loseLock takes the replica's locks away. Before a driver's call it waits until
// that was noticed; a write finds out by itself.
func (c *modelCheck) loseLock(name string) func(context.Context) error {
	return func(ctx context.Context) error {
		c.locker.End()
		if strings.HasPrefix(name, "driver.") {
			<-ctx.Done()
		}
		return nil
	}
}

// agree compares all that can be seen after a step.
func (c *modelCheck) agree(t *rapid.T, want, got string, err error) {
	t.Logf("%s", want)
	if err != nil {
		got = "error " + scheduler.Kind(err)
	}
	must.Eq(t, want, got)
	c.agreeOnState(t)

	metrics, err := c.seen.takeMetrics()
	must.NoError(t, err)
	must.Eq(t, c.model.points(), metrics)

	logs := c.seen.takeLogs()
	for i := range logs {
		logs[i] = c.name(logs[i])
	}
	slices.Sort(logs)
	slices.Sort(c.model.logs)
	must.Eq(t, c.model.logs, logs)
	c.seen.spans.Reset()
}

func (c *modelCheck) agreeOnState(t *rapid.T) {
	var records []string
	for chat, s := range c.model.records {
		records = append(records, describeModel(chat, *s))
	}
	slices.Sort(records)
	must.Eq(t, records, c.records())

	var known, running []string
	for name, s := range c.model.sandboxes {
		known = append(known, fmt.Sprintf("%s %s %s %s", name, s.container, s.state, s.reason))
		if s.runs {
			running = append(running, name)
		}
	}
	var reallyKnown, reallyRunning []string
	for s, err := range c.driver.List(context.Background()) {
		must.NoError(t, err)
		reallyKnown = append(reallyKnown, c.name(fmt.Sprintf("%s %s %s %s", s.SessionID, s.ContainerID, s.State, s.Reason)))
	}
	for _, s := range c.driver.Running() {
		reallyRunning = append(reallyRunning, c.name(s.SessionID))
	}
	for _, lines := range [][]string{known, reallyKnown, running, reallyRunning} {
		slices.Sort(lines)
	}
	must.Eq(t, known, reallyKnown)
	must.Eq(t, running, reallyRunning)
}

// points are the metrics that the model counted, and the sessions that stand.
func (m *model) points() []string {
	active := 0
	for _, s := range m.records {
		if s.state != scheduler.StateCreating {
			active++
		}
	}
	lines := []string{point("sandbox.active.count", nil, int64(active))}
	for name, n := range m.metrics {
		lines = append(lines, strings.TrimSuffix(name, " 0")+" "+itoa(int(n)))
	}
	slices.Sort(lines)
	return lines
}

func (c *modelCheck) Create(t *rapid.T) {
	c.create(t, scheduler.CreateCommand{
		ChatID:         chats.Draw(t, "chat"),
		AgentID:        agents.Draw(t, "agent"),
		VolumeHostPath: paths.Draw(t, "volume"),
		TTL:            ttls.Draw(t, "ttl"),
	})
}

// CreateAgain asks with what the session has, if there is one.
func (c *modelCheck) CreateAgain(t *rapid.T) {
	chat := chats.Draw(t, "chat")
	s := c.model.records[chat]
	if s == nil {
		t.Skip("no session")
	}
	c.create(t, scheduler.CreateCommand{ChatID: chat, AgentID: s.agent, VolumeHostPath: s.volume})
}

func (c *modelCheck) create(t *rapid.T, cmd scheduler.CreateCommand) {
	c.breakSome(t, cmd.ChatID)
	want := c.model.Create(cmd)
	res, err := c.world.Create(context.Background(), cmd)
	c.agree(t, want, string(res.Result), err)
	if err == nil {
		must.Eq(t, scheduler.StateRunning, res.Session.State)
		must.True(t, res.Session.ExpiresAt.After(c.clock.Now()))
	}
}

func (c *modelCheck) Delete(t *rapid.T) {
	chat := chats.Draw(t, "chat")
	c.breakSome(t, chat)
	want := c.model.Delete(chat)
	res, err := c.world.Delete(context.Background(), chat)
	got := "not_found"
	if res.Found {
		got = c.name("deleted " + res.SessionID.String() + " " + res.ContainerID)
	}
	c.agree(t, want, got, err)
}

func (c *modelCheck) Renew(t *rapid.T) {
	chat := chats.Draw(t, "chat")
	ttl := ttls.Filter(func(d time.Duration) bool { return d > 0 }).Draw(t, "ttl")
	c.breakSome(t, chat)
	want := c.model.Renew(chat, ttl)
	session, err := c.world.Renew(context.Background(), chat, ttl)
	c.agree(t, want, "renewed until "+session.ExpiresAt.Format(time.TimeOnly), err)
}

func (c *modelCheck) Cleanup(t *rapid.T) {
	c.breakSome(t, uuid.Nil)
	want := c.model.Cleanup()
	res, err := c.CleanupExpired(context.Background())
	c.agree(t, want, fmt.Sprintf("cleaned %d, errors %d", len(res.Cleaned), res.ErrorCount), err)
}

func (c *modelCheck) Settle(t *rapid.T) {
	c.breakSome(t, uuid.Nil)
	want := c.model.Settle()
	err := c.SettleInFlight(context.Background())
	c.agree(t, want, "settled", err)
}

func (c *modelCheck) Get(t *rapid.T) {
	chat := chats.Draw(t, "chat")
	c.breakSome(t, chat)
	want := c.model.Get(chat)
	session, _, err := c.world.Get(context.Background(), chat, scheduler.Block{})
	c.agree(t, want, c.describe(session), err)
}

func (c *modelCheck) List(t *rapid.T) {
	agent := rapid.SampledFrom([]string{"", "agent-1", "agent-2"}).Draw(t, "agent")
	c.breakSome(t, uuid.Nil)
	var want, got []string
	for chat, s := range c.model.records {
		if agent == "" || s.agent == agent {
			want = append(want, describeModel(chat, *s))
		}
	}
	slices.Sort(want)
	query := scheduler.Query{AgentID: agent, PerPage: rapid.IntRange(1, 3).Draw(t, "per page")}
	for more := true; more; more = query.NextToken != "" {
		page, err := c.world.List(context.Background(), query)
		must.NoError(t, err)
		for _, s := range page.Sessions {
			got = append(got, c.describe(s))
		}
		query.NextToken = page.NextToken
	}
	must.Eq(t, want, got)
}

func (c *modelCheck) Clock(t *rapid.T) {
	d := rapid.SampledFrom([]time.Duration{time.Second, 59 * time.Second, 29 * time.Minute, time.Hour}).Draw(t, "step")
	c.clock.advance(d)
	c.model.now = c.model.now.Add(d)
}

// Sandbox lets something happen to a sandbox behind the scheduler's back.
func (c *modelCheck) Sandbox(t *rapid.T) {
	names := slices.Sorted(maps.Keys(c.model.sandboxes))
	names = slices.DeleteFunc(names, func(name string) bool { return !c.model.sandboxes[name].runs })
	if len(names) == 0 {
		t.Skip("no sandbox runs")
	}
	name := rapid.SampledFrom(names).Draw(t, "session")
	s, id := c.model.sandboxes[name], c.sessionID(name)
	switch rapid.SampledFrom([]string{"kill", "lose", "regain", "forget", "swap"}).Draw(t, "fate") {
	case "kill":
		c.driver.Kill(id, "exit code 137")
		s.runs, s.state, s.reason = false, scheduler.StateDead, "exit code 137"
	case "lose":
		c.driver.Lose(id, "node down")
		s.state, s.reason = scheduler.StateLost, "node down"
	case "regain":
		c.driver.Regain(id)
		s.state, s.reason = scheduler.StateRunning, ""
	case "forget":
		c.driver.Forget(id)
		delete(c.model.sandboxes, name)
	case "swap":
		c.driver.Swap(id, "foreign-1")
		s.container = "foreign-1"
	}
}

func (c *modelCheck) sessionID(name string) string {
	c.effects.mu.Lock()
	defer c.effects.mu.Unlock()
	for id, s := range c.effects.sessions {
		if s.name == name {
			return id.String()
		}
	}
	return ""
}

// Invariants must hold between any two steps.
func (c *modelCheck) Invariants(t *rapid.T) {
	must.LessEq(t, 1, c.driver.MostPerChat(), must.Sprint("a chat had more than one sandbox"))
	for _, sandbox := range c.driver.Running() {
		session, _, err := c.store.Get(context.Background(), uuid.MustParse(sandbox.ChatID), scheduler.Block{})
		must.NoError(t, err)
		must.NotNil(t, session, must.Sprint("a sandbox runs without a record"))
		must.Eq(t, sandbox.SessionID, session.SessionID.String(), must.Sprint("a sandbox runs without a record"))
	}
}

// NothingIsLeft once all faults have ended and the background work was done.
func (c *modelCheck) NothingIsLeft(t *rapid.T) {
	c.effects.heal()
	must.NoError(t, c.SettleInFlight(context.Background()))
	c.clock.advance(maxTTL)
	res, err := c.CleanupExpired(context.Background())
	must.NoError(t, err)
	must.Zero(t, res.ErrorCount)
	must.SliceEmpty(t, c.records())
	must.SliceEmpty(t, c.driver.Running())
	for _, chat := range []uuid.UUID{chatA, chatB, chatC} {
		lease, err := c.locker.Lock(context.Background(), chat, 0)
		must.NoError(t, err, must.Sprint("a lock is still held"))
		must.NoError(t, lease.Release(context.Background()))
	}
}
