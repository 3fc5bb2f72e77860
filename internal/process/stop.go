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

// Stop ends the sandbox's processes with SIGTERM, and with SIGKILL if that does
// not help within 5 seconds.
func (d *Driver) Stop(ctx context.Context, sessionID string) error {
	if err := d.stop(ctx, sessionID); err != nil {
		return fmt.Errorf("process: stop %s: %w", sessionID, err)
	}
	return nil
}

// Delete does as Stop does and forgets the sandbox.
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
	if err := d.markStopped(sb); err != nil {
		return err
	}
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
	d.signal(sb, syscall.SIGKILL)
	sb.mu.Unlock()
	select {
	case <-sb.running.Done():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// known returns the sandbox, or nil where there is none: then the session ID
// is refused from now on.
func (d *Driver) known(sessionID string) (*sandbox, error) {
	if err := uuid.Validate(sessionID); err != nil {
		return nil, errors.Join(runtime.ErrInvalid, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed.Load() {
		return nil, fmt.Errorf("%w: the driver is closed", runtime.ErrUnavailable)
	}
	if sb, ok := d.sandboxes[sessionID]; ok {
		return sb, nil
	}
	if _, gone := d.gone[sessionID]; gone {
		return nil, nil
	}
	return nil, d.markGone(sessionID, time.Now())
}

// markStopped writes down that the sandbox is stopped, so that it is not
// started any more, and then asks it to end.
func (d *Driver) markStopped(sb *sandbox) error {
	sb.mu.Lock()
	if !sb.record.Stopped {
		next := sb.record
		next.Stopped = true
		if err := d.save(next); err != nil {
			sb.mu.Unlock()
			return err
		}
		sb.record = next
	}
	started := sb.record.PID != 0
	d.signal(sb, syscall.SIGTERM)
	sb.mu.Unlock()
	if !started && sb.running.Err() == nil {
		d.ended(sb, "stopped before it was started")
	}
	return nil
}

// forget removes a stopped sandbox and all that is left of it but its ID.
func (d *Driver) forget(sessionID string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	sb, ok := d.sandboxes[sessionID]
	if !ok {
		return nil
	}
	if err := d.markGone(sessionID, time.Now()); err != nil {
		return err
	}
	sb.mu.Lock()
	port := sb.record.Port
	sb.mu.Unlock()
	delete(d.sandboxes, sessionID)
	delete(d.ports, port)
	return d.removeFiles(sessionID)
}
