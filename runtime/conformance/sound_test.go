package conformance_test

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"

	"github.com/bivouac/bivouac/runtime"
)

// machine is where the sandboxes of sound drivers run. It outlasts them.
type machine struct {
	mu        sync.Mutex
	made      int
	sandboxes map[string]*listening
	ended     map[string]bool
}

// listening is a sandbox: a listener that accepts and hangs up.
type listening struct {
	runtime.Sandbox
	spec     runtime.Spec
	listener net.Listener
}

func newMachine() *machine {
	return &machine{sandboxes: map[string]*listening{}, ended: map[string]bool{}}
}

// sound is a driver that does all that is required. The wrong drivers are it
// with one method replaced.
type sound struct {
	m    *machine
	dead context.Context // ends as the driver's process does
}

func (sound) Info(context.Context) (runtime.Info, error) {
	return runtime.Info{Name: "sound", Version: "1"}, nil
}

func (d sound) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	if err := ctx.Err(); err != nil {
		return runtime.Sandbox{}, err
	}
	sandbox, err := d.m.start(spec)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	for _, stage := range []runtime.Stage{runtime.StagePlaced, runtime.StageStarted, runtime.StageReady} {
		progress(stage)
		if err := ctx.Err(); err != nil {
			return runtime.Sandbox{}, err
		}
		if d.dead.Err() != nil {
			return runtime.Sandbox{}, runtime.ErrUnavailable
		}
	}
	return sandbox, nil
}

func (m *machine) start(spec runtime.Spec) (runtime.Sandbox, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ended[spec.SessionID] {
		return runtime.Sandbox{}, runtime.ErrConflict
	}
	if standing, ok := m.sandboxes[spec.SessionID]; ok {
		if standing.spec != spec {
			return runtime.Sandbox{}, runtime.ErrConflict
		}
		return standing.Sandbox, nil
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return runtime.Sandbox{}, fmt.Errorf("%w: %w", runtime.ErrNotPlaced, err)
	}
	go func() {
		for conn, err := listener.Accept(); err == nil; conn, err = listener.Accept() {
			_ = conn.Close()
		}
	}()
	at := listener.Addr().(*net.TCPAddr).AddrPort()
	m.made++
	made := &listening{spec: spec, listener: listener, Sandbox: runtime.Sandbox{
		SessionID: spec.SessionID, ChatID: spec.ChatID, ContainerID: strconv.Itoa(m.made),
		Endpoint: runtime.Endpoint{IP: at.Addr().Unmap(), Port: at.Port()}, State: runtime.StateRunning,
	}}
	m.sandboxes[spec.SessionID] = made
	return made.Sandbox, nil
}

func (d sound) Stop(_ context.Context, sessionID string) error {
	d.m.end(sessionID, "stopped")
	return nil
}

func (d sound) Delete(_ context.Context, sessionID string) error {
	d.m.end(sessionID, "deleted")
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	delete(d.m.sandboxes, sessionID)
	return nil
}

func (m *machine) end(sessionID, reason string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ended[sessionID] = true
	if s, ok := m.sandboxes[sessionID]; ok {
		s.die(reason)
	}
}

func (s *listening) die(reason string) {
	_ = s.listener.Close()
	s.State, s.Reason = runtime.StateDead, reason
}

func (m *machine) kill(_ context.Context, sandbox runtime.Sandbox) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sandboxes[sandbox.SessionID].die("killed")
	return nil
}

func (d sound) Inspect(_ context.Context, sessionID string) (runtime.Sandbox, error) {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if s, ok := d.m.sandboxes[sessionID]; ok {
		return s.Sandbox, nil
	}
	return runtime.Sandbox{}, runtime.ErrNotFound
}

func (d sound) List(context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		d.m.mu.Lock()
		all := slices.Collect(maps.Values(d.m.sandboxes))
		d.m.mu.Unlock()
		for _, s := range all {
			if shown, err := d.Inspect(context.Background(), s.SessionID); err == nil && !yield(shown, nil) {
				return
			}
		}
	}
}
