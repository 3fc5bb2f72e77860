package conformance_test

import (
	"context"
	"errors"
	"iter"
	"regexp"
	"strings"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/conformance"
)

// harness is that of a driver which wrap makes of a sound one.
func harness(wrap func(sound) runtime.Driver) conformance.Harness {
	m := newMachine()
	die := context.CancelFunc(func() {})
	open := func(context.Context) (runtime.Driver, error) {
		dead, cancel := context.WithCancel(context.Background())
		die = cancel
		return wrap(sound{m, dead}), nil
	}
	crash := func(ctx context.Context, _ runtime.Driver) (runtime.Driver, error) {
		die()
		return open(ctx)
	}
	return conformance.Harness{
		Open: open, Reopen: crash, Crash: crash, Kill: m.kill,
		Foreign: func(context.Context) (runtime.Driver, error) { return sound{newMachine(), context.Background()}, nil },
	}
}

// unready is the harness of a driver that takes every sandbox for ready.
func unready() conformance.Harness {
	h := harness(asItIs)
	h.Failing, h.Slow = h.Open, h.Open
	return h
}

func asItIs(d sound) runtime.Driver { return d }

func soundHarness() conformance.Harness { return harness(asItIs) }

func TestRun_passes_a_sound_driver(t *testing.T) { conformance.Run(t, soundHarness()) }

func TestVerify_reports_on_a_sound_driver(t *testing.T) {
	var report strings.Builder
	ok, err := conformance.Verify(t.Context(), soundHarness(), &report)
	must.NoError(t, err)
	must.True(t, ok, must.Sprint(report.String()))
	must.StrContains(t, report.String(), "creates a sandbox that answers\n")
	must.StrContains(t, report.String(), "the harness has no Slow")
	must.StrContains(t, report.String(), "the driver has no Watch")
	must.StrContains(t, report.String(), " passed, 0 failed, 3 skipped in ")
}

func TestVerify_ends_with_its_context(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	ok, err := conformance.Verify(ctx, soundHarness(), &strings.Builder{})
	must.ErrorIs(t, err, context.Canceled)
	must.False(t, ok)
}

// The wrong drivers: each a sound one with one fault.
type (
	nameless      struct{ sound }
	doubles       struct{ sound } // makes another sandbox for a repeat
	takesAnySpec  struct{ sound }
	stopsInName   struct{ sound } // says dead, and lets it run
	neverStopped  struct{ sound } // refuses to stop the unknown
	findsPrefixes struct{ sound }
	stopsPrefixes struct{ sound }
	swallows      struct{ sound } // a create that was given up looks as any failure
	reopens       struct{ sound } // lets a Create come after a Delete
	listsTheDead  struct{ sound } // only those
	shouts        struct{ sound } // tells a stage twice
	cuts          struct{ sound } // takes short names alone
)

func (nameless) Info(context.Context) (runtime.Info, error) {
	return runtime.Info{Name: "No Name"}, nil
}

func (d doubles) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	d.m.mu.Lock()
	if standing, ok := d.m.sandboxes[spec.SessionID]; ok && standing.spec == spec && !d.m.ended[spec.SessionID] {
		defer func() { _ = standing.listener.Close() }()
		delete(d.m.sandboxes, spec.SessionID)
	}
	d.m.mu.Unlock()
	return d.sound.Create(ctx, spec, progress)
}

func (d takesAnySpec) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	d.m.mu.Lock()
	if standing, ok := d.m.sandboxes[spec.SessionID]; ok {
		standing.spec = spec
	}
	d.m.mu.Unlock()
	return d.sound.Create(ctx, spec, progress)
}

func (d stopsInName) Stop(_ context.Context, sessionID string) error {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	d.m.ended[sessionID] = true
	if s, ok := d.m.sandboxes[sessionID]; ok {
		s.State, s.Reason = runtime.StateDead, "stopped"
	}
	return nil
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

// resolve finds a sandbox as an engine does that takes the beginning of an ID.
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

func (d swallows) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	sandbox, err := d.sound.Create(ctx, spec, progress)
	if errors.Is(err, context.Canceled) {
		err = runtime.ErrNotReady
	}
	return sandbox, err
}

func (d reopens) Delete(ctx context.Context, sessionID string) error {
	err := d.sound.Delete(ctx, sessionID)
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	delete(d.m.ended, sessionID)
	return err
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

func (d shouts) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	return d.sound.Create(ctx, spec, func(s runtime.Stage) { progress(s); progress(s) })
}

func (d cuts) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	if len(spec.AgentID) > 63 {
		return runtime.Sandbox{}, runtime.ErrInvalid
	}
	return d.sound.Create(ctx, spec, progress)
}

func TestVerify_catches_each_fault(t *testing.T) {
	for _, test := range []struct {
		fault  string
		wrap   func(sound) runtime.Driver
		caught []string // the requirements that must fail, and no others
	}{
		{"has no proper name", func(d sound) runtime.Driver { return nameless{d} }, []string{"says who it is"}},
		{"makes a second sandbox", func(d sound) runtime.Driver { return doubles{d} }, []string{"creates once however often it is asked", "outlives a restart"}},
		{"takes another spec", func(d sound) runtime.Driver { return takesAnySpec{d} }, []string{"refuses another spec for the same ID"}},
		{"stops in name alone", func(d sound) runtime.Driver { return stopsInName{d} }, []string{"stops for good", "lets a stop overtake a create", "outlives a restart"}},
		{"fails to stop the unknown", func(d sound) runtime.Driver { return neverStopped{d} }, []string{"stops what it has never seen", "leaves others alone", "outlives a restart"}},
		{"finds by the beginning of an ID", func(d sound) runtime.Driver { return findsPrefixes{d} }, []string{"does not find what is not there"}},
		{"stops by the beginning of an ID", func(d sound) runtime.Driver { return stopsPrefixes{d} }, []string{"leaves others alone"}},
		{"does not tell that a create was given up", func(d sound) runtime.Driver { return swallows{d} }, []string{"leaves nothing of a create that was given up"}},
		{"forgets what it deleted", func(d sound) runtime.Driver { return reopens{d} }, []string{"deletes without a trace", "stops what it has never seen", "leaves nothing of a create that was given up", "outlives a restart", "leaks nothing when it dies in a create"}},
		{"lists none that run", func(d sound) runtime.Driver { return listsTheDead{d} }, []string{"creates a sandbox that answers", "creates many at a time", "ends a list early", "outlives a restart", "leaks nothing when it dies in a create"}},
		{"tells stages twice", func(d sound) runtime.Driver { return shouts{d} }, []string{"creates a sandbox that answers"}},
		{"takes no long names", func(d sound) runtime.Driver { return cuts{d} }, []string{"takes the longest names"}},
	} {
		t.Run(test.fault, func(t *testing.T) {
			h := harness(test.wrap)
			var report strings.Builder
			ok, err := conformance.Verify(t.Context(), h, &report)
			must.NoError(t, err)
			must.False(t, ok)
			must.Eq(t, test.caught, failed(report.String()), must.Sprint(report.String()))
		})
	}
}

var failLine = regexp.MustCompile(`(?m)^FAIL +[0-9.]+ s  (.*)$`)

func TestVerify_catches_who_does_not_wait(t *testing.T) {
	var report strings.Builder
	ok, err := conformance.Verify(t.Context(), unready(), &report)
	must.NoError(t, err)
	must.False(t, ok)
	must.Eq(t, []string{"tells of a sandbox that fails", "gives up on a slow sandbox"}, failed(report.String()))
}

// failed returns the requirements that a report says FAIL of.
func failed(report string) []string {
	var names []string
	for _, line := range failLine.FindAllStringSubmatch(report, -1) {
		names = append(names, line[1])
	}
	return names
}
