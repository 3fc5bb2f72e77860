package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/bivouac/bivouac/internal/api/jsonfields"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/audit"
	"github.com/bivouac/bivouac/runtime"
)

// execPath is where commands are run.
const execPath = "/v1/sessions/{chat_id}/exec"

const (
	defaultExecTimeout = 30 * time.Second
	maxExecTimeout     = 10 * time.Minute
	// maxExecOutput bounds what is kept of each output of a command, in bytes.
	maxExecOutput = 1 << 20
)

// execParams are the query parameters of a command on a websocket.
var execParams = []string{"command", "tty", "rows", "columns", "env", "dir", "user", "task", "renew"}

// exec runs a command and answers when it has ended, or when its time is over.
func (a *API) exec(w http.ResponseWriter, r *http.Request, q query) error {
	chat, err := chatID(r)
	if err != nil {
		return err
	}
	command, fields, err := bodyCommand(r)
	if err != nil {
		return err
	}
	timeout := defaultExecTimeout
	if text, ok := fields["timeout"]; ok {
		if timeout, err = positiveDuration("timeout", text); err != nil {
			return err
		}
		if timeout > maxExecTimeout {
			return invalid("timeout is over %s", maxExecTimeout)
		}
	}
	renew, err := q.renew()
	if err != nil {
		return err
	}
	exec, err := a.config.Sessions.Exec(r.Context(), chat, command, renew)
	if err != nil {
		return err
	}
	defer exec.Release()
	auditSession(w, exec.Session)
	ctx, cancel := context.WithTimeout(r.Context(), timeout)
	defer cancel()
	var stdout, stderr capped
	code, err := exec.Run(ctx, runtime.Streams{Stdin: bytes.NewReader([]byte(fields["stdin"])), Stdout: &stdout, Stderr: &stderr})
	answer := wire.ExecAnswer{Truncated: []string{}}
	switch {
	case err == nil:
		answer.ExitCode = &code
		auditExitCode(w, code)
	case errors.Is(err, context.DeadlineExceeded) && errors.Is(ctx.Err(), context.DeadlineExceeded) && r.Context().Err() == nil:
		answer.TimedOut = true
	default:
		return err
	}
	answer.Stdout, answer.StdoutBase64 = stdout.text()
	answer.Stderr, answer.StderrBase64 = stderr.text()
	if stdout.over {
		answer.Truncated = append(answer.Truncated, "stdout")
	}
	if stderr.over {
		answer.Truncated = append(answer.Truncated, "stderr")
	}
	return writeJSON(w, http.StatusOK, answer)
}

// capped keeps the first maxExecOutput bytes that are written to it.
type capped struct {
	kept []byte
	over bool
}

func (c *capped) Write(p []byte) (int, error) {
	room := maxExecOutput - len(c.kept)
	c.kept = append(c.kept, p[:min(room, len(p))]...)
	c.over = c.over || len(p) > room
	return len(p), nil
}

// text returns what was kept as text, or as bytes if it is not UTF-8. A character that was
// cut at the limit is left out.
func (c *capped) text() (string, []byte) {
	kept := c.kept
	if c.over {
		kept = kept[:wholeCharacters(kept)]
	}
	if utf8.Valid(kept) {
		return string(kept), nil
	}
	return "", c.kept
}

// bodyCommand returns the command in a request's body, and the body's other fields.
func bodyCommand(r *http.Request) (runtime.Command, map[string]string, error) {
	text, err := io.ReadAll(r.Body) // in memory, see receive
	if err != nil {
		return runtime.Command{}, nil, invalid("the body could not be read to its end")
	}
	r.Body = io.NopCloser(bytes.NewReader(text)) // to be read again
	if !isJSON(r.Header) {
		return runtime.Command{}, nil, errMediaType
	}
	fields, objects, lists, err := jsonfields.ParseLists(string(text), []string{"timeout", "stdin", "dir", "user", "task"}, []string{"env"}, []string{"command"})
	if err != nil {
		return runtime.Command{}, nil, invalid("%w", err)
	}
	command := runtime.Command{
		Args: lists["command"], Env: objects["env"], Dir: fields["dir"], User: fields["user"], Task: fields["task"],
	}
	return command, fields, checkCommand(command)
}

// command returns the command in the query of a websocket.
func (q query) command() (runtime.Command, error) {
	command := runtime.Command{Dir: q["dir"], User: q["user"], Task: q["task"]}
	for name, target := range map[string]any{"command": &command.Args, "env": &command.Env, "tty": &command.TTY} {
		if text, ok := q[name]; ok && json.Unmarshal([]byte(text), target) != nil {
			return command, invalid("%s is not %s", name, map[string]string{
				"command": `a JSON list of strings such as ["sh"]`, "env": "a JSON object of strings", "tty": "true or false",
			}[name])
		}
	}
	for name, target := range map[string]*uint16{"rows": &command.Size.Rows, "columns": &command.Size.Columns} {
		if text, ok := q[name]; ok {
			n, err := strconv.ParseUint(text, 10, 16)
			if err != nil || n == 0 {
				return command, invalid("%s is not a number from 1 to 65535", name)
			}
			*target = uint16(n)
		}
	}
	if (command.Size.Rows == 0) != (command.Size.Columns == 0) {
		return command, invalid("rows and columns go together")
	}
	return command, checkCommand(command)
}

func checkCommand(command runtime.Command) error {
	if err := command.Validate(); err != nil {
		return invalid("%w", err)
	}
	return nil
}

// renew returns 0 if the session must not be renewed.
func (q query) renew() (time.Duration, error) {
	text, ok := q["renew"]
	if !ok {
		return 0, nil
	}
	return positiveDuration("renew", text)
}

// auditedCommand returns the command that a request wants to run, or nil if the request
// will be refused because it is not valid.
func auditedCommand(r *http.Request) *audit.Command {
	var command runtime.Command
	var err error
	if r.Method == http.MethodPost {
		command, _, err = bodyCommand(r)
	} else {
		var q query
		if q, err = parseQuery(r.URL.RawQuery, execParams); err == nil {
			command, err = q.command()
		}
	}
	if err != nil {
		return nil
	}
	return &audit.Command{Args: command.Args, TTY: command.TTY, User: command.User, Task: command.Task}
}

// auditExitCode adds a command's exit code to the audit log's line.
func auditExitCode(w http.ResponseWriter, code int) {
	if ans, ok := w.(*answer); ok && ans.audited != nil {
		ans.audited.ExitCode = &code
	}
}

// execStream runs a command on a websocket.
func (a *API) execStream(w http.ResponseWriter, r *http.Request, q query) error {
	chat, err := chatID(r)
	if err != nil {
		return err
	}
	command, err := q.command()
	if err != nil {
		return err
	}
	renew, err := q.renew()
	if err != nil {
		return err
	}
	if a.isForeignPage(r) {
		return errForbiddenOrigin
	}
	if !isUpgrade(r) {
		renew = 0 // what runs nothing changes nothing
	}
	exec, err := a.config.Sessions.Exec(r.Context(), chat, command, renew)
	if err != nil {
		return err
	}
	defer exec.Release()
	auditSession(w, exec.Session)
	if !isUpgrade(r) {
		return errNoUpgrade
	}
	if err := a.enterUpgrade(); err != nil {
		return err
	}
	defer a.leaveUpgrade()
	conn, err := upgradeConn(w, r)
	if err != nil {
		return nil // it has been answered
	}
	code, err := conn.run(r.Context(), exec)
	if err == nil {
		auditExitCode(w, code)
	}
	ans, ok := w.(*answer)
	if ok {
		ans.err = err
	}
	conn.end(code, a.explainExec(err, ans)) //nolint:contextcheck // the request may have ended, and its end must be told
	return nil
}

// explainExec returns a command's error for its caller, or nil.
func (a *API) explainExec(err error, ans *answer) *wire.Error {
	switch {
	case err == nil:
		return nil
	case a.stopping.Err() != nil:
		err = errShuttingDown
	}
	e := errorFor(err, a.config.Store)
	out := e.wire()
	if ans != nil {
		out.RequestID = ans.requestID
	}
	return &out
}

// isForeignPage reports whether a web page of another origin sent the request. A browser asks
// for a websocket with GET, which no other check refuses.
func (a *API) isForeignPage(r *http.Request) bool {
	as := *r
	as.Method = http.MethodPost
	return a.csrf.Check(&as) != nil
}
