package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of waiting. They are generous: a busy machine is no failure.
const (
	startLimit = 60 * time.Second // from start until ready
	stopLimit  = 15 * time.Second // from SIGTERM until SIGKILL
	askEvery   = 25 * time.Millisecond
)

// Agent is one process of Nomad or Consul, which can be broken in the ways that
// processes break. Signals go to the process alone, not to what it started:
// sandboxes outlive the agent that is killed, as they do in production.
//
// Its methods are not safe for concurrent use.
type Agent struct {
	Name string // "consul-0", "nomad-server-1", …
	Addr string // of its HTTP API: "127.0.0.1:8500"
	Log  string // path of the file with its output

	rpc   string // address of a server's RPC, by which its peers know it
	bin   string
	args  []string
	env   []string
	ready func(context.Context) error // nil once the agent can be used

	pid  int
	done chan struct{} // closed once the process is gone and reaped
}

// Running says whether the process is there, paused or not.
func (a *Agent) Running() bool {
	if a.done == nil {
		return false
	}
	select {
	case <-a.done:
		return false
	default:
		return true
	}
}

// start begins the process and does not wait until it is ready.
func (a *Agent) start() error {
	if a.Running() {
		return fmt.Errorf("stack: start %s: it runs already", a.Name)
	}
	log, err := os.OpenFile(a.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("stack: start %s: %w", a.Name, err)
	}
	defer log.Close()
	cmd := exec.Command(a.bin, a.args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = a.env, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid: true, // a Ctrl-C on the terminal is for us, and we decide the order
		// Should we die without stopping it. Not SIGKILL: a dev agent of Nomad
		// then stops its tasks. A paused one gets SIGCONT from the kernel, as
		// its process group is orphaned.
		Pdeathsig: syscall.SIGTERM,
	}
	done, started := make(chan struct{}), make(chan error)
	go func() {
		defer close(done)
		// Pdeathsig counts from the thread that starts the process, so this
		// one has to live as long.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ends is in its log, and often our doing
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("stack: start %s: %w", a.Name, err)
	}
	a.pid, a.done = cmd.Process.Pid, done
	return nil
}

// WaitReady returns once the agent can be used. It fails as soon as the process
// is gone, with the end of its log.
func (a *Agent) WaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for {
		err := a.ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-a.done:
			return fmt.Errorf("stack: %s ended by itself:\n%s", a.Name, tail(a.Log))
		case <-ctx.Done():
			return fmt.Errorf("stack: %s is not ready: %w: %w\n%s", a.Name, ctx.Err(), err, tail(a.Log))
		}
	}
}

// Kill ends the process at once (SIGKILL) and returns when it is gone.
func (a *Agent) Kill() error {
	if err := a.signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-a.done
	return nil
}

// Pause stops the process in its tracks (SIGSTOP) and returns when it stands.
func (a *Agent) Pause() error {
	if err := a.signal(syscall.SIGSTOP); err != nil {
		return err
	}
	for {
		err := unix.Waitid(unix.P_PID, a.pid, nil, unix.WSTOPPED|unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Resume lets a paused process go on (SIGCONT).
func (a *Agent) Resume() error { return a.signal(syscall.SIGCONT) }

// Stop asks the process to end (SIGTERM), kills it where it does not within 15 s,
// and returns when it is gone. A paused one is resumed first.
func (a *Agent) Stop() error {
	if !a.Running() {
		return nil
	}
	if err := errors.Join(a.signal(syscall.SIGTERM), a.Resume()); err != nil && a.Running() {
		return err
	}
	select {
	case <-a.done:
		return nil
	case <-time.After(stopLimit):
		return a.Kill()
	}
}

// Restart stops the process if it runs, starts it with the same ports and data,
// and returns when it is ready.
func (a *Agent) Restart(ctx context.Context) error {
	if err := a.Stop(); err != nil {
		return err
	}
	if err := a.start(); err != nil {
		return err
	}
	return a.WaitReady(ctx)
}

func (a *Agent) signal(sig syscall.Signal) error {
	if !a.Running() {
		return fmt.Errorf("stack: %s does not run", a.Name)
	}
	if err := syscall.Kill(a.pid, sig); err != nil {
		return fmt.Errorf("stack: send %v to %s: %w", sig, a.Name, err)
	}
	return nil
}

// tail is the end of a log, for an error message.
func tail(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(data), []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-15):], []byte("\n")))
}

// group is the agents that start and stop together, and what they share.
type group struct {
	dir   string
	ports *portBlock
	all   []*Agent
}

func newGroup() (*group, error) {
	// A short path: Nomad puts Unix sockets below it, whose paths are limited
	// to 107 bytes.
	dir, err := os.MkdirTemp("", "bivouac-")
	if err != nil {
		return nil, err
	}
	ports, err := newPortBlock()
	if err != nil {
		return nil, errors.Join(err, os.Remove(dir))
	}
	return &group{dir: dir, ports: ports}, nil
}

// env is the environment of the group's agents. What is set to point a command
// at the user's own Nomad or Consul must not reach them. The mark is inherited
// by all that an agent starts, and [sweep] finds it by that.
func (g *group) env() []string {
	env := []string{markName + "=" + g.dir}
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "NOMAD_") && !strings.HasPrefix(kv, "CONSUL_") {
			env = append(env, kv)
		}
	}
	return env
}

// add makes an agent with a folder of its own; prepare writes its
// configuration there and returns its arguments.
func (g *group) add(name, bin string, addr string, prepare func(dir string) ([]string, error)) (*Agent, error) {
	dir := filepath.Join(g.dir, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	args, err := prepare(dir)
	if err != nil {
		return nil, err
	}
	a := &Agent{
		Name: name,
		Addr: addr,
		Log:  filepath.Join(dir, "agent.log"),
		bin:  bin,
		args: args,
		env:  g.env(),
	}
	g.all = append(g.all, a)
	return a, nil
}

// start starts all agents and waits until all are ready.
func (g *group) start(ctx context.Context) error {
	for _, a := range g.all {
		if err := a.start(); err != nil {
			return err
		}
	}
	for _, a := range g.all {
		if err := a.WaitReady(ctx); err != nil {
			return err
		}
	}
	return nil
}

// stop ends everything that the group or any of its agents ever started, and
// removes its folder.
func (g *group) stop() error {
	errs := make([]error, len(g.all))
	var wg sync.WaitGroup
	for i, a := range g.all {
		wg.Go(func() { errs[i] = a.Stop() })
	}
	wg.Wait()
	return errors.Join(append(errs, sweep(g.dir), g.ports.release())...)
}

// leader finds the server that leads. ask returns the RPC address of the leader
// that one server knows.
func leader(servers []*Agent, ask func(*Agent) (string, error)) (*Agent, error) {
	err := errors.New("no server runs")
	for _, a := range servers {
		if !a.Running() {
			continue
		}
		var addr string
		if addr, err = ask(a); err != nil {
			continue
		}
		i := slices.IndexFunc(servers, func(s *Agent) bool { return s.rpc == addr && s.Running() })
		if i >= 0 {
			return servers[i], nil
		}
		err = fmt.Errorf("%s knows of no running leader", a.Name)
	}
	return nil, fmt.Errorf("stack: find the leader: %w", err)
}
