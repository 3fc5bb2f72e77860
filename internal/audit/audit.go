// Package audit writes down who did what, as JSON lines. [Log] writes one line when an
// operation is received and one when it is done, to each of its sinks. A [Sink] is a
// file or the server's standard output.
//
// The API calls [Log.Begin] and [Log.End] for what callers ask for. The scheduler calls
// [Log.Attempt] for what nobody asked for, such as the end of an expired session, and
// [Log.Note] with the events that tell what became of a caller's operation. If a sink is
// enforced and does not take a line, Begin and Attempt return an error, and the operation
// must not be done.
//
// The package writes no secrets: of a caller it knows only names and public IDs. It does
// not rotate files; it opens them again if they were renamed. It does not sync them to
// the disk.
package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/time/rate"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/scheduler"
)

// The limit for lines about requests that were refused before anybody knew who sent
// them. Such a line has at most 1.5 KiB, so strangers cause at most 130 MB a day.
const (
	refusedPerSecond = 1
	refusedAtOnce    = 100
)

// Config is the configuration of a Log. All fields are required.
type Config struct {
	Sinks  []*Sink
	Node   string // name of this machine, in each line
	Logger hclog.Logger
	// Lost is called with the name of a sink for each line that it did not take.
	Lost func(sink string)
}

// Log is an audit log. It is safe for concurrent use.
type Log struct {
	Config

	mu       sync.Mutex                   // guards all below
	failures map[string]*backoff.Throttle // by sink
	refused  *rate.Limiter
	omitted  int // refused requests without a line since the last such line
}

// New returns a Log.
func New(c Config) *Log {
	l := &Log{Config: c, failures: map[string]*backoff.Throttle{}, refused: rate.NewLimiter(refusedPerSecond, refusedAtOnce)}
	for _, sink := range c.Sinks {
		l.failures[sink.Name()] = new(backoff.Throttle)
	}
	return l
}

// Operation is a caller's request. The fields down to UserAgent are set when it begins,
// the others until it ends.
type Operation struct {
	Caller    scheduler.Caller
	RequestID string
	Method    string
	Endpoint  string    // the path of the API, with {chat_id} for the ID of a chat
	ChatID    uuid.UUID // nil UUID: none
	UserAgent string
	Command   *Command // nil: it runs none

	AgentID  string             // that the caller named; empty: none
	Session  *scheduler.Session // nil: none, or not known
	Previous *scheduler.Session // that was replaced; nil: none
	Result   string             // of the use case; empty: none
	Status   int                // of the answer
	Error    string             // code of the answer; empty: no error
	ExitCode *int               // of the command; nil: it has none
}

// Command is a command that a caller wants to run in a sandbox. Its environment is left out,
// because it may contain secrets.
type Command struct {
	Args []string `json:"args"`
	TTY  bool     `json:"tty,omitempty"`
	User string   `json:"user,omitempty"`
	Task string   `json:"task,omitempty"`
}

type operationKey struct{}

// Begin writes that an operation was received. [Log.Note] adds to the operation what the
// events with the returned context tell. If Begin returns an error, which wraps
// [scheduler.ErrAuditUnavailable], the operation must not be done. Call End in any case.
func (l *Log) Begin(ctx context.Context, op *Operation) (context.Context, error) {
	entry := op.entry()
	entry.Stage = stageReceived
	return context.WithValue(ctx, operationKey{}, op), l.write(entry)
}

// End writes that an operation is done. A failure is logged and counted, but not
// returned: the operation has been done, so its answer should be sent.
func (l *Log) End(op *Operation) {
	_ = l.write(op.completed())
}

// Refuse writes that a request was refused before it began, because of its credential or
// its origin. Lines of this kind are limited, so that strangers cannot fill the disk. The
// next line says how many were omitted.
func (l *Log) Refuse(op *Operation) {
	l.mu.Lock()
	if !l.refused.Allow() {
		l.omitted++
		l.mu.Unlock()
		return
	}
	entry := op.completed()
	entry.Omitted, l.omitted = l.omitted, 0
	l.mu.Unlock()
	_ = l.write(entry)
}

// Note implements scheduler.Auditor. It adds to the operation of ctx what became of the
// session that the caller asked for.
func (l *Log) Note(ctx context.Context, e scheduler.Event) {
	op, ok := ctx.Value(operationKey{}).(*Operation)
	if !ok {
		return
	}
	switch e.Type {
	case scheduler.EventCreated, scheduler.EventReused, scheduler.EventConflict, scheduler.EventCreateFailed,
		scheduler.EventRenewed, scheduler.EventRenewFailed,
		scheduler.EventDeleted, scheduler.EventDeleteNotFound, scheduler.EventDeleteFailed:
		op.Result, op.Session = e.Result(), e.After
		if e.Asked != nil {
			op.AgentID = e.Asked.AgentID
		}
		switch {
		case e.After == nil:
			op.Session = e.Before
		case e.Before != nil && e.Before.SessionID != e.After.SessionID:
			op.Previous = e.Before
		}
	case scheduler.EventRepaired:
		op.Result = e.Reason
	case scheduler.EventRepairFailed:
		op.Result = "error"
	default: // of another session than that of the caller, or told by Attempt
	}
}

// Attempt implements scheduler.Auditor.
func (l *Log) Attempt(_ context.Context, e scheduler.Event) (done func(error), err error) {
	session := e.After
	if session == nil {
		session = e.Before
	}
	entry := payload{
		Auth:    newAuth(e.Caller),
		Request: &request{ID: e.RequestID, Operation: operations(e.Type), ChatID: idOf(e.ChatID)},
		Session: newSession(session),
		Stage:   stageReceived,
	}
	if e.Caller.Address != "" {
		entry.Request.Meta = &requestMeta{RemoteAddress: e.Caller.Address}
	}
	if err := l.write(entry); err != nil {
		return nil, err
	}
	return func(err error) {
		entry.Stage, entry.Response = stageComplete, &response{Result: string(e.Type)}
		if err != nil {
			entry.Response = &response{Result: "error", Error: scheduler.Kind(err)}
		}
		_ = l.write(entry) // it has been done, see End
	}, nil
}

// operations returns what Bivouac does by itself, by the event of its success.
func operations(event scheduler.EventType) string {
	switch event {
	case scheduler.EventExpired:
		return "expire"
	case scheduler.EventSettled:
		return "settle"
	case scheduler.EventAdopted:
		return "adopt"
	case scheduler.EventOrphanStopped:
		return "stop_orphan"
	default: // a change of the sandbox that was noticed
		return "record"
	}
}

// write writes a line to all sinks. It returns an error if an enforced sink does not take
// it. It logs and counts all failures.
func (l *Log) write(p payload) error {
	text, err := l.line(p)
	if err != nil {
		return fmt.Errorf("%w: %w", scheduler.ErrAuditUnavailable, err)
	}
	var refusals []error
	for _, sink := range l.Sinks {
		lost, err := sink.write(text, l.gap)
		l.report(sink, lost, err)
		if err != nil && sink.Enforced() {
			refusals = append(refusals, fmt.Errorf("%w: %w", scheduler.ErrAuditUnavailable, err))
		}
	}
	return errors.Join(refusals...)
}

// report logs and counts a failure of a sink, or logs that lines were lost until now.
func (l *Log) report(sink *Sink, lost int, err error) {
	if err == nil && lost == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	told := l.failures[sink.Name()]
	if err != nil {
		l.Lost(sink.Name())
		l.Logger.Log(told.Level(), "audit_failed", "sink", sink.Name(), "error", err)
		return
	}
	told.Reset()
	l.Logger.Warn("audit_recovered", "sink", sink.Name(), "lost", lost)
}

// Health returns why the sink did not take the last line, or nil. It tries again, by
// writing how many lines were lost.
func (l *Log) Health(sink *Sink) error {
	lost, err := sink.recover(l.gap)
	if err == nil {
		l.report(sink, lost, nil)
	}
	return err
}

// gap returns a line that says that lines are missing before it.
func (l *Log) gap(lost int, since time.Time) ([]byte, error) {
	return l.line(payload{Stage: stageGap, Gap: &gap{Lost: lost, Since: since.UTC()}})
}

func (l *Log) line(p payload) ([]byte, error) {
	now := time.Now().UTC()
	p.ID, p.Type, p.Timestamp, p.Version = uuid.NewString(), "audit", now, 1
	p.Node = l.Node
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(line{CreatedAt: now, EventType: "audit", Payload: p}); err != nil {
		return nil, err
	}
	return text.Bytes(), nil // it ends with a newline
}
