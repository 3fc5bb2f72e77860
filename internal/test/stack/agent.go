package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The limits of waiting. They are long, so that a busy machine is not a failure.
const (
	startLimit = 90 * time.Second // from start until ready
	askLimit   = 5 * time.Second  // for one answer on the way there
	stopLimit  = 15 * time.Second // from SIGTERM until SIGKILL
	askEvery   = 25 * time.Millisecond
)

// Agent is one process of Nomad or Consul. Tests can kill, pause, stop and restart it.
// Signals go to the process only, not to what it started: sandboxes outlive a killed agent,
// as they do in production.
//
// Its methods are not safe for concurrent use.
type Agent struct {
	Name string // "consul-0", "server-1", "client-0", or "nomad", a dev agent
	Addr string // address of its HTTP API, such as "127.0.0.1:8500"
	Log  string // path of the file with its output
	Env  []string

	rpc   string // a server's RPC address, by which its peers know it
	bin   string
	args  []string
	ready func(context.Context) error // nil once the agent can be used
	limit time.Duration               // from start until ready

	cmd  *exec.Cmd
	done chan struct{} // closed once the process has ended and been waited for
}

// ErrEnded means that an agent ended although nothing ended it.
var ErrEnded = errors.New("it ended by itself")

// PID returns the process ID of the process that was started last.
func (a *Agent) PID() int { return a.cmd.Process.Pid }

// Done returns a channel that is closed once the process that was started last has ended.
func (a *Agent) Done() <-chan struct{} { return a.done }

// ExitCode returns the exit code of a process that has ended, -1 if a signal ended it.
func (a *Agent) ExitCode() int { return a.cmd.ProcessState.ExitCode() }

// Running reports whether the process exists, paused or not.
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

// Start starts the process with the same ports and data as before. It does not wait until
// the process is ready.
func (a *Agent) Start() (err error) {
	if a.Running() {
		return fmt.Errorf("stack: start %s: it is already running", a.Name)
	}
	log, err := os.OpenFile(a.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("stack: start %s: %w", a.Name, err)
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	cmd := exec.Command(a.bin, a.args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = a.Env, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid: true, // only this program gets Ctrl-C, so it decides the order
		// For the case that this program dies without stopping it. Not SIGKILL, so that a
		// dev agent of Nomad stops its tasks. A paused agent gets SIGCONT from the kernel,
		// because its process group is orphaned.
		Pdeathsig: syscall.SIGTERM,
	}
	done, started := make(chan struct{}), make(chan error)
	go func() {
		defer close(done)
		// Pdeathsig is sent when the thread that started the process ends, so this thread
		// must live as long as the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // its log shows how it ended, and often a test killed it
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("stack: start %s: %w", a.Name, err)
	}
	a.cmd, a.done = cmd, done
	return nil
}

// WaitReady returns once the agent can be used. It fails with [ErrEnded] as soon as the
// process is gone, or after 90 seconds (3 minutes for Bivouac), with the end of its log.
func (a *Agent) WaitReady(ctx context.Context) error {
	if a.done == nil {
		return fmt.Errorf("stack: %s was never started", a.Name)
	}
	ctx, cancel := context.WithTimeout(ctx, a.limit)
	defer cancel()
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for {
		try, cancelTry := context.WithTimeout(ctx, askLimit)
		err := a.ready(try)
		cancelTry()
		if err == nil && a.Running() { // otherwise another process has answered
			return nil
		}
		select {
		case <-tick.C:
		case <-a.done:
			return fmt.Errorf("stack: %s: %w: %s\n%s", a.Name, ErrEnded, a.cmd.ProcessState, tail(a.Log))
		case <-ctx.Done():
			return fmt.Errorf("stack: %s is not ready: %w: %w\n%s", a.Name, ctx.Err(), err, tail(a.Log))
		}
	}
}

// Kill kills the process (SIGKILL) and returns when it has ended.
func (a *Agent) Kill() error {
	if err := a.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-a.done
	return nil
}

// Pause suspends the process (SIGSTOP) and returns when it is suspended.
func (a *Agent) Pause() error {
	if err := a.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	for {
		err := unix.Waitid(unix.P_PID, a.PID(), nil, unix.WSTOPPED|unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Resume continues a paused process (SIGCONT).
func (a *Agent) Resume() error { return a.Signal(syscall.SIGCONT) }

// Stop asks the process to end (SIGTERM), kills it if it does not within 15 s, and returns
// when it has ended. It resumes a paused process first.
func (a *Agent) Stop() error {
	if !a.Running() {
		return nil
	}
	if err := errors.Join(a.Signal(syscall.SIGTERM), a.Resume()); err != nil && a.Running() {
		return err
	}
	select {
	case <-a.done:
		return nil
	case <-time.After(stopLimit):
		return a.Kill()
	}
}

// Restart stops the process if it runs, starts it again, and returns when it is
// ready.
func (a *Agent) Restart(ctx context.Context) error {
	if err := a.Stop(); err != nil {
		return err
	}
	if err := a.Start(); err != nil {
		return err
	}
	return a.WaitReady(ctx)
}

// Signal sends a signal to the process.
func (a *Agent) Signal(sig syscall.Signal) error {
	if !a.Running() {
		return fmt.Errorf("stack: %s does not run", a.Name)
	}
	if err := syscall.Kill(a.PID(), sig); err != nil {
		return fmt.Errorf("stack: send %v to %s: %w", sig, a.Name, err)
	}
	return nil
}

// tail returns the end of a log, for an error message.
func tail(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(data), []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-15):], []byte("\n")))
}
