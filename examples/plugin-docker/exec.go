package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/bivouac/bivouac/runtime"
	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/client"
)

// Exec runs a command in the container. The engine cannot kill it, so a guard does.
func (d *driver) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	if command.Task != "" {
		return 0, errNoTasks
	}
	found, err := d.inspect(ctx, sessionID)
	switch {
	case err != nil:
		return 0, err
	case !found.State.Running:
		return 0, fmt.Errorf("%w: its container does not run", runtime.ErrNotFound)
	}
	if err := canKill(found.State.Pid, sessionID); err != nil {
		return 0, err
	}
	guard, err := startGuard()
	if err != nil {
		return 0, err
	}
	defer guard.close()

	size := client.ConsoleSize{Height: uint(command.Size.Rows), Width: uint(command.Size.Columns)}
	options := client.ExecCreateOptions{
		Cmd: command.Args, WorkingDir: command.Dir, User: command.User, TTY: command.TTY, ConsoleSize: size,
		AttachStdin: streams.Stdin != nil, AttachStdout: true, AttachStderr: true,
	}
	for name, value := range command.Env {
		options.Env = append(options.Env, name+"="+value)
	}
	options.Env = append(options.Env, guard.mark) // of two with a name the last counts
	made, err := d.engine.ExecCreate(ctx, found.ID, options)
	if errdefs.IsConflict(err) {
		return 0, fmt.Errorf("%w: its container does not run", runtime.ErrNotFound)
	}
	if err != nil {
		return 0, known(err)
	}
	attached, err := d.engine.ExecAttach(ctx, made.ID, client.ExecAttachOptions{TTY: command.TTY, ConsoleSize: size})
	if err != nil {
		return 0, known(err)
	}
	defer attached.Close()
	defer context.AfterFunc(ctx, attached.Close)()
	go sendInput(attached.HijackedResponse, streams.Stdin, command.TTY) // it may wait in a Read that only the host can end
	if command.TTY {
		resizing, stop := context.WithCancel(ctx)
		defer stop()
		go d.resize(resizing, made.ID, command.Size, streams.Resize)
		_, err = io.Copy(streams.Stdout, attached.Reader)
	} else {
		_, err = stdcopy.StdCopy(streams.Stdout, streams.Stderr, attached.Reader)
	}
	if err == nil || ctx.Err() != nil {
		return d.exitCode(ctx, made.ID, guard)
	}
	return 0, known(err)
}

// sendInput passes the command's input on. It leaves the input of a terminal open, because
// the engine would end its output too.
func sendInput(to client.HijackedResponse, stdin io.Reader, tty bool) {
	if stdin == nil {
		return
	}
	_, _ = io.Copy(to.Conn, stdin) // it fails if the command does not read all
	if !tty {
		_ = to.CloseWrite()
	}
}

// resize sets the sizes of a terminal. Engines before version 23 do not set the first size
// by themselves, and refuse a size until the command has started.
func (d *driver) resize(ctx context.Context, execID string, first runtime.WindowSize, sizes <-chan runtime.WindowSize) {
	size := first
	var again <-chan time.Time
	for ctx.Err() == nil {
		if size != (runtime.WindowSize{}) {
			again = nil
			options := client.ExecResizeOptions{Height: uint(size.Rows), Width: uint(size.Columns)}
			if _, err := d.engine.ExecResize(ctx, execID, options); err != nil {
				again = time.After(20 * time.Millisecond)
			}
		}
		select {
		case <-ctx.Done():
		case size = <-sizes:
		case <-again:
		}
	}
}

// exitCode returns the exit code of a command whose output has ended.
func (d *driver) exitCode(ctx context.Context, execID string, guard *guard) (int, error) {
	for {
		found, err := d.engine.ExecInspect(ctx, execID, client.ExecInspectOptions{})
		switch {
		case ctx.Err() != nil:
			return 0, ctx.Err()
		case err != nil:
			return 0, known(err)
		case found.Running: // its output ended a moment before
			<-time.After(10 * time.Millisecond)
			continue
		case found.PID == 0:
			return 0, fmt.Errorf("%w: the engine could not start the command, see its output", runtime.ErrInvalid)
		}
		guard.dismiss()
		return found.ExitCode, nil
	}
}
