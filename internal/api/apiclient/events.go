package apiclient

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/wire"
)

const (
	// maxSilence is how long a stream of events may be silent. The server sends a
	// heartbeat every 10 s.
	maxSilence = 30 * time.Second

	// maxEventLine bounds the length of a line of events, in bytes.
	maxEventLine = 1 << 20
)

var (
	errSilent = errors.New("the server sends no heartbeats")
	errEnded  = errors.New("the server ended the stream")
)

// EventsInput selects events.
type EventsInput struct {
	// After selects the events after this index. 0 selects all that are kept, and nil
	// those that happen from now on.
	After   *uint64
	AgentID string    // empty: of all AI agents
	ChatID  uuid.UUID // zero: of all chats
	Types   []string  // empty: all
	Follow  bool      // wait for more; else end after the events that are kept
}

func (in EventsInput) query() url.Values {
	q := url.Values{"follow": {strconv.FormatBool(in.Follow)}}
	if in.After != nil {
		q.Set("index", strconv.FormatUint(*in.After, 10))
	}
	if in.AgentID != "" {
		q.Set("agent_id", in.AgentID)
	}
	if in.ChatID != uuid.Nil {
		q.Set("chat_id", in.ChatID.String())
	}
	if len(in.Types) > 0 {
		q.Set("type", strings.Join(in.Types, ","))
	}
	return q
}

// Events yields batches of events, without the server's heartbeats. The first batch has no
// events: its Index is where to go on if no other follows. If events are no longer kept,
// at the beginning or later, the error is an *Error with code wire.CodeIndexTooOld. With
// Follow the stream ends only with an error: ErrUnreachable if the server ended it, or if
// it is silent for 30 s.
func (c *Client) Events(ctx context.Context, in EventsInput) iter.Seq2[wire.EventBatch, error] {
	return func(yield func(wire.EventBatch, error) bool) {
		err := c.events(ctx, in, func(batch wire.EventBatch) bool { return yield(batch, nil) })
		if err != nil {
			yield(wire.EventBatch{}, err)
		}
	}
}

// events returns nil if the stream is complete or yield returned false.
func (c *Client) events(ctx context.Context, in EventsInput, yield func(wire.EventBatch) bool) error {
	inTime, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(maxSilence, func() { cancel(errSilent) })
	defer silence.Stop()

	res, err := c.send(inTime, request{method: http.MethodGet, path: "/v1/events", query: in.query()})
	if err != nil {
		return silent(inTime, err)
	}
	defer res.Body.Close()
	if !yield(wire.EventBatch{Index: indexOf(res)}) {
		return nil
	}
	lines := bufio.NewScanner(res.Body)
	lines.Buffer(nil, maxEventLine)
	for lines.Scan() {
		silence.Reset(maxSilence)
		var batch wire.EventBatch
		if err := json.Unmarshal(lines.Bytes(), &batch); err != nil {
			return unexpected(err)
		}
		if e := batch.Error; e != nil {
			return &Error{Status: http.StatusGone, Code: e.Code, Message: e.Message, RequestID: e.RequestID}
		}
		if len(batch.Events) > 0 && !yield(batch) {
			return nil
		}
	}
	err = lines.Err()
	if err == nil && in.Follow {
		err = errEnded
	}
	if err != nil {
		err = silent(inTime, unanswered(ctx, fmt.Errorf("read events: %w", err)))
	}
	return err
}

// silent adds errSilent and ErrUnreachable to an error if the server has been silent for
// too long.
func silent(ctx context.Context, err error) error {
	if why := context.Cause(ctx); errors.Is(why, errSilent) {
		return fmt.Errorf("%w: %w", ErrUnreachable, why)
	}
	return err
}
