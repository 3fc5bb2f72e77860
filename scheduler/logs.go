package scheduler

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

const (
	// maxLogReads is how many logs one replica reads at a time. Each may hold a
	// connection to what the runtime depends on; see maxLogReads in package nomad.
	maxLogReads = 16
	// maxLogReadsOfCaller bounds those of each caller that is authenticated.
	maxLogReadsOfCaller = maxLogReads / 2
	// maxLogReadsOfSession bounds those of each session.
	maxLogReadsOfSession = 4

	// maxTail is how much of what is kept is searched for the last lines, in bytes.
	maxTail = 256 << 10

	// endLimit is how long Logs waits for the record to say how a session ended. It
	// sees the end of the sandbox first.
	endLimit = 10 * time.Second
)

// LogQuery selects the output that [Scheduler.Logs] passes on.
type LogQuery struct {
	Stream runtime.LogStream // Stdout or Stderr
	Task   string            // if a sandbox has several tasks; empty: its main one
	Tail   int               // only so many of the last lines of what is kept; -1: all
	Follow bool              // continue with new output until the session ends
}

// LogEnd says how a session is when its logs end.
type LogEnd struct {
	Session Session // as it was at the beginning
	State   string  // a State or, if the session is gone, the type of the Change that ended it
	Reason  string  // why; may be empty
}

// logPlaces limits how many logs are read at a time.
type logPlaces struct {
	all      Places
	callers  *Shares
	sessions *Shares
}

func newLogPlaces() logPlaces {
	return logPlaces{
		all:      NewPlaces(maxLogReads, "log_reads", "%d logs are being read already"),
		callers:  NewShares(maxLogReadsOfCaller, "caller_log_reads", "%d logs are being read by this caller already"),
		sessions: NewShares(maxLogReadsOfSession, "session_log_reads", "%d logs of this session are being read already"),
	}
}

// enter takes a place until leave is called.
func (p *logPlaces) enter(caller Caller, session Session) (leave func(), err error) {
	enters := []func() (func(), error){p.all.Enter, p.sessions.Of(session.SessionID.String())}
	if caller.Method != "" { // without authentication all callers look the same
		enters = append(enters, p.callers.Of(caller.Key()))
	}
	return EnterAll(enters...)
}

// Logs calls write with the output that the sandbox of the chat's session has printed.
// The lines of query.Tail are searched in the last 256 KiB of what is kept. With
// query.Follow, Logs calls write without data once it has passed on what was kept, and
// then continues until the session ends. It never passes on output of another session of
// the chat. It ends after the first error of write.
//
// Logs returns ErrNotFound if the chat has no session that the caller may see,
// ErrPermissionDenied if the caller may not read its logs, [errors.ErrUnsupported] if its
// runtime has no logs, [runtime.ErrLogsDisabled] if they are not kept, ErrNotRunning if
// there is no sandbox yet or any more, and [runtime.ErrInvalid] for an unknown task.
func (s *Scheduler) Logs(ctx context.Context, chatID uuid.UUID, query LogQuery, write func(runtime.LogChunk) error) (LogEnd, error) {
	caller := CallerFrom(ctx)
	session, _, err := s.Store.Get(ctx, chatID, Block{})
	if err != nil {
		return LogEnd{}, fmt.Errorf("logs: %w", err)
	}
	if session == nil || !caller.May(CapRead, session.AgentID) {
		return LogEnd{}, fmt.Errorf("logs: chat %s: %w", chatID, ErrNotFound)
	}
	end, err := s.logs(ctx, caller, *session, query, write)
	end.Session = *session
	if err != nil {
		return end, fmt.Errorf("logs: %w", err)
	}
	return end, nil
}

func (s *Scheduler) logs(
	ctx context.Context, caller Caller, session Session, query LogQuery, write func(runtime.LogChunk) error,
) (LogEnd, error) {
	if err := caller.require(CapLogs, session.AgentID); err != nil {
		return LogEnd{}, err
	}
	driver, err := s.driver(session.Runtime)
	if err != nil {
		return LogEnd{}, err
	}
	reader, ok := driver.(runtime.LogReader)
	if !ok {
		return LogEnd{}, fmt.Errorf("runtime %q: %w", session.Runtime, errors.ErrUnsupported)
	}
	leave, err := s.logPlaces.enter(caller, session)
	if err != nil {
		return LogEnd{}, err
	}
	defer leave()
	defer s.metrics.begin(ctx, "logs")()

	out := logWriter{reader: reader, session: session.SessionID.String(), write: write}
	of := runtime.LogQuery{Stream: query.Stream, Task: query.Task}
	if query.Tail >= 0 {
		err = out.tail(ctx, of, query.Tail)
	} else {
		err = out.copy(ctx, of)
	}
	if err != nil {
		return LogEnd{}, out.error(ctx, err)
	}
	if !query.Follow {
		seen := s.observe(ctx, session)
		return LogEnd{State: string(seen.State), Reason: seen.Reason}, nil
	}
	if err := write(runtime.LogChunk{Stream: query.Stream, Offset: out.next}); err != nil {
		return LogEnd{}, err
	}
	of.Offset, of.Follow = out.next, true
	err = out.copy(ctx, of)
	if ctx.Err() != nil || out.failed {
		return LogEnd{}, out.error(ctx, err)
	}
	end, over, endErr := s.logEnd(ctx, session)
	switch {
	case endErr != nil:
		return LogEnd{}, endErr
	case over:
		return end, nil
	case err == nil:
		err = fmt.Errorf("%w: it ended the log of a sandbox that runs", runtime.ErrUnavailable)
	}
	return LogEnd{}, out.error(ctx, err)
}

// logWriter passes on the output of a session.
type logWriter struct {
	reader  runtime.LogReader
	session string
	write   func(runtime.LogChunk) error
	next    int64 // offset after the last byte that the driver has yielded
	failed  bool  // write has failed
}

// copy passes on what the query selects.
func (w *logWriter) copy(ctx context.Context, query runtime.LogQuery) error {
	for chunk, err := range w.reader.Logs(ctx, w.session, query) {
		if err != nil {
			return err
		}
		w.next = chunk.Offset + int64(len(chunk.Data))
		if len(chunk.Data) == 0 {
			continue
		}
		if err := w.pass(chunk); err != nil {
			return err
		}
	}
	return nil
}

func (w *logWriter) pass(chunk runtime.LogChunk) error {
	err := w.write(chunk)
	w.failed = err != nil
	return err
}

// error returns the error with which Logs ends.
func (w *logWriter) error(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case w.failed:
		return err
	case errors.Is(err, runtime.ErrNotFound):
		return fmt.Errorf("%w: %w", ErrNotRunning, err)
	default:
		return runtimeError(ctx, "read", err)
	}
}

// tail passes on the last lines of what is kept.
func (w *logWriter) tail(ctx context.Context, query runtime.LogQuery, lines int) error {
	query.Offset = -maxTail
	var text []byte
	for chunk, err := range w.reader.Logs(ctx, w.session, query) {
		if err != nil {
			return err
		}
		w.next = chunk.Offset + int64(len(chunk.Data))
		text = append(text, chunk.Data...)
		if surplus := len(text) - maxTail; surplus > 0 { // it was printed in the meantime
			text = slices.Delete(text, 0, surplus)
		}
	}
	if text = lastLines(text, lines); len(text) == 0 {
		return nil
	}
	return w.pass(runtime.LogChunk{Stream: query.Stream, Offset: w.next - int64(len(text)), Data: text})
}

// lastLines returns the last n lines of a text. The last line may be incomplete.
func lastLines(text []byte, n int) []byte {
	if n == 0 {
		return nil
	}
	begin := len(bytes.TrimSuffix(text, []byte("\n")))
	for range n {
		if begin = bytes.LastIndexByte(text[:begin], '\n'); begin < 0 {
			return text
		}
	}
	return text[begin+1:]
}

// logEnd returns how a session is once its sandbox has ended. over is false if it still
// runs.
func (s *Scheduler) logEnd(ctx context.Context, session Session) (end LogEnd, over bool, err error) {
	var block Block
	for began := time.Now(); ; {
		current, next, err := s.Store.Get(ctx, session.ChatID, block)
		switch {
		case err != nil:
			return LogEnd{}, false, err
		case current == nil || current.SessionID != session.SessionID:
			return s.logEndOfGone(ctx, session, current), true, nil
		}
		seen := s.observe(ctx, *current)
		left := endLimit - time.Since(began)
		switch {
		case seen.State == StateDead || seen.State == StateLost, !seen.Settled() && left <= 0:
			return LogEnd{State: string(seen.State), Reason: seen.Reason}, true, nil
		case seen.Settled():
			return LogEnd{}, false, nil
		}
		block = Block{Index: next, Wait: left}
	}
}

// logEndOfGone returns how a session ended whose record is gone. It looks at the history,
// which may not have it any more.
func (s *Scheduler) logEndOfGone(ctx context.Context, session Session, current *Session) LogEnd {
	changes, err := s.History(ctx, session.ChatID)
	if err != nil {
		s.Logger.Debug("log_end_not_found", "chat_id", session.ChatID, "error", Kind(err), "detail", err)
	}
	for _, change := range slices.Backward(changes) {
		if change.SessionID == session.SessionID {
			return LogEnd{State: string(change.Type), Reason: change.Reason}
		}
	}
	switch {
	case current != nil:
		return LogEnd{State: string(ChangeReplaced)}
	case session.Expired(s.Now()):
		return LogEnd{State: string(ChangeExpired)}
	default:
		return LogEnd{State: string(ChangeDeleted)}
	}
}
