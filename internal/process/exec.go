package process

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/bivouac/bivouac/internal/terminal"
	"github.com/bivouac/bivouac/runtime"
)

// Exec implements [runtime.Execer]. The command has the environment, folder and user of the
// sandbox. Task and User are not supported, and TTY only on Linux.
//
// The command ends with its sandbox, and with the server on Linux: the kernel kills it, and
// the helper of a -dev server ends what it started.
func (d *Driver) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	code, err := d.exec(ctx, sessionID, command, streams)
	if err != nil {
		return 0, fmt.Errorf("process: exec in %s: %w", sessionID, err)
	}
	return code, nil
}

func (d *Driver) exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	switch err := command.Validate(); {
	case err != nil:
		return 0, fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	case command.User != "":
		return 0, fmt.Errorf("%w: a command runs as the user of the server, so a user cannot be chosen", runtime.ErrInvalid)
	case command.Task != "":
		return 0, fmt.Errorf("%w: sandboxes have no tasks", runtime.ErrInvalid)
	}
	d.mu.Lock()
	sb, ok := d.sandboxes[sessionID]
	d.mu.Unlock()
	if !ok || sb.view().State != runtime.StateRunning {
		return 0, runtime.ErrNotFound
	}
	mark := "BIVOUAC_EXEC=" + rand.Text()
	cmd, err := d.newCommand(sb, command, mark)
	if err != nil {
		return 0, err
	}
	wires, err := connect(cmd, command, streams)
	if err != nil {
		return 0, err
	}
	var running sync.WaitGroup
	defer running.Wait()
	defer wires.close()
	started, exited := make(chan error, 1), make(chan struct{})
	running.Go(func() {
		// The kernel kills the command when the thread ends that started it.
		goruntime.LockOSThread()
		defer goruntime.UnlockOSThread()
		defer close(exited)
		started <- cmd.Start()
		wires.started()
		if cmd.Process != nil {
			_ = cmd.Wait() // the result is in cmd.ProcessState
		}
	})
	if err := <-started; err != nil {
		return 0, fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	wires.copy(streams, exited)
	ended := make(chan struct{})
	running.Go(func() {
		defer close(ended)
		<-exited
		for _, out := range wires.outputs {
			out.limitRead() // one that waits already
		}
		wires.outgoing.Wait()
	})
	select {
	case <-ended:
		return exitCode(cmd.ProcessState), nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-sb.running.Done():
		err = fmt.Errorf("%w: it has ended", runtime.ErrNotFound)
	}
	kill(cmd.Process.Pid, mark)
	return 0, err
}

// newCommand returns the command with the sandbox's environment.
func (d *Driver) newCommand(sb *sandbox, command runtime.Command, variable string) (*exec.Cmd, error) {
	env := d.environment(sb)
	for _, name := range slices.Sorted(maps.Keys(command.Env)) {
		env = append(env, name+"="+command.Env[name])
	}
	env = append(env, mark(d.dir, sb.spec.SessionID), variable) // of two with a name the last counts
	dir := cmp.Or(command.Dir, d.workspace(sb))
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return nil, fmt.Errorf("%w: there is no folder %q", runtime.ErrInvalid, dir)
	}
	path := cmp.Or(command.Env["PATH"], os.Getenv("PATH"))
	program, err := find(command.Args[0], dir, path)
	if err != nil {
		return nil, err
	}
	return &exec.Cmd{Path: program, Args: command.Args, Env: env, Dir: dir}, nil
}

// find returns the path of a program, as a shell finds it.
func find(name, dir, path string) (string, error) {
	candidates := []string{name}
	if !strings.Contains(name, "/") {
		candidates = nil
		for _, folder := range filepath.SplitList(path) {
			candidates = append(candidates, filepath.Join(folder, name))
		}
	}
	for _, candidate := range candidates {
		if !filepath.IsAbs(candidate) {
			candidate = filepath.Join(dir, candidate)
		}
		if info, err := os.Stat(candidate); err == nil && !info.IsDir() && info.Mode()&0o111 != 0 {
			return candidate, nil
		}
	}
	return "", fmt.Errorf("%w: there is no program %q", runtime.ErrInvalid, name)
}

// kill kills the processes of a command until none is left.
func kill(leader int, mark string) {
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		left := members(leader, true, mark)
		if len(left) == 0 {
			return
		}
		_ = syscall.Kill(-leader, syscall.SIGKILL) // fails if the group is empty
		signal(left, syscall.SIGKILL)
		<-time.After(pause)
	}
}

func exitCode(state *os.ProcessState) int {
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal())
	}
	return state.ExitCode()
}

// wires connect a command with its streams. They are files, so that each of them can be
// closed whatever the other side does.
type wires struct {
	input   *os.File      // to the command
	outputs []output      // of the command
	theirs  []*os.File    // the command's ends, to be closed once it has started
	tty     *os.File      // our end of the terminal; nil: there is none
	done    chan struct{} // closed by close

	outgoing sync.WaitGroup // copies of the outputs
	resizing sync.WaitGroup
}

type output struct {
	from *os.File
	to   io.Writer
}

const (
	// lastOutput is how long the last output of a command that has exited may take from one
	// end of a pipe or a terminal to the other.
	lastOutput = 100 * time.Millisecond
	// maxLastOutput is how much a pipe holds at most, in bytes.
	maxLastOutput = 64 << 10
)

// copy copies the output until its end. Once the command has exited it copies only what
// the command may have written: what it left in the background may hold the output open.
func (o output) copy(exited <-chan struct{}) error {
	to := cmp.Or(o.to, io.Discard)
	buf := make([]byte, 32<<10)
	for left, isLimited := maxLastOutput, false; left > 0; {
		n, err := o.from.Read(buf)
		if isLimited && errors.Is(err, os.ErrDeadlineExceeded) {
			// A busy machine may have spent the time before the read.
			if n = o.readNow(buf); n == 0 {
				return nil
			}
			err = nil
		}
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return fmt.Errorf("write the output: %w", err)
			}
		}
		if isLimited {
			left -= n
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return nil // it has ended
		}
		select {
		case <-exited:
			o.limitRead()
			isLimited = true // from here on: what was read before may have made room for more
		default:
		}
	}
	return nil
}

// limitRead limits how long a read waits.
func (o output) limitRead() {
	_ = o.from.SetReadDeadline(time.Now().Add(lastOutput)) // fails only if it is closed
}

// readNow reads what is there, without waiting. It returns 0 if there is nothing.
func (o output) readNow(buf []byte) (n int) {
	_ = o.from.SetReadDeadline(time.Time{}) // as above
	if conn, err := o.from.SyscallConn(); err == nil {
		_ = conn.Read(func(fd uintptr) bool {
			n, _ = syscall.Read(int(fd), buf)
			return true
		})
	}
	return max(n, 0)
}

// connect makes the wires of a command that has not started.
func connect(cmd *exec.Cmd, command runtime.Command, streams runtime.Streams) (w *wires, err error) {
	w = &wires{done: make(chan struct{})}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if command.TTY {
		ours, theirs, err := terminal.Open()
		if err != nil {
			return nil, fmt.Errorf("open a terminal: %w", err)
		}
		w.tty, w.input, w.theirs = ours, ours, []*os.File{theirs}
		if command.Size != (runtime.WindowSize{}) {
			if err := terminal.Resize(ours, command.Size); err != nil {
				return nil, fmt.Errorf("open a terminal: %w", err)
			}
		}
		w.outputs = []output{{ours, streams.Stdout}}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
		cmd.SysProcAttr = attributes(&syscall.SysProcAttr{Setsid: true, Setctty: true})
		return w, nil
	}
	cmd.SysProcAttr = attributes(&syscall.SysProcAttr{Setpgid: true})
	stdin, input, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdin, w.input, w.theirs = stdin, input, []*os.File{stdin}
	for to, set := range map[*io.Writer]*io.Writer{&streams.Stdout: &cmd.Stdout, &streams.Stderr: &cmd.Stderr} {
		ours, theirs, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		w.outputs, w.theirs, *set = append(w.outputs, output{ours, *to}), append(w.theirs, theirs), theirs
	}
	return w, nil
}

// started closes the command's ends.
func (w *wires) started() {
	for _, file := range w.theirs {
		_ = file.Close() // the command has its own
	}
}

// copy copies the streams until they end.
func (w *wires) copy(streams runtime.Streams, exited <-chan struct{}) {
	for _, out := range w.outputs {
		w.outgoing.Go(func() {
			if out.copy(exited) != nil {
				_ = out.from.Close() // the reader has gone, as the command sees when it writes
			}
		})
	}
	// By the contract of Exec nothing waits for this: its Read may.
	go func() {
		if streams.Stdin != nil {
			_, _ = io.Copy(struct{ io.Writer }{w.input}, streams.Stdin) // the command need not read its input
		}
		if w.tty == nil {
			_ = w.input.Close()
		}
	}()
	if w.tty != nil && streams.Resize != nil {
		w.resizing.Go(func() {
			for {
				select {
				case <-w.done:
					return
				case size, ok := <-streams.Resize:
					if !ok || terminal.Resize(w.tty, size) != nil {
						return
					}
				}
			}
		})
	}
}

// close closes everything, and waits for the copies of the outputs.
func (w *wires) close() {
	close(w.done)
	w.resizing.Wait()
	for _, out := range w.outputs {
		_ = out.from.Close() // may be closed already
	}
	if w.input != nil {
		_ = w.input.Close() // as above
	}
	for _, file := range w.theirs {
		_ = file.Close() // as above
	}
	w.outgoing.Wait()
}
