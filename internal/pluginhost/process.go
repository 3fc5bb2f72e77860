package pluginhost

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin/runner"
)

// defaultPath is a plugin's PATH if its environment has none.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// drainLimit is how long the rest of a plugin's output is read after the plugin's end.
// A sandbox may have inherited the output and keep it open forever.
const drainLimit = 200 * time.Millisecond

// process is one process of a plugin. It implements go-plugin's runner.Runner and adds
// what go-plugin leaves out: a process group of its own, an end together with the host,
// and limits on its output.
type process struct {
	path     string
	launcher *launcher
	output   *output
	cmd      *exec.Cmd
	sockets  string // the folder for its socket

	stdoutRead, stderrRead *os.File
	handshakeRead          *io.PipeReader // what go-plugin sees of stdout
	handshakeWrite         *io.PipeWriter

	exited  chan struct{} // closed once the process has ended and been collected
	reading sync.WaitGroup

	waitErr error // set before exited is closed

	mu        sync.Mutex
	started   bool
	killed    bool
	greeted   bool
	handshake error // what is wrong with the first line
}

func newProcess(spec Plugin, path string, l *launcher, out *output) *process {
	p := &process{path: path, launcher: l, output: out, exited: make(chan struct{})}
	p.handshakeRead, p.handshakeWrite = io.Pipe()
	p.cmd = exec.Command(path, spec.Args...) //nolint:noctx // no context ends it: collect must be told first
	p.cmd.Dir = "/"
	if _, ok := spec.Env["PATH"]; !ok {
		p.cmd.Env = append(p.cmd.Env, "PATH="+defaultPath)
	}
	for name, value := range spec.Env {
		p.cmd.Env = append(p.cmd.Env, name+"="+value)
	}
	p.cmd.SysProcAttr = ownGroup()
	return p
}

// runner is go-plugin's hook for starting a process. The command that it receives
// contains only the environment of the handshake.
func (p *process) runner(_ hclog.Logger, cmd *exec.Cmd, sockets string) (runner.Runner, error) {
	p.sockets = sockets
	p.cmd.Env = append(p.cmd.Env, cmd.Env...)
	return p, nil
}

// Start starts the process and begins to read its output.
func (p *process) Start(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	stdoutRead, stdoutWrite, err := os.Pipe()
	if err != nil {
		return err
	}
	stderrRead, stderrWrite, err := os.Pipe()
	if err != nil {
		return errors.Join(err, stdoutRead.Close(), stdoutWrite.Close())
	}
	p.stdoutRead, p.stderrRead = stdoutRead, stderrRead
	p.cmd.Stdout, p.cmd.Stderr = stdoutWrite, stderrWrite

	p.mu.Lock()
	defer p.mu.Unlock()
	if err = errKilled; !p.killed {
		err = p.launcher.do(p.cmd.Start)
	}
	err = errors.Join(err, stdoutWrite.Close(), stderrWrite.Close())
	if err != nil {
		return errors.Join(startError(p.path, err), stdoutRead.Close(), stderrRead.Close())
	}
	p.started = true
	p.reading.Go(func() { p.output.copy(p.stderrRead) })
	p.reading.Go(p.readStdout)
	go p.wait()
	return nil
}

// startError explains the kernel's errors for a file that cannot be run.
func startError(path string, err error) error {
	switch {
	case errors.Is(err, syscall.ENOEXEC):
		return fmt.Errorf("%s is not a program for this machine: %w", path, err)
	case errors.Is(err, syscall.ENOENT):
		return fmt.Errorf("%s cannot be run, or the interpreter or loader that it names is missing: %w", path, err)
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("%s may not be run by this user: %w", path, err)
	}
	return err
}

// readStdout passes the first line to go-plugin if it is a valid handshake. It logs all
// other lines.
func (p *process) readStdout() {
	defer func() { _ = p.handshakeWrite.Close() }() // it never fails
	first := bufio.NewReaderSize(p.stdoutRead, maxHandshake)
	line, err := first.ReadSlice('\n')
	if len(line) == 0 {
		return
	}
	bad := checkHandshake(string(line))
	p.mu.Lock()
	p.greeted, p.handshake = true, bad
	p.mu.Unlock()
	if bad != nil {
		_ = p.handshakeWrite.Close()
		p.kill()
	} else if _, err := p.handshakeWrite.Write(line); err != nil {
		return
	}
	if err == nil || errors.Is(err, bufio.ErrBufferFull) {
		p.output.copy(first)
	}
}

// wait collects the process once it has ended and ends what is left of its group.
func (p *process) wait() {
	err := collect(p.cmd)
	deadline := time.Now().Add(drainLimit)
	_ = p.stdoutRead.SetReadDeadline(deadline) // a pipe takes deadlines
	_ = p.stderrRead.SetReadDeadline(deadline)
	p.reading.Wait()
	_ = p.stdoutRead.Close()
	_ = p.stderrRead.Close()

	p.waitErr = err
	close(p.exited)
}

// errKilled is returned by Start if the process was killed before it started.
var errKilled = errors.New("the host has given it up before it was started")

// kill ends the process and its group at once. If the process has not started, kill
// keeps it from starting. It does not wait.
func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.exited:
		return // its PID may belong to another process by now
	default:
	}
	p.killed = true
	if !p.started {
		return
	}
	_ = p.cmd.Process.Kill() // fails if the process has ended; collect ends the group
}

// maxSocketPath is the longest path of a socket in bytes, without the terminating zero.
const maxSocketPath = len(syscall.RawSockaddrUnix{}.Path) - 1

// checkSocket returns an error if a socket path as go-plugin makes it is longer than
// the kernel allows. A plugin that chooses its own path may use a shorter one.
func (p *process) checkSocket() error {
	if length := len(p.sockets) + len("/plugin0123456789"); length > maxSocketPath {
		return fmt.Errorf("the path of its socket, a file in %s, may have %d bytes at most: set TMPDIR to a folder with a shorter path, such as /tmp",
			p.sockets, maxSocketPath)
	}
	return nil
}

// ended returns how the process ended and what it printed last. Call it only after
// exited is closed.
func (p *process) ended() error {
	how := "its process ended with exit code 0"
	switch {
	case p.wasKilled():
		how = "its process was killed by the host"
	case p.waitErr != nil:
		how = "its process ended: " + p.waitErr.Error()
	}
	if last := p.output.last(); last != "" {
		how += "; it printed last: " + last
	}
	return errors.New(how)
}

// wasKilled reports whether the host had to kill the process. Call it only after exited
// is closed.
func (p *process) wasKilled() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	exit, ok := errors.AsType[*exec.ExitError](p.waitErr)
	if !ok || !p.killed {
		return false
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	return ok && status.Signal() == syscall.SIGKILL
}

// gone reports whether the process has ended.
func (p *process) gone() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// awaitEnd returns once the process has ended, or after limit.
func (p *process) awaitEnd(limit time.Duration) {
	select {
	case <-p.exited:
	case <-time.After(limit):
	}
}

// greeting reports whether a first line was read, and what is wrong with it.
func (p *process) greeting() (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.greeted, p.handshake
}

func (p *process) pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.started {
		return 0
	}
	return p.cmd.Process.Pid
}

// The methods below complete go-plugin's runner.Runner.

// Wait returns once the process has ended.
func (p *process) Wait(ctx context.Context) error {
	select {
	case <-p.exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Kill does nothing. The host decides when to kill a process, so that a process that
// ends by itself can say why.
func (p *process) Kill(context.Context) error { return nil }

// Stdout returns the handshake. It ends with the process.
func (p *process) Stdout() io.ReadCloser { return p.handshakeRead }

// Stderr returns an empty stream. output logs the process's stderr.
func (p *process) Stderr() io.ReadCloser { return io.NopCloser(strings.NewReader("")) }

// Name returns the plugin's file.
func (p *process) Name() string { return p.path }

// ID returns the PID. It is never empty: if it were, go-plugin would not remove its
// folder.
func (p *process) ID() string { return strconv.Itoa(p.pid()) }

// Diagnose adds nothing. The host reports what went wrong.
func (p *process) Diagnose(context.Context) string { return "" }

// PluginToHost returns the address unchanged, because both are on this machine.
func (p *process) PluginToHost(network, address string) (hostNet, hostAddr string, err error) {
	return network, address, nil
}

// HostToPlugin returns the address unchanged.
func (p *process) HostToPlugin(network, address string) (pluginNet, pluginAddr string, err error) {
	return network, address, nil
}
