package apiclient

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/runtime"
)

const (
	maxFrame = 4 << 20 // bytes of a message from the server
	// inputChunk is how many bytes of input a message has at most.
	inputChunk = 32 << 10
)

// ExecInput describes a command to run in a chat's sandbox.
type ExecInput struct {
	runtime.Command
	Renew time.Duration // extend the session to this long from now first; 0: do not
}

func (in ExecInput) query() (url.Values, error) {
	command, err := json.Marshal(in.Args)
	if err != nil {
		return nil, err
	}
	q := url.Values{"command": {string(command)}}
	if len(in.Env) > 0 {
		env, err := json.Marshal(in.Env)
		if err != nil {
			return nil, err
		}
		q.Set("env", string(env))
	}
	for name, value := range map[string]string{"dir": in.Dir, "user": in.User, "task": in.Task, "renew": duration(in.Renew)} {
		if value != "" {
			q.Set(name, value)
		}
	}
	if in.TTY {
		q.Set("tty", "true")
	}
	if in.Size.Rows > 0 && in.Size.Columns > 0 {
		q.Set("rows", strconv.Itoa(int(in.Size.Rows)))
		q.Set("columns", strconv.Itoa(int(in.Size.Columns)))
	}
	return q, nil
}

// Exec runs a command and returns its exit code. It ends, and the command with it, when ctx
// ends. A Read of streams.Stdin may then still be waiting. If there is no exit code, the
// error is an *Error, whose Status is 0 if the command had begun.
func (c *Client) Exec(ctx context.Context, chatID uuid.UUID, in ExecInput, streams runtime.Streams) (int, error) {
	query, err := in.query()
	if err != nil {
		return 0, err
	}
	u := *c.base
	u.Path, u.RawQuery = sessionPath(chatID)+"/exec", query.Encode()
	header := http.Header{}
	if c.token != "" {
		header.Set(wire.HeaderToken, c.token)
	}
	conn, res, err := websocket.Dial(ctx, u.String(), &websocket.DialOptions{HTTPClient: c.http, HTTPHeader: header}) //nolint:bodyclose // the library closes it
	switch {
	case err != nil && res != nil && res.StatusCode != http.StatusSwitchingProtocols:
		text, _ := io.ReadAll(res.Body) // in memory
		return 0, errorOf(res, text)
	case err != nil:
		return 0, unanswered(ctx, err)
	}
	defer func() { _ = conn.CloseNow() }() // the server sees it
	conn.SetReadLimit(maxFrame)
	ctx, cancel := context.WithCancel(ctx)
	var resizing sync.WaitGroup
	defer resizing.Wait()
	defer cancel()
	// Nothing waits for this, because its Read may.
	go sendInput(ctx, conn, streams.Stdin)
	resizing.Go(func() { sendSizes(ctx, conn, streams.Resize) })
	for {
		_, text, err := conn.Read(ctx)
		if err != nil {
			return 0, unanswered(ctx, fmt.Errorf("the connection to the command broke: %w", err))
		}
		var out wire.ExecOutput
		if err := json.Unmarshal(text, &out); err != nil {
			return 0, unexpected(err)
		}
		if out.Exited && out.Result != nil {
			return outcome(*out.Result)
		}
		if err := errors.Join(writeTo(streams.Stdout, out.Stdout), writeTo(streams.Stderr, out.Stderr)); err != nil {
			return 0, err
		}
	}
}

func outcome(result wire.ExecResult) (int, error) {
	if e := result.Error; e != nil {
		return 0, &Error{Code: e.Code, Message: e.Message, Reason: e.Reason, RequestID: e.RequestID}
	}
	return result.ExitCode, nil
}

func writeTo(w io.Writer, data *wire.ExecData) error {
	if data == nil || len(data.Data) == 0 {
		return nil
	}
	if _, err := w.Write(data.Data); err != nil {
		return fmt.Errorf("write the command's output: %w", err)
	}
	return nil
}

// sendInput sends the input until its end. A failure shows when the connection is read.
func sendInput(ctx context.Context, conn *websocket.Conn, stdin io.Reader) {
	chunk := make([]byte, inputChunk)
	for stdin != nil {
		n, err := stdin.Read(chunk)
		if n > 0 && sendFrame(ctx, conn, wire.ExecInput{Stdin: &wire.ExecData{Data: chunk[:n]}}) != nil {
			return
		}
		if err != nil {
			break
		}
	}
	_ = sendFrame(ctx, conn, wire.ExecInput{Stdin: &wire.ExecData{Close: true}})
}

func sendSizes(ctx context.Context, conn *websocket.Conn, sizes <-chan runtime.WindowSize) {
	for {
		select {
		case <-ctx.Done():
			return
		case size, ok := <-sizes:
			if !ok || sendFrame(ctx, conn, wire.ExecInput{TTYSize: &wire.WindowSize{Height: size.Rows, Width: size.Columns}}) != nil {
				return
			}
		}
	}
}

func sendFrame(ctx context.Context, conn *websocket.Conn, in wire.ExecInput) error {
	text, err := json.Marshal(in)
	if err != nil {
		return err
	}
	return conn.Write(ctx, websocket.MessageText, text)
}
