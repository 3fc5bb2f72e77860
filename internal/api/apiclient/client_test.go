package apiclient_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/test/apitest"
	"github.com/bivouac/bivouac/runtime"
)

var (
	chat    = uuid.MustParse("7d3f2a54-5b0e-4a55-8d2c-3f1f9b6f2c01")
	session = wire.Session{
		SessionID:      uuid.MustParse("0f0c3c1a-6c1d-4f0e-9a53-0d9a7f3b8a10"),
		ChatID:         chat,
		AgentID:        "researcher",
		VolumeHostPath: "/srv/a",
		Runtime:        "process",
		ContainerID:    "4711",
		Endpoint:       &runtime.Endpoint{IP: netip.MustParseAddr("10.0.3.7"), Port: 25017},
		CreatedAt:      time.Date(2026, 3, 1, 9, 30, 0, 0, time.UTC),
		ExpiresAt:      time.Date(2026, 3, 1, 10, 0, 0, 0, time.UTC),
		State:          "running",
		Owner:          "anonymous",
		Labels:         map[string]string{"ticket": "4711"},
	}
)

const sessionPath = "/v1/sessions/7d3f2a54-5b0e-4a55-8d2c-3f1f9b6f2c01"

// agent answers each request with the same, and notes it. Both sides of what
// passes are held against openapi.json.
type agent struct {
	status int
	header map[string]string
	body   any

	request string // method, path and query
	sent    string // its body
}

func (a *agent) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	text, _ := io.ReadAll(r.Body)
	a.request, a.sent = r.Method+" "+r.URL.RequestURI(), string(text)
	if r.Header.Get(wire.HeaderStages) == "true" {
		for _, stage := range []string{"placed", "started", "ready"} {
			w.Header().Set(wire.HeaderStage, stage)
			w.WriteHeader(http.StatusProcessing)
		}
		w.Header().Del(wire.HeaderStage)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set(wire.HeaderRequestID, "r1")
	for name, value := range a.header {
		w.Header().Set(name, value)
	}
	w.WriteHeader(a.status)
	_ = json.NewEncoder(w).Encode(a.body)
}

func start(t *testing.T, a *agent) *apiclient.Client {
	t.Helper()
	server := httptest.NewServer(a)
	t.Cleanup(server.Close)
	client, err := apiclient.New(server.URL, apitest.New(t, nil))
	must.NoError(t, err)
	return client
}

func TestCreate(t *testing.T) {
	a := &agent{status: 201, body: wire.CreateAnswer{Result: "created", Session: session}}
	client := start(t, a)
	var stages []runtime.Stage
	got, err := client.Create(t.Context(), chat, apiclient.CreateInput{
		AgentID: "researcher", VolumeHostPath: "/srv/a", Runtime: "process", TTL: 90 * time.Minute,
		Progress: func(stage runtime.Stage) { stages = append(stages, stage) },
	})
	must.NoError(t, err)
	must.Eq(t, wire.CreateAnswer{Result: "created", Session: session}, got)
	must.Eq(t, []runtime.Stage{"placed", "started", "ready"}, stages)
	must.Eq(t, "PUT "+sessionPath, a.request)
	must.Eq(t, `{"agent_id":"researcher","volume_host_path":"/srv/a","runtime":"process","ttl":"1h30m0s"}`, a.sent)

	// given nobody who wants the stages, no runtime and no TTL
	_, err = client.Create(t.Context(), chat, apiclient.CreateInput{AgentID: "researcher", VolumeHostPath: "/srv/a"})
	must.NoError(t, err)
	must.Eq(t, `{"agent_id":"researcher","volume_host_path":"/srv/a"}`, a.sent)
}

func TestGet(t *testing.T) {
	token := strings.Repeat("5e", 32)
	a := &agent{status: 200, header: map[string]string{wire.HeaderIndex: "42"}, body: wire.GetAnswer{Session: session, Capabilities: []string{"read"}, AccessToken: token}}
	client := start(t, a)
	got, index, err := client.Get(t.Context(), chat, apiclient.Block{})
	must.NoError(t, err)
	must.Eq(t, wire.GetAnswer{Session: session, Capabilities: []string{"read"}, AccessToken: token}, got)
	must.Eq(t, 42, index)
	must.Eq(t, "GET "+sessionPath, a.request)

	_, _, err = client.Get(t.Context(), chat, apiclient.Block{Index: 42, Wait: 30 * time.Second})
	must.NoError(t, err)
	must.Eq(t, "GET "+sessionPath+"?index=42&wait=30s", a.request)
}

func TestGetOfNothingHasAnIndex(t *testing.T) {
	client := start(t, &agent{
		status: 404, header: map[string]string{wire.HeaderIndex: "42"},
		body: wire.ErrorAnswer{Error: wire.Error{Code: wire.CodeNotFound, Message: "no session", RequestID: "r1"}},
	})
	_, index, err := client.Get(t.Context(), chat, apiclient.Block{})
	must.Eq(t, 42, index)
	answer, ok := errors.AsType[*apiclient.Error](err)
	must.True(t, ok)
	must.Eq(t, wire.CodeNotFound, answer.Code)
	must.Eq(t, "no session", answer.Error())
}

func TestList(t *testing.T) {
	page := wire.ListAnswer{Sessions: []wire.Session{session}, NextToken: "more"}
	a := &agent{status: 200, header: map[string]string{wire.HeaderIndex: "43"}, body: page}
	client := start(t, a)
	got, index, err := client.List(t.Context(), apiclient.ListInput{})
	must.NoError(t, err)
	must.Eq(t, page, got)
	must.Eq(t, 43, index)
	must.Eq(t, "GET /v1/sessions", a.request)

	_, _, err = client.List(t.Context(), apiclient.ListInput{
		AgentID: "a&b", PerPage: 7, NextToken: "t=1", Block: apiclient.Block{Index: 43},
	})
	must.NoError(t, err)
	must.Eq(t, "GET /v1/sessions?agent_id=a%26b&index=43&next_token=t%3D1&per_page=7", a.request)
}

func TestRenew(t *testing.T) {
	a := &agent{status: 200, body: wire.SessionAnswer{Session: session}}
	client := start(t, a)
	got, err := client.Renew(t.Context(), chat, time.Hour)
	must.NoError(t, err)
	must.Eq(t, session, got)
	must.Eq(t, "POST "+sessionPath+"/renew", a.request)
	must.Eq(t, `{"ttl":"1h0m0s"}`, a.sent)

	_, err = client.Renew(t.Context(), chat, 0)
	must.NoError(t, err)
	must.Eq(t, `{}`, a.sent)
}

func TestDelete(t *testing.T) {
	want := wire.DeleteAnswer{Result: "deleted", ChatID: chat, SessionID: session.SessionID, ContainerID: "4711"}
	a := &agent{status: 200, body: want}
	got, err := start(t, a).Delete(t.Context(), chat)
	must.NoError(t, err)
	must.Eq(t, want, got)
	must.Eq(t, "DELETE "+sessionPath, a.request)
	must.Eq(t, "", a.sent)
}

func TestAdoptAndForget(t *testing.T) {
	adopted := wire.AdoptAnswer{Instance: "default-4f7k2mq6zt3vxw5yabcd", Adopted: 2}
	a := &agent{status: 200, body: adopted}
	gotAdopted, err := start(t, a).Adopt(t.Context(), adopted.Instance)
	must.NoError(t, err)
	must.Eq(t, adopted, gotAdopted)
	must.Eq(t, "POST /v1/operator/adopt", a.request)
	must.Eq(t, `{"instance":"default-4f7k2mq6zt3vxw5yabcd"}`, a.sent)

	forgotten := wire.ForgetAnswer{Instance: adopted.Instance, Left: []wire.Left{{Instance: "default", Sandboxes: 2, Look: "nomad"}}}
	a = &agent{status: 200, body: forgotten}
	gotForgotten, err := start(t, a).Forget(t.Context())
	must.NoError(t, err)
	must.Eq(t, forgotten, gotForgotten)
	must.Eq(t, "POST /v1/operator/forget", a.request)
	must.Eq(t, "", a.sent)
}

func TestCleanup(t *testing.T) {
	want := wire.CleanupAnswer{Cleaned: []wire.Session{session}, ErrorCount: 2}
	a := &agent{status: 200, body: want}
	got, err := start(t, a).Cleanup(t.Context())
	must.NoError(t, err)
	must.Eq(t, want, got)
	must.Eq(t, "POST /v1/cleanup", a.request)
}

func TestHealth(t *testing.T) {
	a := &agent{status: 200, body: wire.HealthAnswer{Status: "ok", Checks: map[string]wire.Check{"store": {Status: "ok"}}}}
	client := start(t, a)
	got, err := client.Health(t.Context())
	must.NoError(t, err)
	must.Eq(t, a.body, any(got))
	must.Eq(t, "GET /v1/agent/health", a.request)

	a.status, a.body = 503, wire.HealthAnswer{
		Status: "failing", Checks: map[string]wire.Check{"store": {Status: "failing", Error: "refused"}},
		Error: &wire.Error{Code: wire.CodeUnhealthy, Message: "failing: store", RequestID: "r1"},
	}
	got, err = client.Health(t.Context())
	must.ErrorContains(t, err, "failing: store")
	must.Eq(t, a.body, any(got))
}

func TestWhatAnErrorTells(t *testing.T) {
	client := start(t, &agent{status: 409, body: wire.ErrorAnswer{
		Error:   wire.Error{Code: wire.CodeConflict, Message: "agent_id differs", Reason: "agent_id", RequestID: "r1"},
		Session: &session,
	}})
	got, err := client.Create(t.Context(), chat, apiclient.CreateInput{AgentID: "other", VolumeHostPath: "/srv/a"})
	must.Eq(t, wire.CreateAnswer{}, got)
	answer, ok := errors.AsType[*apiclient.Error](err)
	must.True(t, ok)
	must.Eq(t, 409, answer.Status)
	must.Eq(t, wire.CodeConflict, answer.Code)
	must.Eq(t, "agent_id", answer.Reason)
	must.Eq(t, "r1", answer.RequestID)
	must.Eq(t, &session, answer.Session)
	must.Eq(t, 0, answer.RetryAfter)

	client = start(t, &agent{status: 503, header: map[string]string{"Retry-After": "5"}, body: wire.ErrorAnswer{
		Error: wire.Error{Code: wire.CodeNotPlaced, Message: "no room", RequestID: "r1"},
	}})
	_, err = client.Create(t.Context(), chat, apiclient.CreateInput{AgentID: "a", VolumeHostPath: "/srv/a"})
	answer, ok = errors.AsType[*apiclient.Error](err)
	must.True(t, ok)
	must.Eq(t, 5*time.Second, answer.RetryAfter)
}

func TestAnswersThatAreNotAnAgents(t *testing.T) {
	cases := []struct {
		when   string
		status int
		header map[string]string
		body   any
		says   string
	}{
		{"an error of something else", 502, nil, "bad gateway", "unexpected answer: 502 Bad Gateway"},
		{"a redirect", 302, map[string]string{"Location": "/login"}, "", "unexpected answer: 302 Found"},
		{"another success", 204, nil, nil, "unexpected answer: 204 No Content"},
		{"a page in place of a session", 200, nil, "hello", "not as expected"},
	}
	for _, c := range cases {
		t.Run(c.when, func(t *testing.T) {
			server := httptest.NewServer(&agent{status: c.status, header: c.header, body: c.body})
			defer server.Close()
			client, err := apiclient.New(server.URL, nil)
			must.NoError(t, err)
			_, _, err = client.Get(t.Context(), chat, apiclient.Block{})
			must.ErrorContains(t, err, c.says)
		})
	}
}

func TestCallEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		cancel()
		<-r.Context().Done()
	}))
	defer server.Close()
	client, err := apiclient.New(server.URL, nil)
	must.NoError(t, err)
	_, _, err = client.Get(ctx, chat, apiclient.Block{Index: 1})
	must.ErrorIs(t, err, context.Canceled)
	must.False(t, errors.Is(err, apiclient.ErrUnreachable))
}

func TestUnreachable(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		panic(http.ErrAbortHandler) // breaks the connection
	}))
	client, err := apiclient.New(server.URL, nil)
	must.NoError(t, err)
	_, _, err = client.Get(t.Context(), chat, apiclient.Block{})
	must.ErrorIs(t, err, apiclient.ErrUnreachable, must.Sprint("a connection that breaks"))
	server.Close()
	_, _, err = client.Get(t.Context(), chat, apiclient.Block{})
	must.ErrorIs(t, err, apiclient.ErrUnreachable, must.Sprint("nobody listens"))
}

func TestAddresses(t *testing.T) {
	for address, ok := range map[string]bool{
		"127.0.0.1:4747": true, "localhost:4747": true, "[::1]:4747": true,
		"http://localhost:4747": true, "http://localhost:4747/": true, "https://bivouac.example": true,
		"unix:///run/x.sock": true, "unix://x.sock": false, "unix:x.sock": false, "unix:///run/x.sock?a=b": false,
		"": false, "http://": false, "ftp://localhost": false, "http://localhost:4747/v1": false,
		"http://localhost:4747?x=1": false, "http://user:pw@localhost": false, "http://%zz": false,
	} {
		t.Run(address, func(t *testing.T) {
			_, err := apiclient.New(address, nil)
			must.Eq(t, ok, err == nil, must.Sprint(err))
		})
	}
}
