package nomadmodel

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"time"

	"github.com/bivouac/bivouac/internal/test/simulate/network"
)

type event struct {
	Topic      string
	Type       string
	Key        string
	Namespace  string
	FilterKeys []string
	Index      uint64
	Payload    json.RawMessage
}

// stream is one subscriber to the event stream.
type stream struct {
	body *network.Stream
	due  time.Time // when the last event in transit arrives
}

func encode(value any) json.RawMessage {
	data, err := json.Marshal(value)
	if err != nil {
		panic(err)
	}
	return data
}

func (j *job) event(kind string, deleted bool) event {
	return event{
		Topic: "Job", Type: kind, Key: *j.spec.ID, Namespace: "default",
		Payload: encode(map[string]any{"Job": j.view(), "Deleted": deleted}),
	}
}

func (e *eval) event() event {
	return event{
		Topic: "Evaluation", Type: "EvaluationUpdated", Key: e.ID, Namespace: "default",
		FilterKeys: []string{e.JobID}, Payload: encode(map[string]any{"Evaluation": e.Evaluation}),
	}
}

func (a *alloc) event() event {
	return event{
		Topic: "Allocation", Type: "AllocationUpdated", Key: a.ID, Namespace: "default",
		FilterKeys: []string{a.JobID}, Payload: encode(map[string]any{"Allocation": a.AllocationListStub}),
	}
}

// publish sends the changes of one log entry to all streams. They arrive in
// order, a little later.
func (s *Server) publish(events ...event) {
	for i := range events {
		events[i].Index = s.index
	}
	line := append(encode(map[string]any{"Index": s.index, "Events": events}), '\n')
	for _, st := range s.streams {
		delay := 200*time.Microsecond + time.Duration(s.Rand("event").Int64N(int64(8*time.Millisecond)))
		due := time.Now().Add(delay)
		if !due.After(st.due) {
			due = st.due.Add(time.Microsecond)
		}
		st.due = due
		network.After(s.ctx, time.Until(due), func() {
			if !st.body.Write(line) {
				s.mu.Lock()
				defer s.mu.Unlock()
				s.drop(st)
			}
		})
	}
}

func (s *Server) drop(st *stream) {
	s.streams = slices.DeleteFunc(s.streams, func(other *stream) bool { return other == st })
	_ = st.body.Close() // Close cannot fail
}

func (s *Server) cutStreams() {
	for _, st := range s.streams {
		_ = st.body.Close() // Close cannot fail
	}
	s.streams = nil
}

// subscribe opens a stream. It begins with a heartbeat.
func (s *Server) subscribe(ctx context.Context) *http.Response {
	st := &stream{body: network.NewStream(ctx)}
	st.body.Write([]byte("{}\n"))
	s.mu.Lock()
	s.streams = append(s.streams, st)
	s.mu.Unlock()
	s.heartbeat(st)
	resp := network.Answer(http.StatusOK, nil)
	resp.Body, resp.ContentLength = st.body, -1
	return resp
}

// heartbeat sends an empty object every 30 s, so that the reader knows that the
// stream is open.
func (s *Server) heartbeat(st *stream) {
	network.After(s.ctx, 30*time.Second, func() {
		if st.body.Write([]byte("{}\n")) {
			s.heartbeat(st)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.drop(st)
	})
}
