package scheduler

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"github.com/bivouac/bivouac/runtime"
)

// CreateCommand is the input of [Scheduler.Create].
type CreateCommand struct {
	ChatID         uuid.UUID
	AgentID        string
	VolumeHostPath string
	Runtime        string              // empty: whatever stands, or else the default
	TTL            time.Duration       // 0: the default
	Progress       func(runtime.Stage) // told the stages of a start; may be nil
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
// volume, or another runtime than the one that cmd names. A reuse does not change the
// expiry.
func (s *Scheduler) Create(ctx context.Context, cmd CreateCommand) (CreateResult, error) {
	ctx, span := s.startSpan(ctx, "usecase.create_sandbox", chatAttr(cmd.ChatID),
		attribute.String("agent.id", cmd.AgentID),
		attribute.String("volume.host_path", cmd.VolumeHostPath))
	defer span.End()

	res, err := s.create(ctx, cmd, span)
	err = s.shuttingDown(err)
	if err != nil && !errors.Is(err, ErrConflict) {
		spanError(span, err)
		count(ctx, s.metrics.create, result("error"))
		if !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrBusy) { // else anybody could fill the log
			s.Logger.Error("sandbox_create_failed", "chat_id", cmd.ChatID.String(), "error", Kind(err), "detail", err)
		}
	}
	return res, err
}

func (s *Scheduler) create(ctx context.Context, cmd CreateCommand, span trace.Span) (CreateResult, error) {
	if err := s.checkCreate(cmd); err != nil {
		return CreateResult{}, err
	}
	if cmd.TTL == 0 {
		cmd.TTL = s.TTL
	}
	if cmd.Progress == nil {
		cmd.Progress = func(runtime.Stage) {}
	}
	until := time.Now().Add(LockWait)
	standing, leave, err := s.standing(ctx, cmd.ChatID, until)
	if err != nil {
		return CreateResult{}, fmt.Errorf("create: %w", err)
	}
	if standing != nil {
		return s.reuseOrConflict(ctx, cmd, *standing, span)
	}
	defer leave()

	lease, err := s.lock(ctx, cmd.ChatID, time.Until(until))
	if err != nil {
		return CreateResult{}, fmt.Errorf("create: %w", err)
	}
	defer s.release(ctx, lease)
	ctx, done := s.underLock(ctx, lease)
	defer done()

	seen := s.observeLeased(ctx, lease)
	if seen == nil || !s.stands(*seen) {
		done, err := s.reclaim(ctx, lease, cmd.ChatID, s.chatFinders())
		if err != nil {
			return CreateResult{}, fmt.Errorf("create: %w", err)
		}
		if done.adopted {
			seen = s.observeLeased(ctx, lease)
		}
	}
	if seen != nil && s.stands(*seen) {
		return s.reuseOrConflict(ctx, cmd, *seen, span)
	}
	return s.createOrReplace(ctx, cmd, lease, seen, span)
}

// observeLeased returns the lease's session as its driver sees it, nil if the
// chat has none.
func (s *Scheduler) observeLeased(ctx context.Context, lease Lease) *Session {
	current := lease.Session()
	if current == nil {
		return nil
	}
	return new(s.observe(ctx, *current))
}

// standing returns the chat's session if it stands. Else the caller is the one
// who creates it in this replica, and calls leave when that has ended.
func (s *Scheduler) standing(ctx context.Context, chatID uuid.UUID, until time.Time) (session *Session, leave func(), err error) {
	for leave == nil {
		// Most creates find their session standing. A linearizable read settles
		// those without the lock, and those that waited for another create.
		current, _, err := s.Store.Get(ctx, chatID, Block{})
		if err != nil {
			return nil, nil, err
		}
		if current != nil {
			if seen := s.observe(ctx, *current); s.stands(seen) {
				return &seen, nil, nil
			}
		}
		if leave, err = s.creating.enter(ctx, s.ending, chatID, until); err != nil {
			return nil, nil, err
		}
	}
	return nil, leave, nil
}

// stands says whether a session may be handed out.
func (s *Scheduler) stands(session Session) bool {
	return session.State == StateRunning && !session.Expired(s.Now())
}

func (s *Scheduler) reuseOrConflict(ctx context.Context, cmd CreateCommand, session Session, span trace.Span) (CreateResult, error) {
	spanSession(span, session)
	if reason := conflictReason(session, cmd); reason != "" {
		spanResult(span, "conflict")
		span.SetAttributes(attribute.String("sandbox.conflict.reason", reason))
		count(ctx, s.metrics.create, result("conflict"), attribute.String("reason", reason))
		args := logArgs(session,
			"requested_agent_id", cmd.AgentID,
			"session_agent_id", session.AgentID,
			"requested_volume_host_path", cmd.VolumeHostPath,
			"session_volume_host_path", session.VolumeHostPath)
		if cmd.Runtime != "" {
			args = append(args, "requested_runtime", cmd.Runtime, "session_runtime", session.Runtime)
		}
		s.Logger.Warn("sandbox_conflict", append(args, "reason", reason)...)
		return CreateResult{}, &ConflictError{Session: session, Reason: reason}
	}
	spanResult(span, string(ResultReused))
	count(ctx, s.metrics.create, result(string(ResultReused)))
	s.Logger.Info("sandbox_reused", logArgs(session)...)
	return CreateResult{Result: ResultReused, Session: session}, nil
}

// conflictReason names the fields in which the session is not what is asked for.
// A create that names no runtime is content with any: what is the default may
// differ between replicas, and change, while a session stands.
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
	return strings.Join(fields, ",")
}

func (s *Scheduler) createOrReplace(ctx context.Context, cmd CreateCommand, lease Lease, current *Session, span trace.Span) (CreateResult, error) {
	name := cmp.Or(cmd.Runtime, s.DefaultRuntime)
	driver, err := s.driver(name)
	if err != nil {
		return CreateResult{}, fmt.Errorf("create: %w", err)
	}

	res := ResultCreated
	next := Session{
		SessionID:      uuid.New(),
		ChatID:         cmd.ChatID,
		AgentID:        cmd.AgentID,
		VolumeHostPath: cmd.VolumeHostPath,
		Runtime:        name,
		State:          StateCreating,
	}
	switch {
	case current == nil:
		span.SetAttributes(attribute.String("session.id", next.SessionID.String()))
	case current.State == StateCreating:
		// Somebody began this and is gone. No caller was told of it.
		if err := s.undoIntent(ctx, lease, *current); err != nil {
			return CreateResult{}, fmt.Errorf("create: %w", err)
		}
		span.SetAttributes(attribute.String("session.id", next.SessionID.String()))
	default:
		res = ResultReplaced
		if err := s.stopPrevious(ctx, lease, *current, next.SessionID, span); err != nil {
			return CreateResult{}, fmt.Errorf("replace: %w", err)
		}
	}
	leave, err := take(s.starting, "started")
	if err != nil {
		return CreateResult{}, fmt.Errorf("create: %w", err)
	}
	defer leave()

	next.CreatedAt = s.now()
	next.ExpiresAt = next.CreatedAt.Add(cmd.TTL)
	if err := write(ctx, lease, &next, Keep); err != nil {
		return CreateResult{}, fmt.Errorf("create: write the intent: %w", err)
	}
	if err := s.start(ctx, lease, driver, &next, cmd.Progress); err != nil {
		s.abandon(ctx, driver.Delete, lease, next)
		return CreateResult{}, fmt.Errorf("create: %w", err)
	}
	// The TTL counts from when the sandbox is ready: one that took longer than that
	// to start must not be handed out as expired.
	next.ExpiresAt = s.now().Add(cmd.TTL)
	if res == ResultReplaced {
		spanNewSession(span, next)
	}
	if err := s.save(ctx, driver, lease, next); err != nil {
		return CreateResult{}, fmt.Errorf("create: write the session: %w", err)
	}
	spanSession(span, next)
	spanResult(span, string(res))
	count(ctx, s.metrics.create, result(string(res)))
	s.Logger.Info("sandbox_created", logArgs(next)...)
	return CreateResult{Result: res, Session: next}, nil
}

// stopPrevious ends the sandbox of a session that is to be replaced, and
// returns once it is seen to be gone.
func (s *Scheduler) stopPrevious(ctx context.Context, lease Lease, previous Session, newID uuid.UUID, span trace.Span) error {
	driver, err := s.driver(previous.Runtime)
	if err != nil {
		return err
	}
	known, err := isKnown(ctx, driver, previous)
	if err != nil {
		return err
	}
	leave, err := take(s.replacing, "replaced")
	if err != nil {
		return err
	}
	defer leave()
	spanPreviousSession(span, previous)
	span.SetAttributes(attribute.String("sandbox.new_session.id", newID.String()))
	s.Logger.Info("sandbox_replaced", logArgs(previous, "reason", previous.Reason)...)
	if err := markStopping(ctx, lease, known); err != nil {
		return err
	}
	return endSandbox(ctx, lease, driver, runtime.Driver.Stop, previous, known)
}

// markStopping writes down that the lease's session is about to be stopped, and
// what is waited for if its driver does not know its sandbox.
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

// start has the driver start the intent's sandbox, and turns the intent into a
// session. A driver is not trusted to have kept to its contract.
func (s *Scheduler) start(ctx context.Context, lease Lease, driver runtime.Driver, intent *Session, progress func(runtime.Stage)) error {
	if err := held(lease); err != nil {
		return fmt.Errorf("start the sandbox: %w", err)
	}
	sandbox, err := driver.Create(ctx, intent.spec(), progress)
	if err != nil {
		return runtimeError(ctx, "start the sandbox", unlessHeld(lease, err))
	}
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
	}
	if err != nil {
		return fmt.Errorf("start the sandbox: %w: runtime %s broke its contract: %w", runtime.ErrUnavailable, intent.Runtime, err)
	}
	intent.ContainerID = sandbox.ContainerID
	intent.Endpoint = sandbox.Endpoint
	intent.State = StateRunning
	return nil
}

// save writes a session whose sandbox is ready. Where that fails the sandbox is
// stopped, unless the write was applied all the same: then the session stands,
// and others may have been told of it. Where nobody can say, nothing is stopped:
// what is recorded is the session, or an intent, which SettleInFlight ends.
func (s *Scheduler) save(ctx context.Context, driver runtime.Driver, lease Lease, session Session) error {
	// What the lease says counts: that the lock is lost by now, as [write] would
	// say, does not mean that nothing was written before.
	err := lease.Write(ctx, &session, Release)
	if err == nil {
		return nil
	}
	look, done := s.undoing(ctx)
	defer done()
	ruledOut := ruleOut(look, lease, session, err)
	err = lockLost(ctx, err)
	found, _, lookErr := s.Store.Get(look, session.ChatID, Block{})
	switch {
	case lookErr == nil && found != nil && found.SessionID == session.SessionID && found.State != StateCreating:
		return nil
	case lookErr != nil || ruledOut != nil:
		doubt := cmp.Or(lookErr, ruledOut)
		s.Logger.Warn("sandbox_undo_failed", logArgs(session, "error", Kind(doubt), "detail", doubt)...)
	default:
		s.abandon(ctx, driver.Stop, lease, session)
	}
	return err
}

// ruleOut makes sure that the write of a session, which failed with err, is not
// applied later, when its sandbox has been stopped: it writes the intent once
// more, over which that write changes nothing. Nor does it where the lease said
// of it, or says of this, that the lock was lost before.
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

// abandon undoes a create that failed: it ends the sandbox by the given method
// of its driver and then removes the intent. It works although ctx may have
// ended. What it cannot undo stays recorded as an intent, for SettleInFlight.
func (s *Scheduler) abandon(ctx context.Context, end func(context.Context, string) error, lease Lease, session Session) {
	ctx, done := s.undoing(ctx)
	defer done()
	sessionID := session.SessionID.String()
	err := runtimeError(ctx, "undo the start", noteWait(ctx, lease, sessionID, end(ctx, sessionID)))
	if err == nil {
		err = write(ctx, lease, nil, Release)
	}
	if err != nil {
		s.Logger.Warn("sandbox_undo_failed", logArgs(session, "error", Kind(err), "detail", err)...)
	}
}

// undoIntent ends what an intent, found under the chat's lock, may have begun.
// The record is left to the caller.
func (s *Scheduler) undoIntent(ctx context.Context, lease Lease, intent Session) error {
	driver, err := s.driver(intent.Runtime)
	if err != nil {
		return err
	}
	if _, err := isKnown(ctx, driver, intent); err != nil {
		return err
	}
	leave, err := take(s.replacing, "replaced")
	if err != nil {
		return err
	}
	defer leave()
	return stop(ctx, lease, driver, runtime.Driver.Delete, intent.SessionID.String())
}
