package conformance_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/bivouac/bivouac/internal/demosandbox"
	"github.com/bivouac/bivouac/runtime"
)

// The test binary is also the program that is run in the sandboxes.
func TestMain(m *testing.M) {
	os.Exit(demosandbox.Main(os.Args[1:], func() error {
		os.Exit(m.Run())
		return nil
	}))
}

// printer keeps what a sandbox prints.
type printer struct {
	m      *machine
	s      *running
	stream runtime.LogStream
}

func (p printer) Write(data []byte) (int, error) {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	p.s.output[p.stream] = append(p.s.output[p.stream], data...)
	p.m.printed.Broadcast()
	return len(data), nil
}

// find returns the sandbox of this instance.
func (d sound) find(sessionID string) (*running, error) {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	s, ok := d.m.sandboxes[sessionID]
	if !ok || s.instance != d.instance {
		return nil, runtime.ErrNotFound
	}
	return s, nil
}

func (d sound) Logs(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	return func(yield func(runtime.LogChunk, error) bool) {
		s, err := d.find(sessionID)
		if err != nil {
			yield(runtime.LogChunk{}, err)
			return
		}
		var next int64
		var data []byte
		var ended bool
		look := func() bool { // with the lock held
			data = slices.Clone(s.output[query.Stream][next:])
			ended = s.State == runtime.StateDead
			return len(data) > 0 || ended || !query.Follow
		}
		d.m.mu.Lock()
		size := int64(len(s.output[query.Stream]))
		if next = query.Offset; next < 0 {
			next += size
		}
		next = min(max(next, 0), size)
		d.m.mu.Unlock()
		for {
			if err := d.m.printed.Wait(ctx, look); err != nil {
				yield(runtime.LogChunk{}, err)
				return
			}
			if len(data) > 0 && !yield(runtime.LogChunk{Stream: query.Stream, Offset: next, Data: data}, nil) {
				return
			}
			next += int64(len(data))
			if ended || !query.Follow {
				return
			}
		}
	}
}

func (d sound) Explain(_ context.Context, sessionID string) ([]runtime.Happening, error) {
	s, err := d.find(sessionID)
	if err != nil {
		return nil, err
	}
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	return slices.Clone(s.told), nil
}

func (d sound) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	return d.exec(ctx, sessionID, command, streams, killGroup)
}

func killGroup(pid int) error { return syscall.Kill(-pid, syscall.SIGKILL) }

// groupRuns reports whether a process of a group runs. One that waits to be collected by
// its parent does not.
func groupRuns(group int) bool {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat") // the pattern is well formed
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if fields[2] == strconv.Itoa(group) && fields[0] != "Z" && fields[0] != "X" {
			return true
		}
	}
	return false
}

// exec runs a command in a process group of its own, and calls kill if ctx ends or the
// driver dies before the command has ended.
func (d sound) exec(
	ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams, kill func(pid int) error,
) (int, error) {
	s, err := d.find(sessionID)
	if err != nil {
		return 0, err
	}
	alive, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(d.dead, cancel)()
	cmd := exec.CommandContext(alive, command.Args[0], command.Args[1:]...)
	cmd.Env = []string{"BIVOUAC_SESSION_ID=" + sessionID, "BIVOUAC_WORKSPACE=" + s.workspace(), "BIVOUAC_SESSION_FILE=" + s.sessionFile()}
	for name, value := range command.Env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Dir = cmp.Or(command.Dir, s.workspace())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return kill(cmd.Process.Pid) }
	attach := attachPipes
	if command.TTY {
		attach = attachTerminal
	}
	started, finish, err := attach(cmd, command, streams)
	if err != nil {
		return 0, err
	}
	if err := s.start(d.m, cmd); err != nil {
		finish()
		return 0, err
	}
	started()
	err = cmd.Wait()
	finish()
	switch exit, ok := errors.AsType[*exec.ExitError](err); {
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case d.dead.Err() != nil:
		return 0, runtime.ErrUnavailable
	case err != nil && !ok:
		return 0, err
	case ok && exit.Sys().(syscall.WaitStatus).Signaled():
		return 128 + int(exit.Sys().(syscall.WaitStatus).Signal()), nil
	}
	return cmd.ProcessState.ExitCode(), nil
}

// start starts a command, unless the sandbox has ended.
func (s *running) start(m *machine, cmd *exec.Cmd) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if s.closed {
		return runtime.ErrNotFound
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	s.groups = append(s.groups, cmd.Process.Pid)
	return nil
}

// attachPipes connects a command to its streams. It returns what to do when it has started
// and when it has ended.
func attachPipes(cmd *exec.Cmd, _ runtime.Command, streams runtime.Streams) (started, finish func(), err error) {
	cmd.Stdout, cmd.Stderr = streams.Stdout, streams.Stderr
	if streams.Stdin == nil {
		return func() {}, func() {}, nil
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, err
	}
	started = func() {
		go func() { // it may wait in a Read that only the caller can end
			_, _ = io.Copy(stdin, streams.Stdin) // it fails if the command does not read all
			_ = stdin.Close()
		}()
	}
	return started, func() { _ = stdin.Close() }, nil
}
