package conformance_test

import (
	"context"
	"fmt"
	"iter"
	"net"
	"net/http"
	"os"
	"reflect"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/bivouac/bivouac/internal/broadcast"
	"github.com/bivouac/bivouac/internal/demosandbox"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/ready"
)

// machine is where the sandboxes of sound drivers run. It outlives the drivers.
type machine struct {
	mu        sync.Mutex
	made      int
	sandboxes map[string]*running
	ended     map[string]bool
	watchers  map[chan runtime.Sandbox]bool
	printed   broadcast.Cond // a sandbox has printed something, or has ended
}

func newMachine() *machine {
	m := &machine{sandboxes: map[string]*running{}, ended: map[string]bool{}, watchers: map[chan runtime.Sandbox]bool{}}
	m.printed.L = &m.mu
	return m
}

// running is a demo sandbox in a goroutine.
type running struct {
	runtime.Sandbox
	spec     runtime.Spec
	instance string
	end      context.CancelFunc
	up       chan struct{} // closed when it has its endpoint
	gone     chan struct{} // closed when nothing of it runs
	output   map[runtime.LogStream][]byte
	groups   []int // the process groups of commands
	closed   bool  // no command may be started any more
	told     []runtime.Happening

	claim *runtime.Spec // of a spare that a chat has
	dir   string        // of a spare: its session file, and the link to its workspace
}

// sound is a driver that meets all requirements. Each wrong driver is a sound
// one with one method replaced.
type sound struct {
	m        *machine
	instance string
	dead     context.Context // done when the driver's process ends
}

func (sound) Info(context.Context) (runtime.Info, error) {
	return runtime.Info{Name: "sound", Version: "1", Variant: "demo"}, nil
}

func (d sound) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	if err := ctx.Err(); err != nil {
		return runtime.Sandbox{}, err
	}
	standing, err := d.start(spec)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	reach := func(stage runtime.Stage) error {
		progress(stage)
		if d.dead.Err() != nil {
			return runtime.ErrUnavailable
		}
		return ctx.Err()
	}
	for _, stage := range []runtime.Stage{runtime.StagePlaced, runtime.StageStarted} {
		if err := reach(stage); err != nil {
			return runtime.Sandbox{}, err
		}
	}
	if err := d.awaitReady(ctx, standing); err != nil {
		return runtime.Sandbox{}, err
	}
	d.m.mu.Lock()
	if standing.State == runtime.StateStarting {
		standing.State = runtime.StateRunning
	}
	made := standing.Sandbox
	d.m.mu.Unlock()
	return made, reach(runtime.StageReady)
}

// start starts a sandbox or returns the one that runs.
func (d sound) start(spec runtime.Spec) (*running, error) {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if d.m.ended[spec.SessionID] {
		return nil, runtime.ErrConflict
	}
	if standing, ok := d.m.sandboxes[spec.SessionID]; ok {
		if standing.instance != d.instance || !reflect.DeepEqual(standing.spec, spec) {
			return nil, runtime.ErrConflict
		}
		return standing, nil
	}
	d.m.made++
	ctx, end := context.WithCancel(context.Background())
	s := &running{
		spec: spec, instance: d.instance, end: end, up: make(chan struct{}), gone: make(chan struct{}),
		output: map[runtime.LogStream][]byte{}, told: []runtime.Happening{{Time: time.Now(), Text: "started"}},
	}
	s.Sandbox = runtime.Sandbox{
		SessionID: spec.SessionID, ChatID: spec.ChatID, ContainerID: strconv.Itoa(d.m.made), State: runtime.StateStarting, Pool: spec.Pool,
	}
	if err := s.prepare(); err != nil {
		return nil, err
	}
	d.m.sandboxes[spec.SessionID] = s
	go func() {
		err := d.m.run(ctx, spec, s)
		d.m.killCommands(s)
		d.m.note(s, err)
	}()
	return s, nil
}

// run runs a sandbox until it ends.
func (m *machine) run(ctx context.Context, spec runtime.Spec, s *running) error {
	workspace, err := os.OpenRoot(s.workspace())
	if err != nil {
		return err
	}
	defer workspace.Close()
	release, err := demosandbox.Obey(ctx, workspace, spec.SessionID)
	if err != nil {
		return err
	}
	defer release()
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	at := listener.Addr().(*net.TCPAddr).AddrPort()
	m.mu.Lock()
	s.Endpoint = runtime.Endpoint{IP: at.Addr().Unmap(), Port: at.Port()}
	m.mu.Unlock()
	close(s.up)
	told := demosandbox.Config{
		SessionID: spec.SessionID, ChatID: spec.ChatID, AgentID: spec.AgentID, AccessToken: string(spec.AccessToken),
		Workspace: s.workspace(), SessionFile: s.sessionFile(), Command: []string{os.Args[0]}, Stdout: printer{m, s, runtime.Stdout}, Stderr: printer{m, s, runtime.Stderr},
	}
	server := &http.Server{Handler: demosandbox.Handler(told, s.end), ReadHeaderTimeout: time.Minute}
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	return server.Serve(listener)
}

// killCommands ends all commands of a sandbox that has ended.
func (m *machine) killCommands(s *running) {
	m.mu.Lock()
	s.closed = true
	m.mu.Unlock()
	for _, group := range s.groups {
		for groupRuns(group) {
			_ = killGroup(group) // it fails if the group has just ended
			<-time.After(time.Millisecond)
		}
	}
	// While a command is forked, it has copies of this process's files, and with them of
	// the sandbox's lock and port.
	syscall.ForkLock.RLock()
	syscall.ForkLock.RUnlock() //nolint:gocritic,staticcheck // it only waits
}

// note reports the end of a sandbox.
func (m *machine) note(s *running, why error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s.State = runtime.StateDead
	if s.Reason == "" {
		s.Reason = fmt.Sprint("it ended: ", why)
	}
	s.told = append(s.told, runtime.Happening{Time: time.Now(), Text: s.Reason})
	m.printed.Broadcast()
	close(s.gone)
	for watcher := range m.watchers {
		select {
		case watcher <- s.Sandbox:
		default: // a watcher may miss one
		}
	}
}

func (sound) awaitReady(ctx context.Context, s *running) error {
	waiting, cancel := context.WithCancel(ctx)
	defer cancel()
	answered := make(chan error, 1)
	go func() {
		select {
		case <-s.up:
			answered <- ready.Check{HTTPPath: "/healthz", WantSessionID: true}.Wait(waiting, s.Endpoint, s.SessionID)
		case <-waiting.Done():
		}
	}()
	select {
	case err := <-answered:
		return err
	case <-s.gone:
		return fmt.Errorf("%w: %s", runtime.ErrNotReady, s.Reason)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// notForeign returns an error if the sandbox belongs to another instance.
func (d sound) notForeign(sessionID string) error {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if s, ok := d.m.sandboxes[sessionID]; ok && s.instance != d.instance {
		return runtime.ErrConflict
	}
	return nil
}

func (d sound) Stop(_ context.Context, sessionID string) error {
	if err := d.notForeign(sessionID); err != nil {
		return err
	}
	d.m.end(sessionID, "stopped")
	return nil
}

func (d sound) Delete(_ context.Context, sessionID string) error {
	if err := d.notForeign(sessionID); err != nil {
		return err
	}
	d.m.end(sessionID, "deleted")
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	s, ok := d.m.sandboxes[sessionID]
	delete(d.m.sandboxes, sessionID)
	if ok && s.dir != "" {
		return os.RemoveAll(s.dir)
	}
	return nil
}

func (m *machine) end(sessionID, reason string) {
	m.mu.Lock()
	m.ended[sessionID] = true
	s, ok := m.sandboxes[sessionID]
	if ok && s.Reason == "" {
		s.Reason = reason
	}
	m.mu.Unlock()
	if ok {
		s.end()
		<-s.gone
	}
}

func (d sound) Inspect(_ context.Context, sessionID string) (runtime.Sandbox, error) {
	if err := d.notForeign(sessionID); err != nil {
		return runtime.Sandbox{}, err
	}
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if s, ok := d.m.sandboxes[sessionID]; ok {
		return s.Sandbox, nil
	}
	return runtime.Sandbox{}, runtime.ErrNotFound
}

func (d sound) List(context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		for _, shown := range d.m.all(func(s *running) bool { return s.instance == d.instance }) {
			if !yield(shown, nil) {
				return
			}
		}
	}
}

func (m *machine) all(which func(*running) bool) []runtime.Sandbox {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []runtime.Sandbox
	for _, s := range m.sandboxes {
		if which(s) {
			all = append(all, s.Sandbox)
		}
	}
	return all
}

func (d sound) Watch(ctx context.Context, changed func(runtime.Sandbox)) error {
	news := make(chan runtime.Sandbox, 100)
	d.m.mu.Lock()
	d.m.watchers[news] = true
	d.m.mu.Unlock()
	defer func() {
		d.m.mu.Lock()
		defer d.m.mu.Unlock()
		delete(d.m.watchers, news)
	}()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case s := <-news:
			changed(s)
		}
	}
}
