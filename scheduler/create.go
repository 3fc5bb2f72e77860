package scheduler

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/attribute"

	"github.com/bivouac/bivouac/runtime"
)

// CreateCommand is the input of [Scheduler.Create].
type CreateCommand struct {
	ChatID         uuid.UUID
	AgentID        string
	VolumeHostPath string
	Runtime        string              // empty: that of the existing session, or the default
	TTL            time.Duration       // 0: the default
	Labels         map[string]string   // of a new session; nil: none, and an existing session may have any
	Progress       func(runtime.Stage) // receives the stages of a start; may be nil
}

// Result is what a create did to return its session.
type Result string

// The results of a create that succeeds.
const (
	ResultCreated  Result = "created"
	ResultReplaced Result = "replaced" // the chat had a session that expired or whose sandbox ended
	ResultReused   Result = "reused"
)

// CreateResult is a running session, and what the create did to return it.
type CreateResult struct {
	Result  Result
	Session Session
}

// Create returns the chat's session with its sandbox ready: the existing session, or a
// new one. It returns a *ConflictError if the existing session has another AI agent or
// volume, another runtime than the one that cmd names, or other labels than those in
// cmd. It returns ErrPermissionDenied instead if the caller may not see that session. A
// reuse does not change the expiry. A replacement has the labels of cmd, not
// those of the session that it replaces.
func (s *Scheduler) Create(ctx context.Context, cmd CreateCommand) (CreateResult, error) {
	ctx, span := s.startSpan(ctx, "usecase.create_sandbox", chatAttr(cmd.ChatID),
		attribute.String("agent.id", cmd.AgentID),
		attribute.String("volume.host_path", cmd.VolumeHostPath))
	defer span.End()

	defer s.metrics.begin(ctx, "create")()
	began := time.Now()
	event, err := s.create(ctx, cmd)
	if err = s.shuttingDown(err); err != nil {
		event.Type, event.Err = EventCreateFailed, err
	}
	event.ChatID, event.Asked, event.Took = cmd.ChatID, &cmd, time.Since(began)
	s.journal.note(ctx, event)
	switch {
	case err != nil:
		return CreateResult{}, err
	case event.Type == EventConflict:
		s.noteConflict(ctx, *event.After, event.Reason)
		return CreateResult{}, &ConflictError{Session: *event.After, Reason: event.Reason}
	}
	return CreateResult{Result: Result(event.Result()), Session: *event.After}, nil
}

// create returns the event for the outcome of the command. If it fails, the event names
// the session that it had begun to create or to replace, if any.
func (s *Scheduler) create(ctx context.Context, cmd CreateCommand) (Event, error) {
	if err := s.checkCreate(cmd); err != nil {
		return Event{}, err
	}
	caller := CallerFrom(ctx)
	allowed, ttl, err := caller.mayCreate(cmd, cmp.Or(cmd.TTL, s.TTL))
	if err != nil {
		return Event{}, fmt.Errorf("create: %w", err)
	}
	cmd.TTL = ttl
	if cmd.Progress == nil {
		cmd.Progress = func(runtime.Stage) {}
	}
	until := time.Now().Add(LockWait)
	standing, leave, err := s.standing(ctx, caller, cmd.ChatID, until)
	if err != nil {
		return Event{}, fmt.Errorf("create: %w", err)
	}
	if standing != nil {
		return reuseOrConflict(cmd, *standing), nil
	}
	defer leave(true) // those that wait look for themselves

	lease, err := s.lock(ctx, cmd.ChatID, time.Until(until))
	if err != nil {
		return Event{}, fmt.Errorf("create: %w", err)
	}
	defer s.release(ctx, lease)
	ctx, done := s.underLock(ctx, lease)
	defer done()

	if err := mayTake(caller, lease.Session()); err != nil {
		return Event{}, fmt.Errorf("create: %w", err)
	}
	seen := s.observeLeased(ctx, lease)
	if seen == nil || !s.stands(*seen) {
		done, err := s.reclaim(ctx, lease, cmd.ChatID, s.chatFinders())
		if err != nil {
			return Event{}, fmt.Errorf("create: %w", err)
		}
		if done.adopted {
			if err := mayTake(caller, lease.Session()); err != nil {
				return Event{}, fmt.Errorf("create: %w", err)
			}
			seen = s.observeLeased(ctx, lease)
		}
	}
	if seen != nil && s.stands(*seen) {
		return reuseOrConflict(cmd, *seen), nil
	}
	return s.createOrReplace(ctx, cmd, allowed, lease, seen)
}

// mayTake returns ErrPermissionDenied if the caller may not see the chat's session. A
// create must then neither return nor replace it.
func mayTake(caller Caller, current *Session) error {
	if current == nil || caller.May(CapRead, current.AgentID) {
		return nil
	}
	return fmt.Errorf("%w: the chat belongs to an AI agent that %q may not see", ErrPermissionDenied, caller.Name)
}

// observeLeased returns the lease's session as its driver sees it now, or nil if the
// chat has none.
func (s *Scheduler) observeLeased(ctx context.Context, lease Lease) *Session {
	current := lease.Session()
	if current == nil {
		return nil
	}
	return new(s.observe(ctx, *current))
}

// standing returns the chat's session if it can be reused. Otherwise it returns leave,
// and the caller is the only one in this replica that may create the chat's session.
// The caller must call leave when its create has ended. If the caller may not see the
// chat's session, standing returns ErrPermissionDenied at once.
func (s *Scheduler) standing(ctx context.Context, caller Caller, chatID uuid.UUID, until time.Time) (session *Session, leave func(bool), err error) {
	for leave == nil {
		// Most creates find a session that can be reused. A linearizable read is enough
		// for those, and for creates that have waited for another one. They need no
		// lock.
		current, _, err := s.Store.Get(ctx, chatID, Block{})
		if err != nil {
			return nil, nil, err
		}
		if err := mayTake(caller, current); err != nil {
			return nil, nil, err
		}
		if current != nil {
			if seen := s.observe(ctx, *current); s.stands(seen) {
				return &seen, nil, nil
			}
		}
		if leave, _, err = s.creating.enter(ctx, s.ending, chatID, until); err != nil {
			return nil, nil, err
		}
	}
	return nil, leave, nil
}

// stands reports whether create may return the session: it runs and has not expired.
func (s *Scheduler) stands(session Session) bool {
	return session.State == StateRunning && !session.Expired(s.Now())
}

func reuseOrConflict(cmd CreateCommand, session Session) Event {
	if reason := conflictReason(session, cmd); reason != "" {
		return Event{Type: EventConflict, After: &session, Reason: reason}
	}
	return Event{Type: EventReused, After: &session}
}

// conflictReason returns the fields in which the session differs from cmd, joined with
// commas. If cmd names no runtime, any runtime matches: the default may differ between
// replicas and change while a session exists. If cmd has no labels, any labels match.
func conflictReason(session Session, cmd CreateCommand) string {
	var fields []string
	if session.AgentID != cmd.AgentID {
		fields = append(fields, "agent_id")
	}
	if session.VolumeHostPath != cmd.VolumeHostPath {
		fields = append(fields, "volume_host_path")
	}
	if cmd.Runtime != "" && session.Runtime != cmd.Runtime {
		fields = append(fields, "runtime")
	}
	if cmd.Labels != nil && !maps.Equal(session.Labels, cmd.Labels) {
		fields = append(fields, "labels")
	}
	return strings.Join(fields, ",")
}

func (s *Scheduler) createOrReplace(ctx context.Context, cmd CreateCommand, allowed grants, lease Lease, current *Session) (Event, error) {
	name := cmp.Or(cmd.Runtime, s.DefaultRuntime)
	driver, err := s.driver(name)
	if err != nil {
		return Event{}, fmt.Errorf("create: %w", err)
	}

	next := Session{
		SessionID:      uuid.New(),
		ChatID:         cmd.ChatID,
		AgentID:        cmd.AgentID,
		VolumeHostPath: cmd.VolumeHostPath,
		Runtime:        name,
		State:          StateCreating,
		Owner:          CallerFrom(ctx).Name,
		AccessToken:    newAccessToken(),
	}
	if len(cmd.Labels) > 0 {
		next.Labels = maps.Clone(cmd.Labels)
	}
	event := Event{Type: EventCreated, After: &next}
	var changes []Change
	switch {
	case current == nil:
	case !CallerFrom(ctx).May(CapWrite, current.AgentID):
		return Event{}, fmt.Errorf("create: %w: %q may not replace the session of agent_id %q", ErrPermissionDenied, CallerFrom(ctx).Name, current.AgentID)
	case current.State == StateCreating:
		// An earlier create began this and did not finish. Its caller got no session.
		if err := s.undoIntent(ctx, lease, *current); err != nil {
			return Event{}, fmt.Errorf("create: %w", err)
		}
		changes = append(changes, s.succession(ctx, *current))
	default:
		event.Before = current
		if err := s.stopPrevious(ctx, lease, *current); err != nil {
			return event, fmt.Errorf("replace: %w", err)
		}
		changes = append(changes, s.succession(ctx, *current))
	}
	leave, err := s.starting.Enter()
	if err != nil {
		return event, fmt.Errorf("create: %w", err)
	}
	defer leave()

	counted, err := s.takeQuota(ctx, allowed, current)
	if err != nil {
		return event, fmt.Errorf("create: %w", err)
	}
	next.CreatedAt = s.now()
	next.ExpiresAt = next.CreatedAt.Add(cmd.TTL)
	err = s.writeIntent(ctx, lease, driver, &next, changes)
	counted()
	if err != nil {
		return event, fmt.Errorf("create: write the intent: %w", err)
	}
	if err := s.start(ctx, lease, driver, &next, cmd.Progress); err != nil {
		if _, inDoubt := errors.AsType[inDoubtError](err); !inDoubt {
			s.abandon(ctx, driver.Delete, lease, next, err)
		}
		return event, fmt.Errorf("create: %w", err)
	}
	// The TTL counts from when the sandbox is ready. Otherwise a session whose start
	// took longer than the TTL would be expired when it is returned.
	next.ExpiresAt = s.now().Add(cmd.TTL)
	if err := s.save(ctx, driver, lease, next); err != nil {
		return event, fmt.Errorf("create: write the session: %w", err)
	}
	return event, nil
}

// stopPrevious ends the sandbox of a session that is about to be replaced. It returns
// once the sandbox is gone.
func (s *Scheduler) stopPrevious(ctx context.Context, lease Lease, previous Session) error {
	driver, err := s.driver(previous.Runtime)
	if err != nil {
		return err
	}
	known, err := isKnown(ctx, driver, previous)
	if err != nil {
		return err
	}
	leave, err := s.replacing.Enter()
	if err != nil {
		return err
	}
	defer leave()
	s.journal.note(ctx, Event{Type: EventReplaced, Before: &previous, Reason: previous.Reason})
	if err := markStopping(ctx, lease, known); err != nil {
		return err
	}
	return endSandbox(ctx, lease, driver, runtime.Driver.Stop, previous, known)
}

// markStopping records that the lease's session is about to be stopped. If the driver
// does not know the sandbox, it also records what the stop waits for.
func markStopping(ctx context.Context, lease Lease, known bool) error {
	stopping := *lease.Session()
	if stopping.State == StateStopping {
		return nil
	}
	stopping.State = StateStopping
	if !known {
		stopping.Reason = "the runtime no longer knows the sandbox: it counts as ended once it no longer answers"
	}
	if err := write(ctx, lease, &stopping, Keep); err != nil {
		return fmt.Errorf("write the intent to stop: %w", err)
	}
	return nil
}

// start has the driver start the intent's sandbox, or give it the spare that was claimed
// for it. start turns the intent into a running session.
func (s *Scheduler) start(ctx context.Context, lease Lease, driver runtime.Driver, intent *Session, progress func(runtime.Stage)) error {
	if err := held(lease); err != nil {
		return fmt.Errorf("start the sandbox: %w", err)
	}
	progress = s.metrics.timeStages(ctx, intent.Runtime, progress)
	sandbox, err := s.startOrClaim(ctx, lease, driver, intent, progress)
	if err != nil {
		return runtimeError(ctx, "start the sandbox", unlessHeld(lease, hidingToken(err, intent.AccessToken)))
	}
	intent.ContainerID = sandbox.ContainerID
	intent.Endpoint = sandbox.Endpoint
	intent.State = StateRunning
	return nil
}

// inDoubtError is the error of a create of which it is not known which of two intents is
// recorded: that with the spare, or that without. SettleInFlight undoes the one that is.
type inDoubtError struct{ error }

func (e inDoubtError) Unwrap() error { return e.error }

// startOrClaim returns the sandbox of the intent. If its spare cannot be claimed, it
// changes the intent and starts a sandbox.
func (s *Scheduler) startOrClaim(ctx context.Context, lease Lease, driver runtime.Driver, intent *Session, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	if intent.Warm {
		sandbox, err := s.claim(ctx, driver, *intent)
		if err == nil {
			progress(runtime.StageReady)
			return sandbox, nil
		}
		if err := s.goCold(ctx, lease, driver, intent, err); err != nil {
			return runtime.Sandbox{}, inDoubtError{err}
		}
	}
	sandbox, err := driver.Create(ctx, intent.spec(), progress)
	if err == nil {
		err = checkStarted(sandbox, *intent)
	}
	return sandbox, err
}

// checkStarted returns an error if the driver broke its contract with what it answered
// to a create or a claim.
func checkStarted(sandbox runtime.Sandbox, intent Session) (err error) {
	switch {
	case sandbox.SessionID != intent.SessionID.String():
		err = fmt.Errorf("it answered for session %q", sandbox.SessionID)
	case sandbox.ChatID != intent.ChatID.String():
		err = fmt.Errorf("it answered for chat %q", sandbox.ChatID)
	case sandbox.ContainerID == "":
		err = errors.New("it named no container ID")
	case !sandbox.Endpoint.IsValid():
		err = errors.New("it named no valid endpoint")
	case sandbox.State != runtime.StateRunning:
		err = fmt.Errorf("it answered with a sandbox that is %s", sandbox.State)
	default:
		return nil
	}
	return fmt.Errorf("%w: runtime %s broke its contract: %w", runtime.ErrUnavailable, intent.Runtime, err)
}

// save writes a session whose sandbox is ready. If the write fails, save stops the
// sandbox, with two exceptions. If the write was applied after all, the session is
// valid and others may know it, so save returns no error. If nobody can tell whether
// the write was or will be applied, save stops nothing: the record is then the session,
// or an intent that SettleInFlight ends.
func (s *Scheduler) save(ctx context.Context, driver runtime.Driver, lease Lease, session Session) error {
	// Use the lease's own error. [write] would return ErrLockLost if the lock is lost
	// by now, which does not mean that the write was not applied before.
	err := lease.Write(ctx, &session, Release, s.change(ctx, ChangeReady, session, ""))
	if err == nil {
		return nil
	}
	look, done := s.undoing(ctx)
	defer done()
	ruledOut := ruleOut(look, lease, session, err) // safeguard: ruling out of a late save
	err = lockLost(ctx, err)
	found, _, lookErr := s.Store.Get(look, session.ChatID, Block{})
	switch {
	case lookErr == nil && found != nil && found.SessionID == session.SessionID && found.State != StateCreating:
		return nil
	case lookErr != nil || ruledOut != nil:
		s.journal.note(ctx, Event{Type: EventUndoFailed, Before: &session, Err: cmp.Or(lookErr, ruledOut)})
	default:
		s.abandon(ctx, driver.Stop, lease, session, err)
	}
	return err
}

// ruleOut rewrites the intent after the write of a session failed with err, so that the
// failed write can no longer be applied once the sandbox has been stopped. If the lock
// was lost before either write, the session cannot be written late anyway.
func ruleOut(ctx context.Context, lease Lease, session Session, err error) error {
	if errors.Is(err, ErrLockLost) {
		return nil
	}
	session.State, session.ContainerID, session.Endpoint = StateCreating, "", runtime.Endpoint{}
	if err := lease.Write(ctx, &session, Keep); err != nil && !errors.Is(err, ErrLockLost) {
		return fmt.Errorf("rule out that the session is written late: %w", err)
	}
	return nil
}

// abandon undoes a create that failed with cause: it ends the sandbox with the driver's method end
// and then removes the intent. It works even if ctx has ended. If it fails, the intent
// stays recorded, and SettleInFlight ends it.
func (s *Scheduler) abandon(ctx context.Context, end func(context.Context, string) error, lease Lease, session Session, cause error) {
	ctx, done := s.undoing(ctx)
	defer done()
	sessionID := session.SessionID.String()
	err := runtimeError(ctx, "undo the start", noteWait(ctx, lease, sessionID, end(ctx, sessionID)))
	if err == nil {
		err = write(ctx, lease, nil, Release, s.change(ctx, ChangeStartFailed, session, cause.Error()))
	}
	if err != nil {
		s.journal.note(ctx, Event{Type: EventUndoFailed, Before: &session, Err: err})
	}
}

// undoIntent ends the sandbox that an unfinished create may have started. intent was
// read under the chat's lock. The caller must replace or remove the record.
func (s *Scheduler) undoIntent(ctx context.Context, lease Lease, intent Session) error {
	driver, err := s.driver(intent.Runtime)
	if err != nil {
		return err
	}
	switch _, err := isKnown(ctx, driver, intent); {
	case isOthersSpare(intent, err):
		return nil
	case err != nil:
		return err
	}
	leave, err := s.replacing.Enter()
	if err != nil {
		return err
	}
	defer leave()
	return stop(ctx, lease, driver, runtime.Driver.Delete, intent.SessionID.String())
}
