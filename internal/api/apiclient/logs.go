package apiclient

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/runtime"
)

// LogsInput selects the output of a sandbox.
type LogsInput struct {
	Stream runtime.LogStream // empty: stdout
	Task   string            // empty: the main task
	Tail   int               // only so many of the last lines that are kept; -1: all
	Follow bool              // continue with new output until the session ends
	Frames bool              // as lines of JSON, see wire.LogFrame; otherwise as it is
}

// Logs copies the output of the chat's sandbox to out, and returns how the session was at
// the end. With in.Frames that is in the output instead.
func (c *Client) Logs(ctx context.Context, chatID uuid.UUID, in LogsInput, out io.Writer) (wire.LogEnd, error) {
	q := url.Values{"follow": {strconv.FormatBool(in.Follow)}}
	if in.Stream != "" {
		q.Set("type", string(in.Stream))
	}
	if in.Task != "" {
		q.Set("task", in.Task)
	}
	if in.Tail >= 0 {
		q.Set("tail", strconv.Itoa(in.Tail))
	}
	header := http.Header{}
	if in.Frames {
		header.Set("Accept", wire.TypeFrames)
	}
	res, err := c.send(ctx, request{method: http.MethodGet, path: sessionPath(chatID) + "/logs", query: q, header: header})
	if err != nil {
		return wire.LogEnd{}, err
	}
	defer res.Body.Close()
	if _, err := io.Copy(out, res.Body); err != nil {
		return wire.LogEnd{}, unanswered(ctx, fmt.Errorf("read the log: %w", err))
	}
	state, reason, _ := strings.Cut(res.Trailer.Get(wire.TrailerEnd), ": ")
	return wire.LogEnd{State: state, Reason: reason}, nil
}
