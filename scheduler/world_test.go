package scheduler_test

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/store/memory"
	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// The chats of these tests. What tests compare calls them by name.
var (
	chatA = uuid.MustParse("00000000-0000-4000-8000-00000000000a")
	chatB = uuid.MustParse("00000000-0000-4000-8000-00000000000b")
	chatC = uuid.MustParse("00000000-0000-4000-8000-00000000000c")

	chatNames = map[uuid.UUID]string{chatA: "chat-a", chatB: "chat-b", chatC: "chat-c"}
)

const (
	defaultTTL = 30 * time.Minute
	maxTTL     = 2 * time.Hour
)

// noon is when the clock of each test starts.
var noon = time.Date(2030, time.March, 1, 12, 0, 0, 0, time.UTC)

// createA is the command that most tests give.
var createA = scheduler.CreateCommand{ChatID: chatA, AgentID: "agent-1", VolumeHostPath: "/data/a"}

func itoa(n int) string { return strconv.Itoa(n) }

// clock is a clock that stands still unless a test moves it.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// world is a scheduler with all that is around it. Records, locks and sandboxes
// are in memory; everything that the scheduler does to them is written down.
type world struct {
	*scheduler.Scheduler
	t       must.T
	store   *memory.Store
	locker  *memory.Locker
	driver  *fakeruntime.Driver
	clock   *clock
	effects *effects
	seen    *telemetry
}

func newWorld(t must.T, configure ...func(*scheduler.Config)) *world {
	store := memory.NewStore()
	w := &world{
		t:       t,
		store:   store,
		locker:  memory.NewLocker(store),
		driver:  fakeruntime.New("fake"),
		clock:   &clock{now: noon},
		effects: newEffects(),
		seen:    newTelemetry(),
	}
	w.driver.Intercept(w.effects.intercept)
	c := w.config()
	for _, f := range configure {
		f(&c)
	}
	var err error
	w.Scheduler, err = scheduler.New(c)
	must.NoError(t, err)
	return w
}

func (w *world) config() scheduler.Config {
	return scheduler.Config{
		Store:           recordingStore{w.store, w.effects},
		Locker:          recordingLocker{w.locker, w.effects},
		Drivers:         map[string]runtime.Driver{"fake": w.driver},
		DefaultRuntime:  "fake",
		TTL:             defaultTTL,
		MaxTTL:          maxTTL,
		CleanupInterval: 15 * time.Second,
		Logger:          w.seen.logger,
		Meter:           w.seen.meter,
		Tracer:          w.seen.tracer,
		Now:             w.clock.Now,
	}
}

// peer is one more scheduler over the same records and sandboxes, whose effects
// and telemetry nobody looks at. Its locks can be taken away.
type peer struct {
	*scheduler.Scheduler
	locker *memory.Locker
}

func (w *world) peer() peer {
	c := w.peerConfig()
	p := peer{locker: c.Locker.(*memory.Locker)}
	var err error
	p.Scheduler, err = scheduler.New(c)
	must.NoError(w.t, err)
	return p
}

// peerConfig is the configuration of a peer.
func (w *world) peerConfig() scheduler.Config {
	c := w.config()
	c.Store, c.Locker, c.Now = w.store, memory.NewLocker(w.store), w.Now
	seen := newTelemetry()
	c.Logger, c.Meter, c.Tracer = seen.logger, seen.meter, seen.tracer
	return c
}

// given lets things happen that a test does not ask about.
func (w *world) given(steps ...func(*world)) {
	for _, step := range steps {
		step(w)
	}
	w.effects.taken()
	w.seen.takeLogs()
	w.seen.takeSpans()
	_, err := w.seen.takeMetrics()
	must.NoError(w.t, err)
	w.effects.taken()
}

// standing is the chat's session by the record, which must be there.
func (w *world) standing(chat uuid.UUID) scheduler.Session {
	session, _, err := w.store.Get(context.Background(), chat, scheduler.Block{})
	must.NoError(w.t, err)
	must.NotNil(w.t, session)
	return *session
}

// outcome is all that can be seen of what a scheduler did.
type outcome struct {
	Result  string   // the use case's, or "error KIND"
	Effects []string // in their order
	Spans   []span   // in the order of their ends
	Metrics []string // what was counted, and the sessions that stand
	Logs    []string
	Records []string // "CHAT SESSION STATE CONTAINER EXPIRY[: REASON]"
	Running []string // "CHAT SESSION": sandboxes that really run
}

// outcome looks at what happened since it was last called.
func (w *world) outcome(result string, err error) outcome {
	if err != nil {
		result = "error " + scheduler.Kind(err)
	}
	got := outcome{
		Result:  result,
		Effects: w.effects.taken(),
		Spans:   w.seen.takeSpans(),
		Logs:    w.seen.takeLogs(),
		Records: w.records(),
		Running: w.running(),
	}
	for i := range got.Spans {
		for k, v := range got.Spans[i].Attrs {
			got.Spans[i].Attrs[k] = w.name(v)
		}
	}
	for i := range got.Logs {
		got.Logs[i] = w.name(got.Logs[i])
	}
	var scraped error
	got.Metrics, scraped = w.seen.takeMetrics()
	must.NoError(w.t, scraped)
	w.effects.taken() // the scrape's own
	return got
}

func (w *world) records() []string {
	page, err := w.store.List(context.Background(), scheduler.Query{PerPage: scheduler.MaxPerPage})
	must.NoError(w.t, err)
	var lines []string
	for _, s := range page.Sessions {
		lines = append(lines, w.describe(s))
	}
	return lines
}

func (w *world) describe(s scheduler.Session) string {
	line := fmt.Sprintf("%s %s %s %s %s", s.ChatID, s.SessionID, s.State, s.ContainerID, s.ExpiresAt.Format(time.TimeOnly))
	if s.Reason != "" {
		line += ": " + s.Reason
	}
	return w.name(line)
}

func (w *world) running() []string {
	var lines []string
	for _, s := range w.driver.Running() {
		lines = append(lines, w.name(s.ChatID+" "+s.SessionID))
	}
	slices.Sort(lines)
	return lines
}

// otherUUID matches the IDs of sessions that were never written.
var otherUUID = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)

// name replaces the UUIDs in text by what tests call their owners.
func (w *world) name(text string) string {
	for id, name := range chatNames {
		text = strings.ReplaceAll(text, id.String(), name)
	}
	w.effects.mu.Lock()
	defer w.effects.mu.Unlock()
	for id, s := range maps.All(w.effects.sessions) {
		text = strings.ReplaceAll(text, id.String(), s.name)
	}
	return otherUUID.ReplaceAllString(text, "unwritten")
}

// Steps for given.

func created(cmd scheduler.CreateCommand) func(*world) {
	return func(w *world) {
		_, err := w.Create(context.Background(), cmd)
		must.NoError(w.t, err)
	}
}

func later(d time.Duration) func(*world) {
	return func(w *world) { w.clock.advance(d) }
}

func killed(reason string) func(*world) {
	return func(w *world) { w.driver.Kill(w.standing(chatA).SessionID.String(), reason) }
}

func lost(reason string) func(*world) {
	return func(w *world) { w.driver.Lose(w.standing(chatA).SessionID.String(), reason) }
}

func forgotten(w *world) { w.driver.Forget(w.standing(chatA).SessionID.String()) }

func lagging(w *world) { w.driver.Lag(w.standing(chatA).SessionID.String()) }

func swapped(w *world) { w.driver.Swap(w.standing(chatA).SessionID.String(), "foreign-1") }

// abandonedStart leaves what a replica does that dies while it starts a sandbox.
func abandonedStart(w *world) {
	w.effects.fail("driver.delete", runtime.ErrUnavailable)
	w.effects.failAfter("driver.create", runtime.ErrNotReady)
	_, err := w.Create(context.Background(), createA)
	must.ErrorIs(w.t, err, runtime.ErrNotReady)
	w.effects.heal()
}

// abandonedStop leaves what a replica does that dies while it stops a sandbox.
func abandonedStop(w *world) {
	w.effects.fail("driver.delete", runtime.ErrUnavailable)
	_, err := w.Delete(context.Background(), chatA)
	must.ErrorIs(w.t, err, runtime.ErrUnavailable)
	w.effects.heal()
}

// fails lets an effect fail from now on, with nothing done.
func fails(name string, err error) func(*world) {
	return func(w *world) { w.effects.fail(name, err) }
}

// failsAfter lets an effect happen from now on and its answer be lost.
func failsAfter(name string, err error) func(*world) {
	return func(w *world) { w.effects.failAfter(name, err) }
}

// lockLost lets the chat's lock be lost just before an effect, and the one who
// is at work notice it.
func lockLost(name string) func(*world) {
	return func(w *world) {
		w.effects.hook(effect{Name: name}, hook{before: func(ctx context.Context) error {
			w.locker.End()
			<-ctx.Done()
			return nil
		}})
	}
}

// lockLostUnnoticed lets the chat's lock be lost just after an effect.
func lockLostUnnoticed(name string) func(*world) {
	return func(w *world) {
		w.effects.hook(effect{Name: name}, hook{after: func(context.Context) error {
			w.locker.End()
			return nil
		}})
	}
}

// someCreate is a create of a chat of its own.
func someCreate() scheduler.CreateCommand {
	return scheduler.CreateCommand{ChatID: uuid.New(), AgentID: "agent-1", VolumeHostPath: "/data/a"}
}

// storeFailsFrom has the store out of reach from an effect on.
func storeFailsFrom(name string) func(*world) {
	return func(w *world) {
		w.effects.hook(effect{Name: name}, hook{before: func(context.Context) error {
			w.effects.fail("get", scheduler.ErrUnavailable)
			return scheduler.ErrUnavailable
		}})
	}
}

// writesFailFrom has the store take no more writes from an effect on, while it
// can be read. What else befalls the effect comes first.
func writesFailFrom(name string) func(*world) {
	return func(w *world) {
		first := w.effects.hooks[effect{Name: name}].before
		w.effects.hook(effect{Name: name}, hook{before: func(ctx context.Context) error {
			if first != nil {
				must.NoError(w.t, first(ctx))
			}
			w.effects.fail("write creating", scheduler.ErrUnavailable)
			return scheduler.ErrUnavailable
		}})
	}
}
