// Package fakeruntime is an in-memory [runtime.Driver] for tests of code that
// calls drivers.
//
// Its ledger is the truth that such tests check against: which sandboxes run,
// whatever any record says. A test can make each call fail before or after its
// effect, block it, and let sandboxes die, get lost or be swapped for others.
//
// The package must never know who calls it: it imports only the runtime
// contract and the standard library.
package fakeruntime

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"sync"

	"github.com/bivouac/bivouac/runtime"
)

// Op is a method of the driver that a test can interfere with.
type Op string

// These are the methods, as they appear in a [Call].
const (
	OpCreate  Op = "create"
	OpStop    Op = "stop"
	OpDelete  Op = "delete"
	OpInspect Op = "inspect"
	OpList    Op = "list"
	OpFind    Op = "find"    // FindChat
	OpAnswers Op = "answers" // Answers
	OpLogs    Op = "logs"
	OpClaim   Op = "claim"
)

// Moment is the point in a call at which an [Interceptor] is called.
type Moment int

// These are the moments of a call. An error at Before means that nothing was
// done. An error at After means that it was done but the answer got lost.
const (
	Before Moment = iota
	After
)

// Call is one call of a method.
type Call struct {
	Op        Op
	SessionID string // empty for OpList and OpFind
	ChatID    string // only for OpFind
	Moment    Moment
}

// An Interceptor is called before and after the effect of each call. The call
// returns the interceptor's error. The interceptor may block; that delays this
// call but not the driver's other calls.
type Interceptor func(ctx context.Context, call Call) error

// Driver is the fake. Create it with [New]. It is safe for concurrent use.
type Driver struct {
	name string

	mu        sync.Mutex
	variant   string
	intercept Interceptor
	sandboxes map[string]*sandbox
	ended     map[string]bool // session IDs that Stop or Delete was called for
	created   int             // sandboxes ever started; also the source of their names
	most      map[string]int  // by chat: the most that ever ran at the same time
	watchers  map[chan runtime.Sandbox]struct{}
	news      chan struct{} // closed at the next change, for followers of logs
	exec      ExecFunc
	execs     map[string]map[*context.CancelFunc]struct{} // running commands by session ID
}

type sandbox struct {
	runtime.Sandbox
	spec  runtime.Spec
	claim *runtime.Spec // of a claimed spare
	runs  bool          // the truth, which may differ from State while it is lost
	hid   bool          // the driver no longer knows it

	printed map[runtime.LogStream][]byte
}

var (
	_ runtime.Driver     = (*Driver)(nil)
	_ runtime.Watcher    = (*Driver)(nil)
	_ runtime.ChatFinder = (*Driver)(nil)
	_ runtime.Prober     = (*Driver)(nil)
	_ runtime.LogReader  = (*Driver)(nil)
	_ runtime.Execer     = (*Driver)(nil)
	_ runtime.Claimer    = (*Driver)(nil)
)

// New returns a driver with no sandboxes.
func New(name string) *Driver {
	return &Driver{
		name:      name,
		variant:   "1",
		sandboxes: make(map[string]*sandbox),
		ended:     make(map[string]bool),
		most:      make(map[string]int),
		watchers:  make(map[chan runtime.Sandbox]struct{}),
		news:      make(chan struct{}),
		execs:     make(map[string]map[*context.CancelFunc]struct{}),
	}
}

// Intercept sets the interceptor of all later calls; nil removes it.
func (d *Driver) Intercept(f Interceptor) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.intercept = f
}

func (d *Driver) ask(ctx context.Context, op Op, sessionID string, moment Moment) error {
	return d.tell(ctx, Call{Op: op, SessionID: sessionID, Moment: moment})
}

func (d *Driver) tell(ctx context.Context, call Call) error {
	d.mu.Lock()
	f := d.intercept
	d.mu.Unlock()
	if f == nil {
		return nil
	}
	return f(ctx, call)
}

// Info implements [runtime.Driver].
func (d *Driver) Info(context.Context) (runtime.Info, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return runtime.Info{Name: d.name, Version: "0", Variant: d.variant}, nil
}

// Create implements [runtime.Driver]. It goes through all stages. If it is made
// to fail after its effect, the sandbox still runs.
func (d *Driver) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	if err := d.ask(ctx, OpCreate, spec.SessionID, Before); err != nil {
		return runtime.Sandbox{}, err
	}
	if err := ctx.Err(); err != nil {
		return runtime.Sandbox{}, err
	}
	made, err := d.start(spec)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	for _, stage := range []runtime.Stage{runtime.StagePlaced, runtime.StageStarted} {
		progress(stage)
	}
	if err := d.ask(ctx, OpCreate, spec.SessionID, After); err != nil {
		return runtime.Sandbox{}, err
	}
	progress(runtime.StageReady)
	return made, nil
}

func (d *Driver) start(spec runtime.Spec) (runtime.Sandbox, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ended[spec.SessionID] {
		return runtime.Sandbox{}, fmt.Errorf("%w: %s was stopped", runtime.ErrConflict, spec.SessionID)
	}
	if s, ok := d.sandboxes[spec.SessionID]; ok {
		if !reflect.DeepEqual(s.spec, spec) {
			return runtime.Sandbox{}, fmt.Errorf("%w: %s was created with another spec", runtime.ErrConflict, spec.SessionID)
		}
		return s.Sandbox, nil
	}
	d.created++
	s := &sandbox{
		Sandbox: runtime.Sandbox{
			SessionID:   spec.SessionID,
			ContainerID: "container-" + strconv.Itoa(d.created),
			Endpoint: runtime.Endpoint{
				IP:   netip.AddrFrom4([4]byte{127, 0, 0, 1}),
				Port: uint16(20000 + d.created%40000),
			},
			State:        runtime.StateRunning,
			RegisteredAt: spec.CreatedAt,
			Pool:         spec.Pool,
		},
		spec: spec,
		runs: true,
	}
	s.serve(spec)
	d.sandboxes[spec.SessionID] = s
	d.count(spec.ChatID)
	return s.Sandbox, nil
}

// serve makes s describe itself as the sandbox of spec.
func (s *sandbox) serve(spec runtime.Spec) {
	s.ChatID, s.AgentID, s.VolumeHostPath = spec.ChatID, spec.AgentID, spec.VolumeHostPath
	s.CreatedAt, s.ExpiresAt = spec.CreatedAt, spec.ExpiresAt
	s.Owner, s.Labels = spec.Owner, spec.Labels
}

// count counts the sandboxes of a chat that got one more; a spare has no chat. The caller
// holds the mutex.
func (d *Driver) count(chatID string) {
	if chatID != "" {
		d.most[chatID] = max(d.most[chatID], len(d.runningOf(chatID)))
	}
}

// Stop implements [runtime.Driver].
func (d *Driver) Stop(ctx context.Context, sessionID string) error {
	return d.end(ctx, OpStop, sessionID, func() {
		if s, ok := d.sandboxes[sessionID]; ok && s.runs && !s.hid {
			s.runs = false
			s.State, s.Reason = runtime.StateDead, "stopped"
			d.report(s.Sandbox)
		}
	})
}

// Delete implements [runtime.Driver].
func (d *Driver) Delete(ctx context.Context, sessionID string) error {
	return d.end(ctx, OpDelete, sessionID, func() {
		if s, ok := d.sandboxes[sessionID]; ok && !s.hid {
			s.State, s.Reason = runtime.StateDead, "deleted"
			delete(d.sandboxes, sessionID)
			d.report(s.Sandbox)
		}
	})
}

func (d *Driver) end(ctx context.Context, op Op, sessionID string, effect func()) error {
	if err := d.ask(ctx, op, sessionID, Before); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	d.mu.Lock()
	d.ended[sessionID] = true
	effect()
	d.mu.Unlock()
	return d.ask(ctx, op, sessionID, After)
}

// Inspect implements [runtime.Driver].
func (d *Driver) Inspect(ctx context.Context, sessionID string) (runtime.Sandbox, error) {
	if err := d.ask(ctx, OpInspect, sessionID, Before); err != nil {
		return runtime.Sandbox{}, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	s, ok := d.sandboxes[sessionID]
	if !ok || s.hid {
		return runtime.Sandbox{}, fmt.Errorf("%w: %s", runtime.ErrNotFound, sessionID)
	}
	return s.Sandbox, nil
}

// FindChat implements [runtime.ChatFinder].
func (d *Driver) FindChat(ctx context.Context, chatID, except string) ([]runtime.Sandbox, error) {
	call := Call{Op: OpFind, ChatID: chatID}
	if err := d.tell(ctx, call); err != nil {
		return nil, err
	}
	var found []runtime.Sandbox
	for _, s := range d.all() {
		if s.ChatID == chatID && s.SessionID != except && s.State != runtime.StateDead {
			found = append(found, s)
		}
	}
	call.Moment = After
	return found, d.tell(ctx, call)
}

// Answers implements [runtime.Prober]. A sandbox that runs answers at its
// endpoint.
func (d *Driver) Answers(ctx context.Context, sessionID string, endpoint runtime.Endpoint) (bool, error) {
	if err := d.ask(ctx, OpAnswers, sessionID, Before); err != nil {
		return false, err
	}
	d.mu.Lock()
	s, ok := d.sandboxes[sessionID]
	answers := ok && s.runs && s.Endpoint == endpoint
	d.mu.Unlock()
	return answers, d.ask(ctx, OpAnswers, sessionID, After)
}

// List implements [runtime.Driver]. It sorts by session ID.
func (d *Driver) List(ctx context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		if err := d.ask(ctx, OpList, "", Before); err != nil {
			yield(runtime.Sandbox{}, err)
			return
		}
		for _, s := range d.all() {
			if !yield(s, nil) {
				return
			}
		}
		if err := d.ask(ctx, OpList, "", After); err != nil {
			yield(runtime.Sandbox{}, err)
		}
	}
}

func (d *Driver) all() []runtime.Sandbox {
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []runtime.Sandbox
	for _, id := range slices.Sorted(maps.Keys(d.sandboxes)) {
		if s := d.sandboxes[id]; !s.hid {
			all = append(all, s.Sandbox)
		}
	}
	return all
}

// watchBuffer is how many changes a watcher may fall behind. The driver then
// drops further changes, as its contract allows.
const watchBuffer = 1024

// Watch implements [runtime.Watcher].
func (d *Driver) Watch(ctx context.Context, changed func(runtime.Sandbox)) error {
	changes := make(chan runtime.Sandbox, watchBuffer)
	d.mu.Lock()
	d.watchers[changes] = struct{}{}
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.watchers, changes)
	}()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case s := <-changes:
			changed(s)
		}
	}
}

// report sends a change to the watchers. The caller holds the mutex.
func (d *Driver) report(s runtime.Sandbox) {
	d.wake()
	if s.State == runtime.StateDead {
		for cancel := range d.execs[s.SessionID] {
			(*cancel)()
		}
	}
	for changes := range d.watchers {
		select {
		case changes <- s:
		default:
		}
	}
}
