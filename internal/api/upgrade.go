package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/broadcast"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

const (
	maxMessage = 128 << 10 // bytes of a message from the caller
	// pingEvery is how often the caller is asked whether it is still there, and pingLimit is
	// how long it may take to answer.
	pingEvery = 10 * time.Second
	pingLimit = 20 * time.Second
)

var errNoUpgrade = &apiError{
	status: http.StatusUpgradeRequired, code: wire.CodeUpgradeRequired,
	message: "this path is a websocket; POST to it to run a command without one",
}

// errCallerGone is returned when the connection to the caller has ended.
var errCallerGone = fmt.Errorf("%w: the caller has gone", context.Canceled)

// isUpgrade reports whether a request asks for a websocket.
func isUpgrade(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.EqualFold(r.Header.Get("Upgrade"), "websocket") &&
		r.Header.Get("Sec-WebSocket-Version") == "13" && r.Header.Get("Sec-WebSocket-Key") != ""
}

// upgrades counts the handlers that have taken a connection over. The HTTP server does not
// wait for those.
type upgrades struct {
	mu      sync.Mutex
	running int
	ended   broadcast.Cond // one of them has ended
}

// enterUpgrade counts a handler that takes its connection over, unless the API stops.
func (a *API) enterUpgrade() error {
	a.upgrades.mu.Lock()
	defer a.upgrades.mu.Unlock()
	if a.stopping.Err() != nil {
		return errShuttingDown
	}
	a.upgrades.running++
	return nil
}

func (a *API) leaveUpgrade() {
	a.upgrades.mu.Lock()
	defer a.upgrades.mu.Unlock()
	a.upgrades.running--
	a.upgrades.ended.Broadcast()
}

// Wait waits until no connection is upgraded any more, or until ctx ends. Call it after Stop.
func (a *API) Wait(ctx context.Context) error {
	return a.upgrades.ended.Wait(ctx, func() bool { return a.upgrades.running == 0 })
}

// execConn is the websocket of a running command.
type execConn struct {
	ws     *websocket.Conn
	stdin  *io.PipeReader
	input  *io.PipeWriter
	resize chan runtime.WindowSize
	busy   atomic.Bool // the command does not take the input that was read

	workers sync.WaitGroup
}

// upgradeConn takes the connection of a request over. After an error it has answered.
func upgradeConn(w http.ResponseWriter, r *http.Request) (*execConn, error) {
	if ans, ok := w.(*answer); ok {
		ans.status = http.StatusSwitchingProtocols
	}
	ws, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true}) // see isForeignPage
	if err != nil {
		return nil, err
	}
	ws.SetReadLimit(maxMessage)
	c := &execConn{ws: ws, resize: make(chan runtime.WindowSize, 1)}
	c.stdin, c.input = io.Pipe()
	return c, nil
}

// run runs the command until it ends or its caller goes.
func (c *execConn) run(ctx context.Context, exec *scheduler.Exec) (int, error) {
	running, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// What reads the connection must not end with ctx, because that would close the
	// connection without a word. It ends when the connection is closed, in end.
	reading := context.WithoutCancel(ctx)
	c.workers.Go(func() { cancel(c.read(reading)) })
	c.workers.Go(func() {
		if err := c.ping(running); err != nil {
			cancel(err)
		}
	})
	stream := func(wrap func(*wire.ExecData) wire.ExecOutput) io.Writer {
		return messageWriter(func(p []byte) error {
			err := c.send(running, wrap(&wire.ExecData{Data: p}))
			if err != nil {
				cancel(errCallerGone)
			}
			return err
		})
	}
	code, err := exec.Run(running, runtime.Streams{
		Stdin:  c.stdin,
		Stdout: stream(func(d *wire.ExecData) wire.ExecOutput { return wire.ExecOutput{Stdout: d} }),
		Stderr: stream(func(d *wire.ExecData) wire.ExecOutput { return wire.ExecOutput{Stderr: d} }),
		Resize: c.resize,
	})
	_ = c.stdin.CloseWithError(io.ErrClosedPipe) // ends a write of read
	if cause := context.Cause(running); err != nil && cause != nil {
		err = cause
	}
	return code, err
}

// read passes the caller's messages on until the connection ends, and returns why.
func (c *execConn) read(ctx context.Context) error {
	for {
		_, text, err := c.ws.Read(ctx)
		if err != nil {
			return fmt.Errorf("%w: %w", errCallerGone, err)
		}
		var in wire.ExecInput
		if err := json.Unmarshal(text, &in); err != nil {
			return invalid("a message is not as described: %w", err)
		}
		if in.TTYSize != nil {
			size := runtime.WindowSize{Rows: in.TTYSize.Height, Columns: in.TTYSize.Width}
			select {
			case <-c.resize: // a newer size replaces one that nobody took
			default:
			}
			c.resize <- size // only this goroutine sends, so there is room
		}
		if in.Stdin == nil {
			continue
		}
		// Errors mean that the command has ended, or takes no more input.
		c.busy.Store(true)
		_, _ = c.input.Write(in.Stdin.Data)
		c.busy.Store(false)
		if in.Stdin.Close {
			_ = c.input.Close()
		}
	}
}

// ping returns an error if the caller does not answer, or nil when ctx ends. The answer is
// read by read, so there is none while the command takes no input.
func (c *execConn) ping(ctx context.Context) error {
	pings := time.NewTicker(pingEvery)
	defer pings.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-pings.C:
		}
		limited, cancel := context.WithTimeout(ctx, pingLimit)
		err := c.ws.Ping(limited)
		cancel()
		late := errors.Is(err, context.DeadlineExceeded) && c.busy.Load()
		if err != nil && ctx.Err() == nil && !late {
			return errCallerGone
		}
	}
}

// send sends a message. A caller that does not read it in time is cut off.
func (c *execConn) send(ctx context.Context, out wire.ExecOutput) error {
	text, err := json.Marshal(out)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, writeLimit)
	defer cancel()
	return c.ws.Write(ctx, websocket.MessageText, text)
}

// end tells the caller how the command ended, and closes the connection.
func (c *execConn) end(code int, failure *wire.Error) {
	ctx, cancel := context.WithTimeout(context.Background(), writeLimit)
	defer cancel()
	result := wire.ExecResult{ExitCode: code}
	status, reason := websocket.StatusNormalClosure, ""
	if failure != nil {
		result = wire.ExecResult{ExitCode: -1, Error: failure}
		if failure.Code == wire.CodeShuttingDown {
			status, reason = websocket.StatusGoingAway, failure.Message
		}
	}
	// Both fail if the caller has gone.
	_ = c.send(ctx, wire.ExecOutput{Exited: true, Result: &result})
	_ = c.ws.Close(status, reason)
	c.workers.Wait()
}

// messageWriter sends what is written to it.
type messageWriter func(p []byte) error

func (w messageWriter) Write(p []byte) (int, error) {
	if err := w(p); err != nil {
		return 0, err
	}
	return len(p), nil
}
