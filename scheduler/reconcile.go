package scheduler

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/attribute"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/runtime"
)

const (
	// reconcileInterval is how often the leader compares all records with all
	// sandboxes. Single changes are recorded as they happen; this finds what was
	// missed.
	reconcileInterval = time.Minute

	// orphanGrace is how long a sandbox must have been seen without a record before the
	// leader acts on it. The intent is recorded before a sandbox starts, so a healthy
	// sandbox lacks a record only in a reader's stale view.
	orphanGrace = 30 * time.Second

	// passLockWait is how long a pass waits for a chat's lock. The lock's holder works
	// on the chat, and the next pass looks again.
	passLockWait = time.Second
)

// lead reconciles for as long as this replica is the leader. The leader holds the lock
// for the nil UUID, which no chat has because create refuses it. A single leader saves
// work; correctness does not depend on it. Each change is made under its chat's lock,
// after another look. Only pools would never come to rest with two leaders, so filling
// them checks the lock.
func (s *Scheduler) lead(ctx context.Context) error {
	lease, err := s.Locker.Lock(ctx, uuid.Nil, reconcileInterval)
	if errors.Is(err, ErrLockTimeout) {
		return nil // another replica leads
	}
	if err != nil {
		return err
	}
	defer s.release(ctx, lease)
	ctx, done := whileHeld(ctx, lease)
	defer done()
	s.Logger.Debug("leading")
	s.metrics.leader.Record(ctx, 1)
	defer s.metrics.leader.Record(ctx, 0)
	defer s.findings.clear()
	var g errgroup.Group // so that no runtime waits for another
	for name, driver := range s.Drivers {
		r := &reconciler{s: s, name: name, driver: driver}
		g.Go(func() error {
			return every(ctx, reconcileInterval, func(ctx context.Context) {
				if err := r.pass(ctx); err != nil && ctx.Err() == nil {
					s.Logger.Warn("reconcile_failed", "runtime", r.name, "error", Kind(err), "detail", err)
				}
			})
		})
	}
	g.Go(func() error { return s.fillPools(ctx, lease) })
	_ = g.Wait() // they only end with ctx
	return nil
}

// reconciler compares all records with one driver's sandboxes, and the other way round.
type reconciler struct {
	s      *Scheduler
	name   string
	driver runtime.Driver

	// Results of the last pass, by session ID:
	orphans  map[string]time.Time // when each sandbox was first seen without a record
	inFlight map[string]bool      // sessions in flight
}

// comparison is the result of comparing two complete reads.
type comparison struct {
	orphans  []found   // sandboxes that are not dead and have no record
	changed  []Session // sessions whose sandboxes are not as recorded
	overdue  []Session // sessions that should have been settled or cleaned up by now
	inFlight map[string]bool
	damaged  []DamagedRecord
}

// pass makes one comparison and acts on it. If one of the two reads fails, pass changes
// nothing.
func (r *reconciler) pass(ctx context.Context) error {
	c, err := r.compare(ctx)
	if err != nil {
		return err
	}
	r.inFlight = c.inFlight
	problems := r.resolveOrphans(ctx, c.orphans)
	if ctx.Err() == nil {
		r.s.findings.set(r.name, c.damaged, problems)
		r.s.reportNewerRecords(c.damaged)
	}
	r.noteChanges(ctx, c.changed)
	r.s.metrics.passSucceeded(ctx, "reconcile", attribute.String("runtime", r.name))
	r.catchUp(ctx, c.overdue) // last, as it may take long
	return nil
}

// scanRate is how many records a leader reads per second to compare them. A million
// records take a minute, so the comparison costs Consul the same at any time.
const scanRate = 1_000_000 / 60

// pace waits so that records are read at scanRate at most.
func (r *reconciler) pace(ctx context.Context, records int) error {
	return backoff.Sleep(ctx, time.Duration(records)*time.Second/scanRate)
}

// compare reads the driver's sandboxes and then all records.
func (r *reconciler) compare(ctx context.Context) (comparison, error) {
	sandboxes := newListing()
	for sandbox, err := range r.driver.List(ctx) {
		if err != nil {
			return comparison{}, fmt.Errorf("list sandboxes: %w", err)
		}
		sandboxes.add(sandbox)
	}
	// Spares are read before the records: one that is claimed in between has a record then.
	spares, _, err := r.s.Store.Spares(ctx, Block{})
	if err != nil {
		return comparison{}, fmt.Errorf("list spares: %w", err)
	}
	for _, spare := range spares {
		sandboxes.dropSpare(spare.SessionID)
	}
	c := comparison{inFlight: make(map[string]bool)}
	for shard := 0; shard < Shards; {
		part, next, err := r.s.Store.Scan(ctx, shard)
		if err == nil && next < Shards {
			err = r.pace(ctx, len(part.Sessions))
		}
		if err != nil {
			return comparison{}, fmt.Errorf("list sessions: %w", err)
		}
		shard = next
		c.damaged = append(c.damaged, part.Damaged...)
		for _, session := range part.Sessions {
			sandbox, ok := sandboxes.take(session)
			if session.Runtime == r.name {
				r.classify(session, sandbox, ok, &c)
			}
		}
	}
	newer := make(map[string]bool) // chats whose records only newer replicas can read
	for _, record := range c.damaged {
		newer[record.ChatID.String()] = errors.Is(record.Err, ErrNewerRecord)
	}
	for _, sandbox := range r.lookAtRest(ctx, sandboxes) {
		if !newer[sandbox.ChatID] {
			c.orphans = append(c.orphans, found{sandbox, r.name, r.driver})
		}
	}
	return c, ctx.Err()
}

// lookAtRest returns the sandboxes of a listing that have no record and still run. Those
// whose sessions ended while the records were read have gone by now. A sandbox that
// cannot be looked at is returned as far as it is known.
func (r *reconciler) lookAtRest(ctx context.Context, sandboxes listing) []runtime.Sandbox {
	var mu sync.Mutex // guards rest
	var rest []runtime.Sandbox
	var g errgroup.Group
	g.SetLimit(workers)
	for listed := range sandboxes.rest() {
		g.Go(func() error {
			sandbox, err := r.driver.Inspect(ctx, listed.SessionID)
			if err != nil && !errors.Is(err, runtime.ErrNotFound) {
				sandbox, err = listed, nil
			}
			if err == nil && sandbox.State != runtime.StateDead {
				mu.Lock()
				defer mu.Unlock()
				rest = append(rest, sandbox)
			}
			return nil
		})
	}
	_ = g.Wait() // its functions return no error
	return rest
}

// classify adds a session of this driver to the comparison if something has to be done
// about it. It uses only the two reads and does not ask the store again.
func (r *reconciler) classify(session Session, sandbox runtime.Sandbox, known bool, c *comparison) {
	id := session.SessionID.String()
	if !session.Settled() {
		c.inFlight[id] = true
	}
	var err error
	if !known {
		err = runtime.ErrNotFound
	}
	switch {
	case r.isOverdue(session):
		c.overdue = append(c.overdue, session)
	case session.mayChange() && seenAs(session, sandbox, err).State != session.State:
		c.changed = append(c.changed, session)
	}
}

// isOverdue reports whether a session should have been settled or cleaned up by now.
// The store's own lists of those may be incomplete, for example if an index is damaged.
func (r *reconciler) isOverdue(session Session) bool {
	if !session.Settled() {
		return r.inFlight[session.SessionID.String()]
	}
	return session.Expired(r.s.Now().Add(-max(reconcileInterval, 2*r.s.CleanupInterval)))
}

// noteChanges records what happened to sandboxes, if that is still true under the
// chat's lock.
func (r *reconciler) noteChanges(ctx context.Context, changed []Session) {
	var g errgroup.Group
	g.SetLimit(maxHeld)
	for _, session := range changed {
		g.Go(func() error {
			sandbox := runtime.Sandbox{SessionID: session.SessionID.String(), ChatID: session.ChatID.String()}
			err := r.s.record(ctx, sandbox, passLockWait)
			if err != nil && !isUnderWay(err) && ctx.Err() == nil {
				r.s.journal.note(ctx, Event{Type: EventRecordFailed, Before: &session, Err: err})
			}
			return nil
		})
	}
	_ = g.Wait() // its functions return no error
}

// isUnderWay reports whether an operation failed because another one works on the chat.
func isUnderWay(err error) bool { return errors.Is(err, ErrLockTimeout) || errors.Is(err, ErrBusy) }

// catchUp settles or cleans up overdue sessions, if they are still overdue under their
// chat's lock.
func (r *reconciler) catchUp(ctx context.Context, overdue []Session) {
	var g errgroup.Group
	g.SetLimit(workers)
	for _, session := range overdue {
		g.Go(func() error {
			if session.Settled() {
				_, _ = r.s.cleanupOne(ctx, session, passLockWait) // it has logged and counted its error
			} else {
				r.s.settleOne(ctx, session)
			}
			return nil
		})
	}
	_ = g.Wait() // its functions return no error
}

// resolveOrphans adopts or stops the sandboxes that have had no record for orphanGrace.
// It returns those that it could neither adopt nor stop.
func (r *reconciler) resolveOrphans(ctx context.Context, orphans []found) []Orphan {
	now := r.s.Now()
	seen := make(map[string]time.Time)
	var due []found
	for _, orphan := range orphans {
		since, ok := r.orphans[orphan.SessionID]
		if !ok {
			since = now
			r.s.journal.note(ctx, Event{Type: EventOrphanFound, Before: orphan.session()})
		}
		seen[orphan.SessionID] = since
		if now.Sub(since) >= orphanGrace {
			due = append(due, orphan)
		}
	}
	r.orphans = seen
	_, left := r.s.resolveAll(ctx, due, passLockWait)
	left = slices.DeleteFunc(left, func(o Orphan) bool { return o.err == nil }) // stopped
	for i := range left {
		left[i].since = seen[left[i].SessionID]
		if !isUnderWay(left[i].err) && ctx.Err() == nil {
			r.s.journal.note(ctx, Event{Type: EventOrphanFailed, Before: left[i].found.session(), Err: left[i].err})
		}
	}
	return left
}

// Orphan is a sandbox without a record that was not adopted.
type Orphan struct {
	Runtime     string
	SessionID   string // as the runtime says
	ChatID      string // as the runtime says
	ContainerID string
	Reason      string // why it was not adopted, and what was done or can be done

	found found
	err   error     // nil: it was stopped
	since time.Time // when it was first seen without a record
}

// resolveAll adopts or stops sandboxes that have no record. It works on many chats at a
// time. Within one chat it takes the newest sandbox first. wait is how long each waits
// for its chat's lock.
func (s *Scheduler) resolveAll(ctx context.Context, orphans []found, wait time.Duration) (adopted []Session, left []Orphan) {
	byChat := make(map[string][]found)
	for _, orphan := range orphans {
		key := cmp.Or(orphan.ChatID, orphan.SessionID) // a spare has no chat
		byChat[key] = append(byChat[key], orphan)
	}
	var mu sync.Mutex // guards the results
	g := newSettlers()
	for _, chat := range slices.Sorted(maps.Keys(byChat)) {
		orphans := slices.SortedFunc(slices.Values(byChat[chat]), newestFirst)
		g.Go(func() error {
			for _, orphan := range orphans {
				session, remains := s.resolveOne(ctx, orphan, wait)
				mu.Lock()
				if session != nil {
					adopted = append(adopted, *session)
				}
				if remains != nil {
					left = append(left, *remains)
				}
				mu.Unlock()
			}
			return nil
		})
	}
	_ = g.Wait() // its functions return no error
	slices.SortFunc(adopted, func(a, b Session) int { return strings.Compare(a.ChatID.String(), b.ChatID.String()) })
	slices.SortFunc(left, func(a, b Orphan) int {
		return cmp.Or(strings.Compare(a.ChatID, b.ChatID), strings.Compare(a.SessionID, b.SessionID))
	})
	return adopted, left
}

func (s *Scheduler) resolveOne(ctx context.Context, orphan found, wait time.Duration) (*Session, *Orphan) {
	adopted, stopped, err := s.resolve(ctx, orphan, wait)
	if err == nil && stopped == "" {
		return adopted, nil
	}
	left := &Orphan{
		Runtime: orphan.name, SessionID: orphan.SessionID, ChatID: orphan.ChatID,
		ContainerID: orphan.ContainerID, Reason: "stopped: " + stopped, found: orphan, err: err,
	}
	if err != nil {
		left.Reason = err.Error()
	}
	return nil, left
}

// resolve adopts or stops one sandbox, if it still has no record under its chat's lock.
// It returns the adopted session, or why the sandbox was stopped, or an error that says
// why it was left alone. It returns none of them if nothing has to be done any more.
func (s *Scheduler) resolve(ctx context.Context, orphan found, wait time.Duration) (adopted *Session, stopped string, err error) {
	if orphan.ChatID == "" && orphan.Pool != "" {
		stopped, err := s.endStraySpare(ctx, orphan)
		return nil, stopped, err
	}
	chatID, err := uuid.Parse(orphan.ChatID)
	if err != nil || checkChatID(chatID) != nil { // the leader holds the lock for the nil UUID
		return nil, "", fmt.Errorf("%w: %q is no chat's ID: Bivouac did not make this sandbox; end it in runtime %s, as container %s",
			ErrInvalid, orphan.ChatID, orphan.name, orphan.ContainerID)
	}
	lease, err := s.Locker.Lock(ctx, chatID, wait)
	if errors.Is(err, ErrDamaged) {
		return nil, "", fmt.Errorf("%w: run: bivouac operator repair %s", err, chatID)
	}
	if err != nil {
		return nil, "", err
	}
	defer s.release(ctx, lease)
	ctx, done := s.underLock(ctx, lease)
	defer done()
	ctx, cancel := context.WithTimeout(ctx, undoLimit) // so that the chat is not locked for long
	defer cancel()

	orphan.Sandbox, err = lookAgain(ctx, orphan)
	switch {
	case errors.Is(err, runtime.ErrNotFound):
		return nil, "", nil // it has ended in the meantime
	case err != nil:
		return nil, "", runtimeError(ctx, "look at a sandbox without a record", err)
	}
	current := lease.Session()
	switch {
	case current == nil:
		return s.resolveUnrecorded(ctx, lease, orphan)
	case current.SessionID.String() == orphan.SessionID:
		return nil, "", nil
	}
	alive, err := s.isAlive(ctx, *current)
	switch {
	case err != nil:
		return nil, "", err
	case alive:
		stopped = fmt.Sprintf("the chat has session %s", current.SessionID)
		return nil, stopped, s.endOrphan(ctx, lease, orphan)
	case !current.Settled():
		return nil, "", fmt.Errorf("%w: its chat's session %s is %s", ErrBusy, current.SessionID, current.State)
	}
	// The record was edited or restored from an old state. That is no reason to stop
	// the sandbox.
	return nil, "", fmt.Errorf("%w: the record of chat %s names session %s, which does not run: create the chat again, or run: bivouac operator repair %s",
		ErrDamaged, chatID, current.SessionID, chatID)
}

// lookAgain returns the sandbox as its driver sees it now, or ErrNotFound if it is
// dead.
func lookAgain(ctx context.Context, orphan found) (runtime.Sandbox, error) {
	finder, ok := orphan.driver.(runtime.ChatFinder)
	if !ok {
		sandbox, err := orphan.driver.Inspect(ctx, orphan.SessionID)
		if err == nil && sandbox.State == runtime.StateDead {
			err = runtime.ErrNotFound
		}
		return sandbox, err
	}
	sandboxes, err := finder.FindChat(ctx, orphan.ChatID, "")
	if err != nil {
		return runtime.Sandbox{}, err
	}
	for _, sandbox := range sandboxes {
		if sandbox.SessionID == orphan.SessionID {
			return sandbox, nil
		}
	}
	return runtime.Sandbox{}, runtime.ErrNotFound
}

// resolveUnrecorded adopts or stops a sandbox whose chat has no record.
func (s *Scheduler) resolveUnrecorded(ctx context.Context, lease Lease, orphan found) (adopted *Session, stopped string, err error) {
	why := whyNotAdopted(orphan.Sandbox)
	switch {
	case why == nil: // safeguard: adoption of what lost its record
		session, err := s.adopt(ctx, lease, orphan, Release)
		if err != nil {
			return nil, "", err
		}
		return &session, "", nil
	case isLate(orphan.Sandbox), isAbandoned(orphan.Sandbox, s.now()):
		return nil, why.Error(), s.endOrphan(ctx, lease, orphan)
	case errors.Is(why, ErrInvalid):
		return nil, "", fmt.Errorf("it cannot be adopted: %w; delete the chat's session to end it: bivouac session delete %s", why, orphan.ChatID)
	default:
		return nil, "", fmt.Errorf("it cannot be adopted yet: %w", why)
	}
}

// isAbandoned reports whether a sandbox has been starting for longer than any create
// waits. No caller has received such a sandbox.
func isAbandoned(sandbox runtime.Sandbox, now time.Time) bool {
	return sandbox.State == runtime.StateStarting && !sandbox.CreatedAt.IsZero() && now.Sub(sandbox.CreatedAt) > operationLimit
}
