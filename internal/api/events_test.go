package api_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/store/memory"
	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/scheduler"
)

var batches = []scheduler.EventBatch{
	{Index: 43, Changes: []scheduler.Change{{
		Index: 43, Type: scheduler.ChangeDead, Time: session.CreatedAt, ChatID: chat, SessionID: session.SessionID,
		AgentID: "researcher", Runtime: "process", Reason: "killed by <signal> 9", Caller: "bivouac",
	}}},
	{}, // a heartbeat
	{Index: 45, Changes: []scheduler.Change{
		{Index: 45, Type: scheduler.ChangeReplaced, Time: session.CreatedAt, ChatID: chat, AgentID: "researcher", Caller: "alice", RequestID: "r1"},
		{Index: 45, Type: scheduler.ChangeCreated, Time: session.CreatedAt, ChatID: chat, AgentID: "researcher", Caller: "alice", RequestID: "r1"},
	}},
}

func TestEventsAsTheCallerSeesThem(t *testing.T) {
	res, body := start(t, &fake{batches: batches}).send(events)
	must.Eq(t, "application/x-ndjson", res.Header.Get("Content-Type"))
	must.Eq(t, "42", res.Header.Get(wire.HeaderIndex))
	lines := strings.SplitAfter(body, "\n")
	must.Len(t, 5, lines)
	must.Eq(t, "{}\n", lines[0])
	must.Eq(t, `{"Index":43,"Events":[{"Topic":"Session","Type":"dead","Key":"7d3f2a54-5b0e-4a55-8d2c-3f1f9b6f2c01","Index":43,`+
		`"Payload":{"time":"2026-03-01T09:30:00.123456Z","chat_id":"7d3f2a54-5b0e-4a55-8d2c-3f1f9b6f2c01",`+
		`"session_id":"0f0c3c1a-6c1d-4f0e-9a53-0d9a7f3b8a10","agent_id":"researcher","runtime":"process",`+
		`"reason":"killed by <signal> 9","caller":"bivouac","request_id":""}}]}`+"\n", lines[1])
	must.Eq(t, "{}\n", lines[2])
	must.StrContains(t, lines[3], `{"Index":45,"Events":[{"Topic":"Session","Type":"replaced",`)
	must.StrContains(t, lines[3], `,{"Topic":"Session","Type":"created",`)
}

func TestQueryOfEvents(t *testing.T) {
	for query, want := range map[string]scheduler.EventQuery{
		"":                                  {Follow: true},
		"?follow=false":                     {},
		"?index=0&follow=true":              {After: new(uint64), Follow: true},
		"?index=42&agent_id=a&follow=false": {After: new(uint64(42)), AgentID: "a"},
		"?type=dead,lost&follow=false&chat_id=" + chat.String(): {ChatID: chat, Types: []scheduler.ChangeType{"dead", "lost"}},
	} {
		t.Run(query, func(t *testing.T) {
			f := &fake{}
			a := start(t, f)
			stream, leave := a.stream("/v1/events"+query, "")
			defer leave()
			must.Eq(t, "{}", stream.next())
			must.Eq(t, want, f.events)
		})
	}
	for _, query := range []string{"index=-1", "index=a", "index=", "chat_id=1", "follow=yes", "follow=1", "limit=1"} {
		t.Run(query, func(t *testing.T) {
			status, refusal := start(t, &fake{}).refused(request{method: "GET", path: "/v1/events?" + query})
			must.Eq(t, 400, status)
			must.Eq(t, wire.CodeInvalid, refusal.Code)
		})
	}
}

func TestHeadOfEventsDoesNotWait(t *testing.T) {
	res, body := start(t, &fake{}).send(request{method: "HEAD", path: "/v1/events"})
	must.Eq(t, 200, res.StatusCode)
	must.Eq(t, "42", res.Header.Get(wire.HeaderIndex))
	must.Eq(t, "", body)
}

func TestEventsThatAreMissedEndTheStream(t *testing.T) {
	res, body := start(t, &fake{late: scheduler.ErrIndexTooOld}).send(events)
	must.Eq(t, `{}`+"\n"+`{"Error":{"code":"index_too_old","message":"events after this index are no longer kept, or the index is of another store; 0 starts at the oldest","request_id":"`+
		res.Header.Get(wire.HeaderRequestID)+`"}}`+"\n", body)
}

// eventStream is an answer that is read line by line.
type eventStream struct {
	t     *testing.T
	lines *bufio.Reader
}

// stream begins to read events. It returns a function that leaves.
func (a *agent) stream(path, token string) (*eventStream, func()) {
	a.t.Helper()
	ctx, cancel := context.WithCancel(a.t.Context())
	r := request{method: "GET", path: path}
	if token != "" {
		r.header = http.Header{wire.HeaderToken: {token}}
	}
	res, err := http.DefaultClient.Do(a.newRequest(ctx, r))
	must.NoError(a.t, err)
	must.Eq(a.t, http.StatusOK, res.StatusCode)
	return &eventStream{a.t, bufio.NewReader(res.Body)}, func() {
		cancel()
		_ = res.Body.Close()
	}
}

// next returns the next line.
func (s *eventStream) next() string {
	s.t.Helper()
	line, err := s.lines.ReadString('\n')
	must.NoError(s.t, err)
	return strings.TrimSuffix(line, "\n")
}

// event returns the next line that is no heartbeat.
func (s *eventStream) event() (batch wire.EventBatch) {
	s.t.Helper()
	for batch.Index == 0 {
		must.NoError(s.t, json.Unmarshal([]byte(s.next()), &batch))
		must.Nil(s.t, batch.Error)
	}
	return batch
}

func TestShutdownEndsEventsCleanly(t *testing.T) {
	a := start(t, &fake{})
	stream, leave := a.stream("/v1/events", "")
	must.Eq(t, "{}", stream.next())
	must.NoError(t, a.server.Shutdown(t.Context()))
	_, err := stream.lines.ReadByte()
	must.ErrorIs(t, err, io.EOF)
	leave()
}

func TestReaderOfEventsWhoDoesNotReadIsCutOff(t *testing.T) {
	f := &fake{batches: batches}
	overTime(t, f, func(t *testing.T, conn net.Conn) {
		f.left = make(chan struct{}, 1) // of the bubble
		_, err := io.WriteString(conn, "GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
		must.NoError(t, err)
		began := time.Now()
		<-f.left
		must.Eq(t, 30*time.Second, time.Since(began))
	})
}

func TestReadersOfEventsAreBounded(t *testing.T) {
	// Given as many readers as one caller may have.
	a := start(t, &fake{}, func(c *api.Config) {
		c.Connections = 8
		c.Authenticate = func(_ context.Context, credential, _ string) (scheduler.Caller, error) {
			return scheduler.Caller{Name: credential, Method: "token"}, nil
		}
	})
	for range 2 {
		_, leave := a.stream("/v1/events", "reader")
		t.Cleanup(leave)
	}
	status, refusal, header := a.as("reader", request{method: "GET", path: "/v1/events"})
	must.Eq(t, 429, status)
	must.StrContains(t, refusal.Message, "the caller has 2 streams of events already")
	must.Eq(t, "1", header.Get("Retry-After"))

	// Then others may have some, until all are taken.
	for range 2 {
		_, leave := a.stream("/v1/events", "operator")
		t.Cleanup(leave)
	}
	status, refusal, _ = a.as("auditor", request{method: "GET", path: "/v1/events"})
	must.Eq(t, 429, status)
	must.StrContains(t, refusal.Message, "4 streams of events already")
	status, _, _ = a.as("reader", get)
	must.Eq(t, 200, status)
}

// running starts the background work of a scheduler.
func running(t *testing.T, s *scheduler.Scheduler) *scheduler.Scheduler {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var background sync.WaitGroup
	background.Go(func() { s.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		background.Wait()
	})
	return s
}

func TestEventsOfReplicas(t *testing.T) {
	store, driver := memory.NewStore(), fakeruntime.New("fake")
	replica := func() *agent {
		return start(t, running(t, newScheduler(t, func(c *scheduler.Config) {
			c.Store, c.Locker, c.Drivers["fake"] = store, memory.NewLocker(store), driver
		})))
	}
	first, second := replica(), replica()
	one, leaveOne := first.stream("/v1/events", "")
	defer leaveOne()
	other, leaveOther := second.stream("/v1/events", "")
	defer leaveOther()
	for _, a := range []*agent{first, second, first} {
		res, body := a.send(request{method: "PUT", path: "/v1/sessions/" + uuid.NewString(), body: goodCreate})
		must.Eq(t, http.StatusCreated, res.StatusCode, must.Sprint(body))
	}

	// All replicas send the same.
	var indexes []uint64
	for i := range 6 {
		batch := one.event()
		must.Eq(t, batch, other.event())
		must.Eq(t, []string{"created", "ready"}[i%2], batch.Events[0].Type)
		indexes = append(indexes, batch.Index)
	}

	// A reader goes on at another one, also at one that was started later.
	for _, a := range []*agent{first, second, replica()} {
		rest, leave := a.stream(fmt.Sprintf("/v1/events?index=%d&type=ready", indexes[2]), "")
		must.Eq(t, indexes[3], rest.event().Index)
		must.Eq(t, indexes[5], rest.event().Index)
		leave()
	}
}

func TestAThousandReadersOfEvents(t *testing.T) {
	const readers = 1000
	sessions := running(t, newScheduler(t))
	server := httptest.NewServer(api.New(testConfig(sessions, io.Discard)))
	t.Cleanup(server.Close)
	a := &agent{t: t, url: server.URL}
	var streams []*eventStream
	for range readers {
		stream, leave := a.stream("/v1/events", "")
		t.Cleanup(leave)
		streams = append(streams, stream)
	}
	_, err := sessions.Create(t.Context(), scheduler.CreateCommand{ChatID: chat, AgentID: "researcher", VolumeHostPath: "/srv/a"})
	must.NoError(t, err)
	for _, stream := range streams {
		must.Eq(t, "created", stream.event().Events[0].Type)
		must.Eq(t, "ready", stream.event().Events[0].Type)
	}
}
