package scheduler_test

import (
	"context"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/scheduler"
)

// effects stands between a scheduler and all that it acts on. It writes down
// what is tried, in its order, and lets tests interfere with each of it.
//
// Effects are named "get", "list", "scan", "list expired", "list in flight", "count",
// "lock", "write STATE", "write STATE + release", "remove + release",
// "release", and "driver.METHOD".
type effects struct {
	mu       sync.Mutex
	order    []string
	hooks    map[effect]hook
	sessions map[uuid.UUID]written // by session ID
}

// effect names an effect on a chat; an empty Chat stands for all of them.
type effect struct {
	Chat uuid.UUID
	Name string
}

// hook is called around an effect. An error of before keeps the effect from
// happening; one of after hides that it happened. Either may be nil.
type hook struct {
	before, after func(context.Context) error
}

// written is what tests call a session: the first that is written is "s1".
type written struct {
	chat uuid.UUID
	name string
}

func newEffects() *effects {
	return &effects{hooks: make(map[effect]hook), sessions: make(map[uuid.UUID]written)}
}

// fail lets an effect fail, on all chats, with nothing done.
func (e *effects) fail(name string, err error) {
	e.hook(effect{Name: name}, hook{before: func(context.Context) error { return err }})
}

// failAfter lets an effect happen and its answer be lost.
func (e *effects) failAfter(name string, err error) {
	e.hook(effect{Name: name}, hook{after: func(context.Context) error { return err }})
}

// before has f run before an effect.
func (e *effects) before(name string, f func()) {
	e.hook(effect{Name: name}, hook{before: func(context.Context) error { f(); return nil }})
}

func (e *effects) hook(at effect, h hook) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.hooks[at] = h
}

// heal lets everything succeed again, and forgets what was done so far.
func (e *effects) heal() {
	e.mu.Lock()
	defer e.mu.Unlock()
	clear(e.hooks)
	e.order = nil
}

// taken returns what was done since the last call.
func (e *effects) taken() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	order := e.order
	e.order = nil
	return order
}

func (e *effects) begin(chat uuid.UUID, name string) hook {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.order = append(e.order, name)
	if h, ok := e.hooks[effect{chat, name}]; ok {
		return h
	}
	return e.hooks[effect{Name: name}]
}

// around carries one effect out.
func (e *effects) around(ctx context.Context, chat uuid.UUID, name string, f func() error) error {
	h := e.begin(chat, name)
	if h.before != nil {
		if err := h.before(ctx); err != nil {
			return err
		}
	}
	if err := f(); err != nil {
		return err
	}
	if h.after != nil {
		return h.after(ctx)
	}
	return nil
}

// knows gives a session its name.
func (e *effects) knows(s scheduler.Session) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, ok := e.sessions[s.SessionID]; !ok {
		e.sessions[s.SessionID] = written{s.ChatID, "s" + itoa(len(e.sessions)+1)}
	}
}

// intercept is the effects' side of the fake driver.
func (e *effects) intercept(ctx context.Context, call fakeruntime.Call) error {
	e.mu.Lock()
	id, _ := uuid.Parse(call.SessionID) // nil for a list
	chat := e.sessions[id].chat
	if call.ChatID != "" {
		chat, _ = uuid.Parse(call.ChatID)
	}
	e.mu.Unlock()
	name := "driver." + string(call.Op)
	if call.Moment == fakeruntime.Before {
		if h := e.begin(chat, name); h.before != nil {
			return h.before(ctx)
		}
		return nil
	}
	e.mu.Lock()
	h, ok := e.hooks[effect{chat, name}]
	if !ok {
		h = e.hooks[effect{Name: name}]
	}
	e.mu.Unlock()
	if h.after != nil {
		return h.after(ctx)
	}
	return nil
}

type recordingStore struct {
	scheduler.Store
	e *effects
}

func (s recordingStore) Get(ctx context.Context, chat uuid.UUID, block scheduler.Block) (found *scheduler.Session, index uint64, err error) {
	err = s.e.around(ctx, chat, "get", func() (err error) {
		found, index, err = s.Store.Get(ctx, chat, block)
		return err
	})
	return found, index, err
}

func (s recordingStore) List(ctx context.Context, q scheduler.Query) (page scheduler.Page, err error) {
	err = s.e.around(ctx, uuid.Nil, "list", func() (err error) {
		page, err = s.Store.List(ctx, q)
		return err
	})
	return page, err
}

func (s recordingStore) Scan(ctx context.Context, shard int) (part scheduler.Part, next int, err error) {
	err = s.e.around(ctx, uuid.Nil, "scan", func() (err error) {
		part, next, err = s.Store.Scan(ctx, shard)
		return err
	})
	return part, next, err
}

func (s recordingStore) Expired(ctx context.Context, now time.Time, limit int) (found []scheduler.Session, err error) {
	err = s.e.around(ctx, uuid.Nil, "list expired", func() (err error) {
		found, err = s.Store.Expired(ctx, now, limit)
		return err
	})
	return found, err
}

func (s recordingStore) InFlight(ctx context.Context) (found []scheduler.Session, err error) {
	err = s.e.around(ctx, uuid.Nil, "list in flight", func() (err error) {
		found, err = s.Store.InFlight(ctx)
		return err
	})
	return found, err
}

func (s recordingStore) CountAgents(ctx context.Context, prefix string) (n int, err error) {
	err = s.e.around(ctx, uuid.Nil, "count agents", func() (err error) {
		n, err = s.Store.CountAgents(ctx, prefix)
		return err
	})
	return n, err
}

func (s recordingStore) Count(ctx context.Context) (n int, err error) {
	err = s.e.around(ctx, uuid.Nil, "count", func() (err error) {
		n, err = s.Store.Count(ctx)
		return err
	})
	return n, err
}

type recordingLocker struct {
	scheduler.Locker
	e *effects
}

func (l recordingLocker) Lock(ctx context.Context, chat uuid.UUID, wait time.Duration) (lease scheduler.Lease, err error) {
	err = l.e.around(ctx, chat, "lock", func() (err error) {
		lease, err = l.Locker.Lock(ctx, chat, wait)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &recordingLease{Lease: lease, e: l.e, chat: chat}, nil
}

type recordingLease struct {
	scheduler.Lease
	e        *effects
	chat     uuid.UUID
	released bool
}

func (l *recordingLease) Write(ctx context.Context, next *scheduler.Session, then scheduler.Then, changes ...scheduler.Change) error {
	name := "remove"
	if next != nil {
		name = "write " + string(next.State)
		l.e.knows(*next)
	}
	if then == scheduler.Release {
		name += " + release"
	}
	return l.e.around(ctx, l.chat, name, func() error {
		err := l.Lease.Write(ctx, next, then, changes...)
		l.released = l.released || err == nil && then == scheduler.Release
		return err
	})
}

func (l *recordingLease) Claim(ctx context.Context, next *scheduler.Session, spare scheduler.Spare, changes ...scheduler.Change) error {
	l.e.knows(*next)
	return l.e.around(ctx, l.chat, "claim", func() error { return l.Lease.Claim(ctx, next, spare, changes...) })
}

// Release does nothing after the first time, and so is no effect then.
func (l *recordingLease) Release(ctx context.Context) error {
	if l.released {
		return l.Lease.Release(ctx)
	}
	l.released = true
	return l.e.around(ctx, l.chat, "release", func() error { return l.Lease.Release(ctx) })
}
