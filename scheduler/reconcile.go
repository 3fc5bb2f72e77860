package scheduler

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

const (
	// reconcileInterval is how often the leading replica compares all records
	// with all sandboxes. Single changes are noted at once; this finds what
	// was missed.
	reconcileInterval = time.Minute

	// orphanGrace is how long a sandbox must have been seen without a record
	// before it is stopped. An intent is recorded before a sandbox starts, so a
	// healthy sandbox is without one only in a reader's stale view.
	orphanGrace = 30 * time.Second

	// maxKills bounds what one pass stops. More orphans than that at a time
	// are rather a sign that the records were lost than that the sandboxes leaked.
	maxKills = 16
)

// lead reconciles for as long as this replica leads, which is to hold the lock
// of the nil UUID: no chat has that one, since create refuses it. Being the only
// one saves work and is no condition of correctness: each change is made under
// its chat's lock, after looking again.
func (s *Scheduler) lead(ctx context.Context) {
	lease, err := s.Locker.Lock(ctx, uuid.Nil, reconcileInterval)
	if err != nil {
		if !errors.Is(err, ErrLockTimeout) && ctx.Err() == nil {
			s.Logger.Warn("lead_failed", "error", Kind(err), "detail", err)
		}
		return
	}
	defer s.release(ctx, lease)
	ctx, done := whileHeld(ctx, lease)
	defer done()
	s.Logger.Debug("leading")
	r := reconciler{s: s, orphans: make(map[string]time.Time)}
	_ = every(ctx, reconcileInterval, func(ctx context.Context) { // it only ends with ctx
		for name, driver := range s.Drivers {
			if err := r.pass(ctx, name, driver); err != nil && ctx.Err() == nil {
				s.Logger.Warn("reconcile_failed", "runtime", name, "error", Kind(err), "detail", err)
			}
		}
	})
}

// reconciler compares records with sandboxes, both ways.
type reconciler struct {
	s       *Scheduler
	orphans map[string]time.Time // session ID of each sandbox without a record: when it was first seen so
	known   map[string]bool      // session IDs of the sandboxes that had a record at some pass
}

// pass makes one comparison for one driver. It acts only on what two complete
// reads say: where one fails it changes nothing.
func (r *reconciler) pass(ctx context.Context, name string, driver runtime.Driver) error {
	sandboxes := make(map[string]runtime.Sandbox)
	for sandbox, err := range driver.List(ctx) {
		if err != nil {
			return fmt.Errorf("list sandboxes: %w", err)
		}
		sandboxes[sandbox.SessionID] = sandbox
	}
	recorded, err := r.noteChanges(ctx, name, sandboxes)
	if err != nil {
		return err
	}
	return r.stopOrphans(ctx, driver, sandboxes, recorded)
}

// noteChanges goes through the driver's sessions, records what became of their
// sandboxes, and returns the session IDs on record.
func (r *reconciler) noteChanges(ctx context.Context, name string, sandboxes map[string]runtime.Sandbox) (map[string]bool, error) {
	recorded := make(map[string]bool)
	query := Query{PerPage: MaxPerPage}
	for {
		page, err := r.s.Store.List(ctx, query)
		if err != nil {
			return nil, fmt.Errorf("list sessions: %w", err)
		}
		for _, session := range page.Sessions {
			id := session.SessionID.String()
			recorded[id] = true
			if session.Runtime != name {
				continue
			}
			sandbox, ok := sandboxes[id]
			if ok && sandbox.State == runtime.StateRunning && session.State == StateRunning {
				continue
			}
			if err := r.s.record(ctx, runtime.Sandbox{SessionID: id, ChatID: session.ChatID.String()}); err != nil {
				r.s.Logger.Warn("sandbox_record_failed", logArgs(session, "error", Kind(err), "detail", err)...)
			}
		}
		if page.NextToken == "" {
			return recorded, nil
		}
		query.NextToken = page.NextToken
	}
}

// stopOrphans stops sandboxes that have been without a record for a while.
func (r *reconciler) stopOrphans(ctx context.Context, driver runtime.Driver, sandboxes map[string]runtime.Sandbox, recorded map[string]bool) error {
	now := r.s.Now()
	seen, known := make(map[string]time.Time), make(map[string]bool)
	var due []runtime.Sandbox
	forgotten := 0 // of those due: how many had a record once
	for id, sandbox := range sandboxes {
		if recorded[id] || r.known[id] {
			known[id] = true
		}
		if sandbox.State == runtime.StateDead || recorded[id] {
			continue
		}
		since, ok := r.orphans[id]
		if !ok {
			since = now
		}
		seen[id] = since
		if now.Sub(since) >= orphanGrace {
			due = append(due, sandbox)
			if known[id] {
				forgotten++
			}
		}
	}
	r.orphans, r.known = seen, known
	// A session's sandbox ends before its record goes. Where sandboxes outlive
	// the last record of all, it is the records that are wrong.
	if len(recorded) == 0 && (forgotten > 0 || len(due) > maxKills) {
		return fmt.Errorf("%w: no record at all and %d sandboxes run: standing still", ErrUnavailable, len(due))
	}
	for _, sandbox := range due[:min(len(due), maxKills)] {
		if err := r.stopOrphan(ctx, driver, sandbox); err != nil && ctx.Err() == nil {
			r.s.Logger.Warn("sandbox_orphan_failed", "session_id", sandbox.SessionID,
				"container_id", sandbox.ContainerID, "error", Kind(err), "detail", err)
		}
	}
	return nil
}

// stopOrphan stops one sandbox, if under its chat's lock there is still no
// record of it.
func (r *reconciler) stopOrphan(ctx context.Context, driver runtime.Driver, sandbox runtime.Sandbox) error {
	chatID, err := uuid.Parse(sandbox.ChatID)
	if err != nil {
		return fmt.Errorf("%w: chat ID %q of a sandbox: %w", ErrInvalid, sandbox.ChatID, err)
	}
	lease, err := r.s.Locker.Lock(ctx, chatID, LockWait)
	if err != nil {
		return err
	}
	defer r.s.release(ctx, lease)
	ctx, done := underLock(ctx, lease)
	defer done()
	if current := lease.Session(); current != nil && current.SessionID.String() == sandbox.SessionID {
		return nil
	}
	if err := driver.Delete(ctx, sandbox.SessionID); err != nil {
		return runtimeError(ctx, "stop an orphan", err)
	}
	r.s.Logger.Info("sandbox_orphan_stopped", "chat_id", sandbox.ChatID,
		"session_id", sandbox.SessionID, "container_id", sandbox.ContainerID)
	return nil
}
