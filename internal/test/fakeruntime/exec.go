package fakeruntime

import (
	"context"
	"fmt"
	"io"

	"github.com/bivouac/bivouac/runtime"
)

// ExecFunc is what a command does. Its context also ends when the sandbox does.
type ExecFunc func(ctx context.Context, command runtime.Command, streams runtime.Streams) (exitCode int, err error)

// SetExec sets what all later commands do. At first they copy their input to their output.
func (d *Driver) SetExec(f ExecFunc) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.exec = f
}

// Exec implements [runtime.Execer].
func (d *Driver) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	running, cancel := context.WithCancel(ctx)
	defer cancel()
	exec, err := d.beginExec(sessionID, &cancel)
	if err != nil {
		return 0, err
	}
	defer d.endExec(sessionID, &cancel)
	code, err := exec(running, command, streams)
	if running.Err() != nil && ctx.Err() == nil {
		return 0, fmt.Errorf("%w: it has ended", runtime.ErrNotFound)
	}
	return code, err
}

func (d *Driver) beginExec(sessionID string, cancel *context.CancelFunc) (ExecFunc, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s, ok := d.sandboxes[sessionID]
	if !ok || s.hid || s.State != runtime.StateRunning {
		return nil, fmt.Errorf("%w: %s", runtime.ErrNotFound, sessionID)
	}
	if d.execs[sessionID] == nil {
		d.execs[sessionID] = make(map[*context.CancelFunc]struct{})
	}
	d.execs[sessionID][cancel] = struct{}{}
	if d.exec == nil {
		return echo, nil
	}
	return d.exec, nil
}

func (d *Driver) endExec(sessionID string, cancel *context.CancelFunc) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.execs[sessionID], cancel)
}

func echo(_ context.Context, _ runtime.Command, streams runtime.Streams) (int, error) {
	if streams.Stdin == nil {
		return 0, nil
	}
	_, err := io.Copy(streams.Stdout, streams.Stdin)
	return 0, err
}
