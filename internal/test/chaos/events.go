package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/test/changelog"
)

// reader follows the events of one replica. Whenever its connection ends, it goes on after
// the last event that it got.
type reader struct {
	replica *replica

	mu          sync.Mutex
	events      []changelog.Change
	connections int
	lost        bool // it cannot go on after the last event
}

// run reads until ctx is done, or until the server says that events are lost.
func (r *reader) run(ctx context.Context) {
	for ctx.Err() == nil {
		err := r.read(ctx)
		if errors.Is(err, errEventsLost) {
			r.mu.Lock()
			r.lost = true
			r.mu.Unlock()
			return
		}
		pause(ctx, 200*time.Millisecond)
	}
}

// errEventsLost is returned if a replica cannot go on after the last event.
var errEventsLost = errors.New("the replica no longer has the events after the last one")

// batch is a line of the stream. A heartbeat has no events. An error ends the stream.
type batch struct {
	Error  *wire.Error
	Events []struct {
		Type    string
		Index   uint64
		Payload struct {
			ChatID    uuid.UUID `json:"chat_id"`
			SessionID uuid.UUID `json:"session_id"`
			RequestID string    `json:"request_id"`
		}
	}
}

// read makes one connection and reads until it ends.
func (r *reader) read(ctx context.Context) error {
	url := "http://" + r.replica.Addr + "/v1/events?index=" + strconv.FormatUint(r.last(), 10)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set(wire.HeaderToken, r.replica.token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	switch res.StatusCode {
	case http.StatusOK:
	case http.StatusGone:
		return errEventsLost
	default:
		return errors.New(res.Status)
	}
	r.mu.Lock()
	r.connections++
	r.mu.Unlock()
	for lines := json.NewDecoder(res.Body); ; {
		var b batch
		if err := lines.Decode(&b); err != nil {
			return err
		}
		if b.Error != nil && b.Error.Code == "index_too_old" {
			return errEventsLost
		}
		r.add(b)
	}
}

func (r *reader) add(b batch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range b.Events {
		r.events = append(r.events, changelog.Change{
			Index: e.Index, Type: e.Type, Chat: e.Payload.ChatID, Session: e.Payload.SessionID, Request: e.Payload.RequestID,
		})
	}
}

func (r *reader) last() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.events) == 0 {
		return 0
	}
	return r.events[len(r.events)-1].Index
}

// until waits for the event that a session is ready, and returns the events up to it. After
// eventsLimit it returns an error.
func (r *reader) until(ctx context.Context, session uuid.UUID) ([]changelog.Change, error) {
	for limit := time.Now().Add(eventsLimit); ; pause(ctx, 50*time.Millisecond) {
		r.mu.Lock()
		events, lost := slices.Clone(r.events), r.lost
		r.mu.Unlock()
		i := slices.IndexFunc(events, func(c changelog.Change) bool { return c.Type == "ready" && c.Session == session })
		switch {
		case i >= 0:
			return events[:i+1], nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case lost:
			return nil, fmt.Errorf("after %d events: %w", len(events), errEventsLost)
		case time.Now().After(limit):
			return nil, fmt.Errorf("it got %d events, and for %s not that session %s is ready", len(events), eventsLimit, session)
		}
	}
}

// requests records what callers ask for and are told, for the comparison with the events.
// The zero value is ready for use.
type requests struct {
	mu  sync.Mutex
	all []changelog.Request
}

type requestKey struct{}

// ask records a request before it is made. The context that it returns gives the request
// its ID. told records the answer.
func (q *requests) ask(ctx context.Context, kind string, chat uuid.UUID) (_ context.Context, told func(what string, chat, session uuid.UUID)) {
	r := changelog.Request{ID: uuid.NewString(), Kind: kind, Chat: chat}
	q.add(r)
	return context.WithValue(ctx, requestKey{}, r.ID), func(what string, chat, session uuid.UUID) {
		q.add(changelog.Request{ID: r.ID, Kind: kind, Chat: chat, Told: what, Session: session})
	}
}

func (q *requests) add(r changelog.Request) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.all = append(q.all, r)
}

// last returns the session that a create of the chat was last told of.
func (q *requests) last(chat uuid.UUID) uuid.UUID {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, r := range slices.Backward(q.all) {
		if r.Chat == chat && r.Told != "" {
			return r.Session
		}
	}
	return uuid.Nil
}

// identified sends the ID of a request that [requests.ask] recorded.
type identified struct{ *http.Transport }

func (t identified) RoundTrip(req *http.Request) (*http.Response, error) {
	if id, ok := req.Context().Value(requestKey{}).(string); ok {
		req = req.Clone(req.Context())
		req.Header.Set(wire.HeaderRequestID, id)
	}
	return t.Transport.RoundTrip(req)
}

// eventsLimit is how long an event may take to each reader while nothing is broken.
const eventsLimit = 30 * time.Second

// checkEvents compares the events that the readers got with each other, and with what
// callers asked for and were told. Nothing else may be in progress. It makes a session and
// waits for its event, because all earlier events have come by then.
func (w *world) checkEvents(ctx context.Context) {
	chat := w.chats[0]
	_ = w.load.delete(ctx, w.replicas[0], chat, serveLimit) // call records the result
	w.serveOne(ctx, w.replicas[0], chat)
	last := w.load.requests.last(chat)
	var all [][]changelog.Change
	for _, r := range w.readers {
		events, err := r.until(ctx, last)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			w.log.violation(wrong, r.replica.name, "the reader of events at %s: %v", r.replica.name, err)
			return
		}
		all = append(all, events)
	}
	for _, problem := range w.compareEvents(all) {
		if !w.reported[problem] {
			w.reported[problem] = true
			w.log.violation(wrong, mentioned(problem), "%s", problem)
		}
	}
	w.checked = len(all[0])
}

// compareEvents returns what is wrong with the events that the readers got.
func (w *world) compareEvents(all [][]changelog.Change) []string {
	var problems []string
	for i, events := range all[1:] {
		if difference := changelog.Difference(all[0], events); difference != "" {
			problems = append(problems, fmt.Sprintf("the events of replicas 0 and %d differ: %s", i+1, difference))
		}
	}
	leftOut := func(chat uuid.UUID) bool { return w.told.missed(chat.String()) || slices.Contains(w.theirs, chat) }
	_, outOfOrder := changelog.Check(all[0], leftOut)
	w.load.requests.mu.Lock()
	defer w.load.requests.mu.Unlock()
	return slices.Concat(problems, outOfOrder, changelog.Compare(all[0], w.load.requests.all, leftOut))
}

// eventsSummary describes what was checked.
func (w *world) eventsSummary() string {
	connections := 0
	for _, r := range w.readers {
		r.mu.Lock()
		connections += r.connections
		r.mu.Unlock()
	}
	return fmt.Sprintf("Events checked: %d, the same at each of %d replicas, read over %d connections.", w.checked, len(w.readers), connections)
}
