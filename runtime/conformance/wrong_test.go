package conformance_test

import (
	"context"
	"errors"
	"iter"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/bivouac/bivouac/runtime"
)

// Each wrong driver is a sound one with one fault.
type (
	nameless      struct{ sound }
	shouts        struct{ sound }
	secretive     struct{ sound }
	doubles       struct{ sound }
	takesAnySpec  struct{ sound }
	namesakes     struct{ sound }
	trims         struct{ sound }
	cuts          struct{ sound }
	stopsInName   struct{ sound }
	restarts      struct{ sound }
	neverStopped  struct{ sound }
	reopens       struct{ sound }
	findsPrefixes struct{ sound }
	stopsPrefixes struct{ sound }
	swallows      struct{ sound }
	listsTheDead  struct{ sound }
	insists       struct{ sound }
	mute          struct{ sound }
	blamesOthers  struct{ sound }
	hasty         struct{ sound }
	listsAll      struct{ sound }
	endsAny       struct{ sound }
	showsAny      struct{ sound }
	takesOver     struct{ sound }
	asleep        struct{ sound }
	stubborn      struct{ sound }
	deaf          struct {
		sound
		creating *sync.Map // locks by session ID
	}
	looksTwice struct {
		sound
		looked *sync.Map // session IDs
	}
	forgets struct {
		sound
		known *sync.Map // session IDs
	}
	optimist struct {
		sound
		running *sync.Map // sandboxes by session ID
	}
	writesLate struct {
		sound
		pending *pending
	}
)

func (nameless) Info(context.Context) (runtime.Info, error) {
	return runtime.Info{Name: "No Name"}, nil
}

func (d shouts) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	return d.sound.Create(ctx, spec, func(s runtime.Stage) { progress(s); progress(s) })
}

func (d secretive) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	spec.AccessToken = ""
	return d.sound.Create(ctx, spec, progress)
}

// Create replaces the running sandbox when it is repeated.
func (d doubles) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	d.m.mu.Lock()
	standing, ok := d.m.sandboxes[spec.SessionID]
	again := ok && standing.State == runtime.StateRunning && reflect.DeepEqual(standing.spec, spec) && !d.m.ended[spec.SessionID]
	if again {
		delete(d.m.sandboxes, spec.SessionID)
	}
	d.m.mu.Unlock()
	if again {
		standing.end()
		<-standing.gone
	}
	return d.sound.Create(ctx, spec, progress)
}

func (d takesAnySpec) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	d.m.mu.Lock()
	if standing, ok := d.m.sandboxes[spec.SessionID]; ok {
		standing.spec = spec
		standing.ChatID = spec.ChatID
	}
	d.m.mu.Unlock()
	made, err := d.sound.Create(ctx, spec, progress)
	return made, err
}

func (d namesakes) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	made, err := d.sound.Create(ctx, spec, progress)
	made.ContainerID = "sandbox"
	return made, err
}

func (d namesakes) Inspect(ctx context.Context, sessionID string) (runtime.Sandbox, error) {
	found, err := d.sound.Inspect(ctx, sessionID)
	found.ContainerID = "sandbox"
	return found, err
}

func (d namesakes) List(ctx context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		for s, err := range d.sound.List(ctx) {
			s.ContainerID = "sandbox"
			if !yield(s, err) {
				return
			}
		}
	}
}

func (d looksTwice) Inspect(ctx context.Context, sessionID string) (runtime.Sandbox, error) {
	found, err := d.sound.Inspect(ctx, sessionID)
	if _, looked := d.looked.LoadOrStore(sessionID, true); !looked && err == nil {
		found.State, found.Reason = runtime.StateLost, "not looked at yet"
	}
	return found, err
}

func (d trims) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	spec.AgentID = strings.TrimSpace(spec.AgentID)
	return d.sound.Create(ctx, spec, progress)
}

func (d cuts) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	if len(spec.AgentID) > 63 {
		return runtime.Sandbox{}, runtime.ErrInvalid
	}
	return d.sound.Create(ctx, spec, progress)
}

// Stop reports the sandbox as dead but lets it run.
func (d stopsInName) Stop(_ context.Context, sessionID string) error {
	if err := d.notForeign(sessionID); err != nil {
		return err
	}
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	d.m.ended[sessionID] = true
	if s, ok := d.m.sandboxes[sessionID]; ok {
		s.State, s.Reason = runtime.StateDead, "stopped"
	}
	return nil
}

func (d restarts) Stop(ctx context.Context, sessionID string) error {
	err := d.sound.Stop(ctx, sessionID)
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	delete(d.m.ended, sessionID)
	return err
}

func (d neverStopped) Stop(ctx context.Context, sessionID string) error {
	d.m.mu.Lock()
	_, known := d.m.sandboxes[sessionID]
	known = known || d.m.ended[sessionID]
	d.m.mu.Unlock()
	if !known {
		return runtime.ErrNotFound
	}
	return d.sound.Stop(ctx, sessionID)
}

func (d reopens) Delete(ctx context.Context, sessionID string) error {
	err := d.sound.Delete(ctx, sessionID)
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	delete(d.m.ended, sessionID)
	return err
}

// resolve finds a sandbox like an engine that accepts the beginning of an ID.
func (m *machine) resolve(id string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	for known := range m.sandboxes {
		if known[:len(known)-1] == id[:len(id)-1] {
			return known
		}
	}
	return id
}

func (d findsPrefixes) Inspect(ctx context.Context, id string) (runtime.Sandbox, error) {
	return d.sound.Inspect(ctx, d.m.resolve(id))
}

func (d stopsPrefixes) Stop(ctx context.Context, id string) error {
	return d.sound.Stop(ctx, d.m.resolve(id))
}

// Create returns ErrNotReady if it was given up.
func (d swallows) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	sandbox, err := d.sound.Create(ctx, spec, progress)
	if errors.Is(err, context.Canceled) {
		err = runtime.ErrNotReady
	}
	return sandbox, err
}

func (d listsTheDead) List(ctx context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		for s, err := range d.sound.List(ctx) {
			if s.State == runtime.StateDead && !yield(s, err) {
				return
			}
		}
	}
}

func (d insists) List(ctx context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		for s, err := range d.sound.List(ctx) {
			yield(s, err)
		}
	}
}

func (d mute) Inspect(ctx context.Context, sessionID string) (runtime.Sandbox, error) {
	found, err := d.sound.Inspect(ctx, sessionID)
	found.Reason = ""
	return found, err
}

func (d forgets) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	d.known.Store(spec.SessionID, true)
	return d.sound.Create(ctx, spec, progress)
}

func (d forgets) Inspect(ctx context.Context, sessionID string) (runtime.Sandbox, error) {
	if _, known := d.known.Load(sessionID); !known {
		return runtime.Sandbox{}, runtime.ErrNotFound
	}
	return d.sound.Inspect(ctx, sessionID)
}

// pending holds what a driver has created but not yet recorded. It is lost when
// the driver dies.
type pending struct {
	mu   sync.Mutex
	made map[string]*running
}

// writeDown makes the pending sandboxes known to other processes of the driver.
func (d writesLate) writeDown() sound {
	d.pending.mu.Lock()
	defer d.pending.mu.Unlock()
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	for id, made := range d.pending.made {
		if d.dead.Err() == nil {
			d.m.sandboxes[id] = made
		}
	}
	d.pending.made = nil
	return d.sound
}

func (d writesLate) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	sandbox, err := d.writeDown().Create(ctx, spec, progress)
	d.pending.mu.Lock()
	defer d.pending.mu.Unlock()
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if made, ok := d.m.sandboxes[spec.SessionID]; ok {
		delete(d.m.sandboxes, spec.SessionID)
		if d.pending.made == nil {
			d.pending.made = map[string]*running{}
		}
		d.pending.made[spec.SessionID] = made
	}
	return sandbox, err
}

func (d writesLate) Stop(ctx context.Context, sessionID string) error {
	return d.writeDown().Stop(ctx, sessionID)
}

func (d writesLate) Delete(ctx context.Context, sessionID string) error {
	return d.writeDown().Delete(ctx, sessionID)
}

func (d writesLate) Inspect(ctx context.Context, sessionID string) (runtime.Sandbox, error) {
	return d.writeDown().Inspect(ctx, sessionID)
}

func (d writesLate) List(ctx context.Context) iter.Seq2[runtime.Sandbox, error] {
	return d.writeDown().List(ctx)
}

func (d blamesOthers) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	sandbox, err := d.sound.Create(ctx, spec, progress)
	if errors.Is(err, runtime.ErrNotReady) {
		err = runtime.ErrUnavailable
	}
	return sandbox, err
}

// Create treats a sandbox that has not become ready as ready.
func (d hasty) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	sandbox, err := d.sound.Create(ctx, spec, progress)
	if errors.Is(err, runtime.ErrNotReady) || errors.Is(err, context.DeadlineExceeded) {
		return d.Inspect(ctx, spec.SessionID)
	}
	return sandbox, err
}

func (d listsAll) List(context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		for _, shown := range d.m.all(func(*running) bool { return true }) {
			if !yield(shown, nil) {
				return
			}
		}
	}
}

// as returns the driver of the instance that the sandbox belongs to.
func (d sound) as(sessionID string) sound {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if s, ok := d.m.sandboxes[sessionID]; ok {
		d.instance = s.instance
	}
	return d
}

func (d endsAny) Stop(ctx context.Context, sessionID string) error {
	return d.as(sessionID).Stop(ctx, sessionID)
}

func (d endsAny) Delete(ctx context.Context, sessionID string) error {
	return d.as(sessionID).Delete(ctx, sessionID)
}

func (d showsAny) Inspect(ctx context.Context, sessionID string) (runtime.Sandbox, error) {
	return d.as(sessionID).Inspect(ctx, sessionID)
}

// Create looks only at the session ID to find out whether there is a sandbox.
func (d takesOver) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	as := d.as(spec.SessionID)
	if as.instance != d.instance {
		return as.Inspect(ctx, spec.SessionID)
	}
	return d.sound.Create(ctx, spec, progress)
}

// lock returns the lock that is held during a Create.
func (d deaf) lock(sessionID string) *sync.Mutex {
	lock, _ := d.creating.LoadOrStore(sessionID, new(sync.Mutex))
	return lock.(*sync.Mutex)
}

// Create returns when its context ends, as over RPC, but continues in the
// background for as long as a sandbox may take to become ready.
func (d deaf) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	type answer struct {
		sandbox runtime.Sandbox
		err     error
	}
	answered := make(chan answer, 1)
	lock := d.lock(spec.SessionID)
	lock.Lock()
	go func() {
		defer lock.Unlock()
		unheard, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		sandbox, err := d.sound.Create(unheard, spec, progress)
		answered <- answer{sandbox, err}
	}()
	select {
	case a := <-answered:
		return a.sandbox, a.err
	case <-ctx.Done():
		return runtime.Sandbox{}, ctx.Err()
	}
}

func (d deaf) Delete(ctx context.Context, sessionID string) error {
	lock := d.lock(sessionID)
	lock.Lock()
	defer lock.Unlock()
	return d.sound.Delete(ctx, sessionID)
}

// Inspect reports a sandbox that ran once as running, unless it was stopped.
func (d optimist) Inspect(ctx context.Context, sessionID string) (runtime.Sandbox, error) {
	found, err := d.sound.Inspect(ctx, sessionID)
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if found.State == runtime.StateRunning {
		d.running.Store(sessionID, found)
	} else if ran, ok := d.running.Load(sessionID); ok && !d.m.ended[sessionID] {
		return ran.(runtime.Sandbox), nil
	}
	return found, err
}

func (d optimist) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	made, err := d.sound.Create(ctx, spec, progress)
	if err == nil {
		d.running.Store(spec.SessionID, made)
	}
	return made, err
}

func (asleep) Watch(ctx context.Context, _ func(runtime.Sandbox)) error {
	<-ctx.Done()
	return ctx.Err()
}

// Create returns three seconds after its deadline has passed.
func (d stubborn) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	sandbox, err := d.sound.Create(ctx, spec, progress)
	if errors.Is(err, context.DeadlineExceeded) {
		<-time.After(3 * time.Second)
	}
	return sandbox, err
}
