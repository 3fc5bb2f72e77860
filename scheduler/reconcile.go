package scheduler

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

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
func (s *Scheduler) lead(ctx context.Context) error {
	lease, err := s.Locker.Lock(ctx, uuid.Nil, reconcileInterval)
	if errors.Is(err, ErrLockTimeout) {
		return nil // another one leads
	}
	if err != nil {
		return err
	}
	defer s.release(ctx, lease)
	ctx, done := whileHeld(ctx, lease)
	defer done()
	s.Logger.Debug("leading")
	var reconcilers []*reconciler
	for name, driver := range s.Drivers {
		reconcilers = append(reconcilers, &reconciler{s: s, name: name, driver: driver})
	}
	var g errgroup.Group // no runtime waits for another
	for _, r := range reconcilers {
		g.Go(func() error {
			return every(ctx, reconcileInterval, func(ctx context.Context) {
				if err := r.pass(ctx); err != nil && ctx.Err() == nil {
					s.Logger.Warn("reconcile_failed", "runtime", r.name, "error", Kind(err), "detail", err)
				}
			})
		})
	}
	_ = g.Wait() // every only ends with ctx
	return nil
}

// reconciler compares records with one driver's sandboxes, both ways.
type reconciler struct {
	s      *Scheduler
	name   string
	driver runtime.Driver

	// Of the last pass, by session ID:
	orphans  map[string]time.Time // sandboxes without a record: when they were first seen so, or last not to be stopped
	known    map[string]bool      // sandboxes that had a record at some pass
	inFlight map[string]bool      // sessions in flight
}

// pass makes one comparison. It acts only on what two complete reads say: where
// one fails it changes nothing.
func (r *reconciler) pass(ctx context.Context) error {
	sandboxes := make(map[string]runtime.Sandbox)
	for sandbox, err := range r.driver.List(ctx) {
		if err != nil {
			return fmt.Errorf("list sandboxes: %w", err)
		}
		sandboxes[sandbox.SessionID] = sandbox
	}
	recorded, overdue, err := r.noteChanges(ctx, sandboxes)
	if err != nil {
		return err
	}
	err = r.stopOrphans(ctx, sandboxes, recorded)
	r.catchUp(ctx, overdue) // last, as it may take long
	return err
}

// noteChanges goes through the driver's sessions, and records what became of
// their sandboxes. It returns the session IDs on record, and the sessions that
// are overdue.
func (r *reconciler) noteChanges(ctx context.Context, sandboxes map[string]runtime.Sandbox) (recorded map[string]bool, overdue []Session, err error) {
	recorded = make(map[string]bool)
	inFlight := make(map[string]bool)
	query := Query{PerPage: MaxPerPage}
	for {
		page, err := r.s.Store.List(ctx, query)
		if err != nil {
			return nil, nil, fmt.Errorf("list sessions: %w", err)
		}
		for _, session := range page.Sessions {
			id := session.SessionID.String()
			recorded[id] = true
			if session.Runtime != r.name {
				continue
			}
			inFlight[id] = !session.Settled()
			if r.isOverdue(session) {
				overdue = append(overdue, session)
				continue
			}
			sandbox, ok := sandboxes[id]
			if ok && sandbox.State == runtime.StateRunning && session.State == StateRunning {
				continue
			}
			if err := r.s.record(ctx, runtime.Sandbox{SessionID: id, ChatID: session.ChatID.String()}, LockWait); err != nil {
				r.s.Logger.Warn("sandbox_record_failed", logArgs(session, "error", Kind(err), "detail", err)...)
			}
		}
		if page.NextToken == "" {
			r.inFlight = inFlight
			return recorded, overdue, nil
		}
		query.NextToken = page.NextToken
	}
}

// isOverdue says whether a session should have been settled or cleaned up by
// now: what the store lists of those may lack one, as by a damaged index.
func (r *reconciler) isOverdue(session Session) bool {
	if !session.Settled() {
		return r.inFlight[session.SessionID.String()]
	}
	return session.Expired(r.s.Now().Add(-max(reconcileInterval, 2*r.s.CleanupInterval)))
}

// catchUp does what is overdue, where it still is under the chat's lock.
func (r *reconciler) catchUp(ctx context.Context, overdue []Session) {
	var g errgroup.Group
	g.SetLimit(workers)
	for _, session := range overdue {
		g.Go(func() error {
			if session.Settled() {
				_, _ = r.s.cleanupOne(ctx, session) // it has logged and counted its error
			} else {
				r.s.settleOne(ctx, session)
			}
			return nil
		})
	}
	_ = g.Wait() // its functions return no error
}

// stopOrphans stops sandboxes that have been without a record for a while.
func (r *reconciler) stopOrphans(ctx context.Context, sandboxes map[string]runtime.Sandbox, recorded map[string]bool) error {
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
	// A session's sandbox ends before its record goes. Where more sandboxes
	// outlive their records than there are records left, as when the store was set
	// back to an old state, it is the records that are wrong.
	if forgotten > len(recorded) || len(recorded) == 0 && len(due) > maxKills {
		return fmt.Errorf("%w: %d records, and %d sandboxes run without one, of which %d had one: standing still",
			ErrUnavailable, len(recorded), len(due), forgotten)
	}
	slices.SortFunc(due, func(a, b runtime.Sandbox) int { // those first that were left alone longest
		return cmp.Or(seen[a.SessionID].Compare(seen[b.SessionID]), cmp.Compare(a.SessionID, b.SessionID))
	})
	for _, sandbox := range due[:min(len(due), maxKills)] {
		if err := r.stopOrphan(ctx, sandbox); err != nil && ctx.Err() == nil {
			seen[sandbox.SessionID] = now // after the others, which it must not keep waiting
			r.s.Logger.Warn("sandbox_orphan_failed", "session_id", sandbox.SessionID,
				"container_id", sandbox.ContainerID, "error", Kind(err), "detail", err)
		}
	}
	return nil
}

// stopOrphan stops one sandbox, if under its chat's lock there is still no
// record of it. A record that names another chat's session was edited by hand,
// and may have been this sandbox's: nothing is stopped on its word.
func (r *reconciler) stopOrphan(ctx context.Context, sandbox runtime.Sandbox) error {
	chatID, err := uuid.Parse(sandbox.ChatID)
	if err != nil {
		return fmt.Errorf("%w: chat ID %q of a sandbox: %w", ErrInvalid, sandbox.ChatID, err)
	}
	lease, err := r.s.Locker.Lock(ctx, chatID, LockWait)
	if err != nil {
		return err
	}
	defer r.s.release(ctx, lease)
	ctx, done := r.s.underLock(ctx, lease)
	defer done()
	ctx, cancel := context.WithTimeout(ctx, undoLimit) // not to keep the others waiting
	defer cancel()
	if current := lease.Session(); current != nil {
		if current.SessionID.String() == sandbox.SessionID {
			return nil
		}
		driver, err := r.s.driver(current.Runtime)
		if err != nil {
			return err
		}
		if err := checkChat(ctx, driver, *current); err != nil {
			return err
		}
	}
	if err := r.driver.Delete(ctx, sandbox.SessionID); err != nil {
		return runtimeError(ctx, "stop an orphan", err)
	}
	r.s.Logger.Info("sandbox_orphan_stopped", "chat_id", sandbox.ChatID,
		"session_id", sandbox.SessionID, "container_id", sandbox.ContainerID)
	return nil
}
