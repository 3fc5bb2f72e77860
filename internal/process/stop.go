package process

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

// Stop ends the sandbox's processes with SIGTERM, and after 5 seconds with SIGKILL.
func (d *Driver) Stop(ctx context.Context, sessionID string) error {
	if err := d.stop(ctx, sessionID); err != nil {
		return fmt.Errorf("process: stop %s: %w", sessionID, err)
	}
	return nil
}

// Delete ends the sandbox as Stop does, and then forgets it.
func (d *Driver) Delete(ctx context.Context, sessionID string) error {
	err := d.stop(ctx, sessionID)
	if err == nil {
		err = d.forget(sessionID)
	}
	if err != nil {
		return fmt.Errorf("process: delete %s: %w", sessionID, err)
	}
	return nil
}

func (d *Driver) stop(ctx context.Context, sessionID string) error {
	sb, err := d.known(sessionID)
	if sb == nil {
		return err
	}
	d.markStopped(sb) //nolint:contextcheck // what ended is recorded in any case
	grace := time.NewTimer(d.grace)
	defer grace.Stop()
	select {
	case <-sb.running.Done():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-grace.C:
	}
	sb.mu.Lock()
	sb.note("killed with SIGKILL, because it had not ended within %v", d.grace)
	d.signal(sb, syscall.SIGKILL)
	sb.mu.Unlock()
	select {
	case <-sb.running.Done():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// known returns the sandbox, or nil if there is none. In that case the driver refuses
// the session ID from now on.
func (d *Driver) known(sessionID string) (*sandbox, error) {
	if err := uuid.Validate(sessionID); err != nil {
		return nil, errors.Join(runtime.ErrInvalid, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed.Load() {
		return nil, fmt.Errorf("%w: the driver is closed", runtime.ErrUnavailable)
	}
	sb, ok := d.sandboxes[sessionID]
	if !ok {
		d.gone[sessionID] = past{since: time.Now(), happened: d.gone[sessionID].happened}
	}
	return sb, nil
}

// markStopped prevents the sandbox from being started, and asks it to end.
func (d *Driver) markStopped(sb *sandbox) {
	sb.mu.Lock()
	started := sb.leader.PID != 0
	if started && !sb.stopped && !sb.ended {
		sb.note("told to end with SIGTERM")
	}
	sb.stopped = true
	d.signal(sb, syscall.SIGTERM)
	sb.mu.Unlock()
	if !started && sb.running.Err() == nil {
		d.ended(sb, "stopped before it was started")
	}
}

// forget removes a stopped sandbox and all that is left of it except its ID.
func (d *Driver) forget(sessionID string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	sb, ok := d.sandboxes[sessionID]
	if !ok {
		return nil
	}
	if err := removeFiles(d.folder, sessionID); err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
	}
	sb.mu.Lock()
	d.gone[sessionID] = past{time.Now(), sb.happened}
	sb.mu.Unlock()
	delete(d.sandboxes, sessionID)
	delete(d.ports, sb.port)
	return nil
}
