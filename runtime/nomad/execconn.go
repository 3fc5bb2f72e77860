package nomad

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/coder/websocket"
	"github.com/hashicorp/nomad/api"
	"golang.org/x/sync/semaphore"

	"github.com/bivouac/bivouac/runtime"
)

const (
	// maxFrame bounds a message of Nomad, in bytes. Nomad reads output in pieces of some
	// kilobytes.
	maxFrame = 1 << 20
	// sendLimit is how long a message may take to be written that is not input, and
	// inputPatience how long it waits for input to be written.
	sendLimit     = 30 * time.Second
	inputPatience = time.Second
)

// execConn is a connection to a process that Nomad runs in a task.
type execConn struct {
	ws *websocket.Conn
	// turn is taken while a message is written. Input may take long: Nomad reads nothing
	// while the process does not read its input.
	turn *semaphore.Weighted
}

// errInputWaits is returned for a message that would have to wait for the process to read
// its input.
var errInputWaits = errors.New("the command does not read its input")

// openExec runs a program in a task.
func (d *Driver) openExec(ctx context.Context, task task, args []string, tty bool) (*execConn, error) {
	var conn *execConn
	err := d.whileBusy(ctx, limits{"exec", nil, tellLimit}, func(ctx context.Context, token string) (err error) {
		conn, err = d.dialExec(ctx, task, args, tty, token)
		return err
	})
	return conn, err
}

// dialExec asks Nomad to run a program. Nomad answers before it checks the token and starts
// the program.
//
// It goes through the configured address, with the connection of the API client. Package
// api's own Exec first asks the node that runs the task, and cannot be interrupted.
func (d *Driver) dialExec(ctx context.Context, task task, args []string, tty bool, token string) (*execConn, error) {
	command, err := json.Marshal(args)
	if err != nil {
		return nil, err
	}
	params := url.Values{
		"task": {task.name}, "command": {string(command)}, "tty": {strconv.FormatBool(tty)},
	}
	if task.namespace != "" {
		params.Set("namespace", task.namespace)
	}
	if d.region != "" {
		params.Set("region", d.region)
	}
	header := http.Header{}
	if token != "" {
		header.Set("X-Nomad-Token", token)
	}
	address := strings.TrimSuffix(d.client.Address(), "/") + "/v1/client/allocation/" + url.PathEscape(task.alloc) + "/exec?" + params.Encode()
	ws, res, err := websocket.Dial(ctx, address, &websocket.DialOptions{ //nolint:bodyclose // the library closes it
		HTTPClient: &http.Client{Transport: rawTransport{d.client.Raw()}},
		HTTPHeader: header,
	})
	if err != nil {
		if res != nil && res.StatusCode != http.StatusSwitchingProtocols {
			body, _ := io.ReadAll(res.Body) // in memory, at most 1 KiB
			return nil, &upgradeError{res.StatusCode, strings.TrimSpace(string(body))}
		}
		return nil, err
	}
	ws.SetReadLimit(maxFrame)
	return &execConn{ws: ws, turn: semaphore.NewWeighted(1)}, nil
}

// rawTransport sends requests with the HTTP client of an API client.
type rawTransport struct{ raw *api.Raw }

func (t rawTransport) RoundTrip(r *http.Request) (*http.Response, error) { return t.raw.Do(r) }

// upgradeError is an answer of Nomad to the request for a websocket. It has the methods of
// [api.UnexpectedResponseError].
type upgradeError struct {
	status int
	body   string
}

func (e *upgradeError) Error() string {
	return fmt.Sprintf("answer %d instead of a websocket: %s", e.status, e.body)
}
func (e *upgradeError) StatusCode() int { return e.status }
func (e *upgradeError) Body() string    { return e.body }
func (e *upgradeError) HasBody() bool   { return e.body != "" }

// send sends one message, unless it would have to wait for input.
func (c *execConn) send(ctx context.Context, in api.ExecStreamingInput) error {
	patient, stop := context.WithTimeout(ctx, inputPatience)
	defer stop()
	if c.turn.Acquire(patient, 1) != nil {
		return cmp.Or(ctx.Err(), errInputWaits)
	}
	defer c.turn.Release(1)
	ctx, cancel := context.WithTimeout(ctx, sendLimit)
	defer cancel()
	return c.write(ctx, in)
}

// input sends input to the process. That takes as long as the process does not read it.
func (c *execConn) input(ctx context.Context, data api.ExecStreamingIOOperation) error {
	if err := c.turn.Acquire(ctx, 1); err != nil {
		return err
	}
	defer c.turn.Release(1)
	return c.write(ctx, api.ExecStreamingInput{Stdin: &data})
}

func (c *execConn) write(ctx context.Context, in api.ExecStreamingInput) error {
	text, err := json.Marshal(in)
	if err != nil {
		return err
	}
	return c.ws.Write(ctx, websocket.MessageText, text)
}

func (c *execConn) resize(ctx context.Context, size runtime.WindowSize) error {
	return c.send(ctx, api.ExecStreamingInput{TTYSize: &api.TerminalSize{Height: int(size.Rows), Width: int(size.Columns)}})
}

// receive returns the next message. When ctx ends, it closes the connection.
func (c *execConn) receive(ctx context.Context) (api.ExecStreamingOutput, error) {
	var out api.ExecStreamingOutput
	_, text, err := c.ws.Read(ctx)
	if err != nil {
		return out, reasonOf(err)
	}
	if err := json.Unmarshal(text, &out); err != nil {
		return out, fmt.Errorf("a message of Nomad: %w", err)
	}
	return out, nil
}

func (c *execConn) close() { _ = c.ws.CloseNow() }

// errNotStarted is returned if Nomad does not know yet that the task runs (a sandbox may
// answer before), or says that a process ended before it said a word: Nomad's docker driver
// takes a process that Docker is about to start for one that has ended.
var errNotStarted = errors.New("not started yet")

// reasonOf returns why Nomad ended a connection. Nomad has only words for that.
func reasonOf(err error) error {
	closed, ok := errors.AsType[websocket.CloseError](err)
	if !ok {
		return fmt.Errorf("the connection broke: %w", err)
	}
	switch reason := closed.Reason; {
	case strings.HasSuffix(reason, "Permission denied"), strings.HasSuffix(reason, "ACL token not found"), strings.HasSuffix(reason, "token expired"):
		return fmt.Errorf("%w: %s (exec needs alloc-exec, and for raw_exec also alloc-node-exec)", runtime.ErrPermission, reason)
	case strings.HasSuffix(reason, "not started yet."), strings.HasSuffix(reason, "is not running."):
		return fmt.Errorf("%w: %s", errNotStarted, reason)
	case strings.HasSuffix(reason, "task not found"), strings.Contains(reason, "unknown task name "):
		return fmt.Errorf("%w: the sandbox has no such task: %s", runtime.ErrInvalid, reason)
	case strings.Contains(reason, "failed to start command: "):
		return fmt.Errorf("%w: the sandbox needs sh, env, grep and sleep to run commands: %s", runtime.ErrInvalid, reason)
	default:
		return fmt.Errorf("the connection was ended: %s", reason)
	}
}
