package scheduler_test

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// auditor writes down what the scheduler attempts, unless it is full.
type auditor struct {
	mu       sync.Mutex
	full     bool
	attempts []string // "EVENT CHAT by CALLER"; with the kind of error if it failed
}

func (*auditor) Note(context.Context, scheduler.Event) {}

func (a *auditor) Attempt(_ context.Context, e scheduler.Event) (func(error), error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	attempt := string(e.Type) + " " + chatNames[e.ChatID] + " by " + e.Caller.Name
	if a.full {
		if refused := attempt + " refused"; !slices.Contains(a.attempts, refused) { // it is tried again
			a.attempts = append(a.attempts, refused)
		}
		return nil, scheduler.ErrAuditUnavailable
	}
	return func(err error) {
		a.mu.Lock()
		defer a.mu.Unlock()
		if err != nil {
			attempt += " " + scheduler.Kind(err)
		}
		a.attempts = append(a.attempts, attempt)
	}, nil
}

// taken returns what was attempted since the last call.
func (a *auditor) taken() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	attempts := a.attempts
	a.attempts = nil
	return attempts
}

func audited(a *auditor) func(*scheduler.Config) {
	return func(c *scheduler.Config) { c.Audit = a }
}

// TestAudit lets things happen that a replica deals with although nobody asked for it.
// While the audit log takes nothing, the replica must not touch them.
func TestAudit(t *testing.T) {
	planted := func(w *world) { w.driver.Plant(orphanOf(chatA)) }
	for name, tc := range map[string]struct {
		given   []func(*world)
		attempt string
		records []string
		running []string
	}{
		"expired session": {
			given:   []func(*world){created(createA), func(*world) { pass(defaultTTL) }},
			attempt: "expired chat-a",
		},
		"start of a replica that died": {
			given:   []func(*world){abandonedStart},
			attempt: "settled chat-a",
		},
		"stop of a replica that died": {
			given:   []func(*world){created(createA), abandonedStop},
			attempt: "settled chat-a",
		},
		"sandbox that lost its record": {
			given:   []func(*world){created(createA), unrecorded(chatA)},
			attempt: "adopted chat-a",
			records: []string{"chat-a s1 running"},
			running: []string{"chat-a s1"},
		},
		"second sandbox of a chat": {
			given:   []func(*world){created(createA), planted},
			attempt: "orphan_stopped chat-a",
			records: []string{"chat-a s1 running"},
			running: []string{"chat-a s1"},
		},
		"sandbox that ended": {
			given:   []func(*world){created(createA), killed("out of memory")},
			attempt: "dead chat-a",
			records: []string{"chat-a s1 dead out of memory"},
		},
		"sandbox that is lost": {
			given:   []func(*world){created(createA), lost("its node is down")},
			attempt: "lost chat-a",
			records: []string{"chat-a s1 lost its node is down"},
			running: []string{"chat-a s1"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := &auditor{full: true}
			inBubbleWith(t, audited(a), func(t *testing.T, w *world) {
				w.given(tc.given...)
				records, running := w.records(), w.running()

				stop := run(t, w.Scheduler)
				pass(5 * time.Minute)
				stop()
				must.Eq(t, []string{tc.attempt + " by bivouac refused"}, a.taken())
				must.Eq(t, records, w.records())
				must.Eq(t, running, w.running())

				a.full = false
				stop = run(t, w.Scheduler)
				pass(5 * time.Minute)
				stop()
				must.Eq(t, []string{tc.attempt + " by bivouac"}, a.taken())
				must.Eq(t, tc.records, w.reasons())
				must.Eq(t, tc.running, w.running())
			})
		})
	}
}

func TestAudit_of_a_callers_operation(t *testing.T) {
	ctx := scheduler.WithCaller(t.Context(), scheduler.Caller{Name: "ann"})

	t.Run("names the caller whose request it serves", func(t *testing.T) {
		a := &auditor{}
		w := newWorld(t, audited(a))
		w.given(created(createA), later(defaultTTL))
		_, err := w.CleanupExpired(ctx)
		must.NoError(t, err)
		must.Eq(t, []string{"expired chat-a by ann"}, a.taken())
	})

	t.Run("is not asked about what the caller asked for", func(t *testing.T) {
		a := &auditor{full: true}
		w := newWorld(t, audited(a))
		_, err := w.Create(ctx, createA)
		must.NoError(t, err)
		_, err = w.Renew(ctx, chatA, time.Hour)
		must.NoError(t, err)
		_, err = w.Delete(ctx, chatA)
		must.NoError(t, err)
		must.SliceEmpty(t, a.taken())
	})

	t.Run("keeps a create from ending another sandbox of the chat", func(t *testing.T) {
		a := &auditor{full: true}
		w := newWorld(t, audited(a))
		orphan := orphanOf(chatA)
		orphan.AgentID = "" // it cannot be adopted
		w.driver.Plant(orphan)
		_, err := w.Create(ctx, createA)
		must.ErrorIs(t, err, scheduler.ErrAuditUnavailable)
		must.Eq(t, "audit_unavailable", scheduler.Kind(err))
		must.Eq(t, []string{"orphan_stopped chat-a by ann refused"}, a.taken())
		must.Len(t, 1, w.running())
	})

	t.Run("tells how an attempt failed", func(t *testing.T) {
		a := &auditor{}
		w := newWorld(t, audited(a))
		w.given(created(createA), later(defaultTTL), fails("driver.stop", runtime.ErrNotStopped))
		res, err := w.CleanupExpired(ctx)
		must.NoError(t, err)
		must.Eq(t, 1, res.ErrorCount)
		must.Eq(t, []string{"expired chat-a by ann not_stopped"}, a.taken())
	})
}
