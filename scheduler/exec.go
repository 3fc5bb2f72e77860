package scheduler

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

// How many commands run at a time. Further ones are refused with a [LimitError].
const (
	maxExecs           = 64 // in one replica
	maxExecsPerCaller  = 16
	maxExecsPerSession = 8
)

// execPlaces limits the commands that run at a time.
type execPlaces struct {
	all        Places
	perCaller  *Shares
	perSession *Shares
}

func newExecPlaces() execPlaces {
	return execPlaces{
		all:        NewPlaces(maxExecs, "execs", "%d commands run already"),
		perCaller:  NewShares(maxExecsPerCaller, "execs_per_caller", "the caller runs %d commands already"),
		perSession: NewShares(maxExecsPerSession, "execs_per_session", "%d commands run in the session already"),
	}
}

// enter takes a place of each kind until leave is called.
func (p execPlaces) enter(caller Caller, sessionID uuid.UUID) (leave func(), err error) {
	return EnterAll(p.perSession.Of(sessionID.String()), p.perCaller.Of(caller.Key()), p.all.Enter)
}

// Exec is a command that may run in a session's sandbox.
type Exec struct {
	Session Session
	// Run runs the command once and returns its exit code. When ctx ends, it kills the
	// command and returns ctx's error. The errors are those of [runtime.Execer], with
	// ErrNotRunning or ErrExpired if the session ended meanwhile, and ErrShuttingDown if
	// this replica does. A limit of the runtime itself is a [LimitError].
	Run func(ctx context.Context, streams runtime.Streams) (exitCode int, err error)
	// Release gives the command's places back. Call it in any case, after Run has returned.
	Release func()
}

// Exec checks that the caller may run a command in the chat's sandbox, and takes a place
// for it. It does not run it yet. If renew is not 0, Exec first renews the session to renew
// from now, as [Scheduler.Renew] does. Otherwise a command does not extend its session.
//
// It returns ErrNotFound if the chat has no session that the caller may see,
// ErrPermissionDenied, ErrExpired, ErrNotRunning if the sandbox does not run, a
// [LimitError], and an error that wraps [errors.ErrUnsupported] if the session's runtime
// cannot run commands.
func (s *Scheduler) Exec(ctx context.Context, chatID uuid.UUID, command runtime.Command, renew time.Duration) (*Exec, error) {
	exec, err := s.prepareExec(ctx, chatID, command, renew)
	if err != nil {
		return nil, fmt.Errorf("exec: %w", s.shuttingDown(err))
	}
	return exec, nil
}

func (s *Scheduler) prepareExec(ctx context.Context, chatID uuid.UUID, command runtime.Command, renew time.Duration) (*Exec, error) {
	if s.ending.Err() != nil {
		return nil, ErrShuttingDown
	}
	if err := command.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if err := checkChatID(chatID); err != nil {
		return nil, err
	}
	caller := CallerFrom(ctx)
	recorded, _, err := s.Store.Get(ctx, chatID, Block{})
	if err != nil {
		return nil, err
	}
	if recorded == nil || recorded.State == StateCreating || !caller.May(CapRead, recorded.AgentID) {
		return nil, fmt.Errorf("chat %s: %w", chatID, ErrNotFound)
	}
	if err := caller.require(CapExec, recorded.AgentID); err != nil {
		return nil, err
	}
	session := s.observe(ctx, *recorded)
	if err := mustRun(session, s.now()); err != nil {
		return nil, fmt.Errorf("chat %s: %w", chatID, err)
	}
	execer, err := s.execer(ctx, session.Runtime)
	if err != nil {
		return nil, err
	}
	leave, err := s.execs.enter(caller, session.SessionID)
	if err != nil {
		return nil, err
	}
	if renew != 0 {
		renewed, err := s.Renew(ctx, chatID, renew)
		if err == nil && renewed.SessionID != session.SessionID {
			err = fmt.Errorf("%w: another session took its place", ErrNotRunning)
		}
		if err != nil {
			leave()
			return nil, err
		}
		session = renewed
	}
	return &Exec{
		Session: session,
		Run: func(ctx context.Context, streams runtime.Streams) (int, error) {
			return s.runExec(ctx, execer, session, command, streams)
		},
		Release: leave,
	}, nil
}

// mustRun returns an error unless the session's sandbox runs at now.
func mustRun(session Session, now time.Time) error {
	if session.Expired(now) {
		return expired(session)
	}
	if session.State != StateRunning {
		return notRunning(session)
	}
	return nil
}

// execer returns the driver of a runtime if it can run commands.
func (s *Scheduler) execer(ctx context.Context, name string) (runtime.Execer, error) {
	driver, err := s.driver(name)
	if err != nil {
		return nil, err
	}
	execer, ok := driver.(runtime.Execer)
	if ok {
		// The driver of a plugin has all methods. What the plugin declares says which work.
		if info, err := driver.Info(ctx); err == nil && info.Abilities != nil {
			ok = slices.Contains(info.Abilities, runtime.AbilityExec)
		}
	}
	if !ok {
		return nil, fmt.Errorf("%w: runtime %q runs no commands", errors.ErrUnsupported, name)
	}
	return execer, nil
}

func (s *Scheduler) runExec(ctx context.Context, execer runtime.Execer, session Session, command runtime.Command, streams runtime.Streams) (int, error) {
	ctx, span := s.startSpan(ctx, "usecase.exec", chatAttr(session.ChatID))
	defer span.End()
	running, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.ending, cancel)()
	code, err := execer.Exec(running, session.SessionID.String(), command, streams)
	switch {
	case err == nil && code < signalled:
		return code, nil
	case err != nil && ctx.Err() != nil:
		return 0, fmt.Errorf("exec: %w", ctx.Err())
	case err != nil && s.ending.Err() != nil:
		return 0, fmt.Errorf("exec: %w", ErrShuttingDown)
	case errors.Is(err, runtime.ErrBusy):
		return 0, &LimitError{Limit: "runtime_execs", Detail: err.Error()}
	}
	// It may have been killed with its sandbox.
	if ended := s.endedSince(ctx, session); ended != nil {
		return 0, fmt.Errorf("exec: %w", ended)
	}
	if errors.Is(err, runtime.ErrNotFound) {
		return 0, fmt.Errorf("exec: %w: %w", ErrNotRunning, err)
	}
	return code, runtimeError(ctx, "exec", err)
}

// signalled is above the exit codes of commands that no signal ended.
const signalled = 129

// endedSince returns why a session that ran no longer does, or nil if it seems to.
func (s *Scheduler) endedSince(ctx context.Context, session Session) error {
	current, _, err := s.Store.Get(ctx, session.ChatID, Block{})
	switch {
	case err != nil:
		return nil //nolint:nilerr // nothing is known about the session
	case current == nil:
		return fmt.Errorf("%w: the session has ended", ErrNotRunning)
	case current.SessionID != session.SessionID:
		return fmt.Errorf("%w: another session took its place", ErrNotRunning)
	}
	return mustRun(s.observe(ctx, *current), s.now())
}
