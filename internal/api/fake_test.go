package api_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"iter"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/agent/httpserver"
	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/test/apitest"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

var (
	chat    = uuid.MustParse("7d3f2a54-5b0e-4a55-8d2c-3f1f9b6f2c01")
	session = scheduler.Session{
		SessionID:      uuid.MustParse("0f0c3c1a-6c1d-4f0e-9a53-0d9a7f3b8a10"),
		ChatID:         chat,
		AgentID:        "researcher",
		VolumeHostPath: "/srv/a&b <c>",
		Runtime:        "process",
		ContainerID:    "4711",
		Endpoint:       runtime.Endpoint{IP: netip.MustParseAddr("10.0.3.7"), Port: 25017},
		CreatedAt:      time.Date(2026, 3, 1, 10, 30, 0, 123456000, time.FixedZone("CET", 3600)),
		ExpiresAt:      time.Date(2026, 3, 1, 11, 0, 0, 123456000, time.FixedZone("CET", 3600)),
		State:          scheduler.StateRunning,
		Owner:          "anonymous",
		AccessToken:    runtime.Secret(strings.Repeat("5ec2e7ab", 8)),
	}
)

// fake is a scheduler that gives the fixed session, or err, and remembers what
// it was asked. A hook that is set takes the place of its answer.
type fake struct {
	err    error
	result scheduler.Result // created where empty
	gone   bool             // the chat has no session to delete

	cleaned []scheduler.Session

	batches []scheduler.EventBatch
	late    error         // ends a stream of events that does not follow
	left    chan struct{} // gets an element when a stream of events ends; may be nil

	onCreate func(ctx context.Context, cmd scheduler.CreateCommand) error
	onGet    func(ctx context.Context) error
	onLogs   func(ctx context.Context, write func(string) error) error
	onExec   func(ctx context.Context, streams runtime.Streams) (int, error)

	mu     sync.Mutex
	create scheduler.CreateCommand
	query  scheduler.Query
	logs   scheduler.LogQuery
	ttl    time.Duration
	adopt  string
	events scheduler.EventQuery
	calls  int

	command  runtime.Command
	released int // commands whose places were given back
}

func (f *fake) note(set func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	set()
}

func (f *fake) Create(ctx context.Context, cmd scheduler.CreateCommand) (scheduler.CreateResult, error) {
	f.note(func() { f.create = cmd })
	if f.onCreate != nil {
		if err := f.onCreate(ctx, cmd); err != nil {
			return scheduler.CreateResult{}, err
		}
	}
	result := f.result
	if result == "" {
		result = scheduler.ResultCreated
	}
	return scheduler.CreateResult{Result: result, Session: session}, f.err
}

func (f *fake) Get(ctx context.Context, _ uuid.UUID, block scheduler.Block) (scheduler.Session, uint64, error) {
	f.note(func() { f.query.Block = block })
	if f.onGet != nil {
		if err := f.onGet(ctx); err != nil {
			return scheduler.Session{}, 0, err
		}
	}
	return session, 42, f.err
}

func (f *fake) List(_ context.Context, query scheduler.Query) (scheduler.Page, error) {
	f.note(func() { f.query = query })
	if f.err != nil {
		return scheduler.Page{}, f.err
	}
	return scheduler.Page{Sessions: []scheduler.Session{session}, NextToken: "more", Index: 43}, nil
}

func (f *fake) Counts(_ context.Context, agentID string) (scheduler.Counts, time.Time, error) {
	f.note(func() { f.query.AgentID = agentID })
	return scheduler.Counts{"creating": 0, "running": 3, "stopping": 0, "dead": 1, "lost": 0}, session.CreatedAt, f.err
}

func (f *fake) Pools(context.Context) ([]scheduler.PoolStatus, error) {
	f.note(func() {})
	return []scheduler.PoolStatus{
		{Pool: scheduler.Pool{Name: "default", Runtime: "nomad", Size: 10}, Ready: 7, Starting: 3, Ending: 1},
	}, f.err
}

func (f *fake) Renew(_ context.Context, _ uuid.UUID, ttl time.Duration) (scheduler.Session, error) {
	f.note(func() { f.ttl = ttl })
	return session, f.err
}

func (f *fake) Delete(_ context.Context, chatID uuid.UUID) (scheduler.DeleteResult, error) {
	f.note(func() {})
	if f.gone {
		return scheduler.DeleteResult{ChatID: chatID}, f.err
	}
	return scheduler.DeleteResult{
		Found: true, ChatID: chatID, SessionID: session.SessionID, ContainerID: session.ContainerID,
	}, f.err
}

func (f *fake) Adopt(_ context.Context, instance string) (wire.AdoptAnswer, error) {
	f.note(func() { f.adopt = instance })
	return wire.AdoptAnswer{Instance: "default-4f7k2mq6zt3vxw5yabcd", Adopted: 3, Failed: 1}, f.err
}

func (f *fake) Forget(context.Context) (wire.ForgetAnswer, error) {
	f.note(func() {})
	return wire.ForgetAnswer{Instance: "default-4f7k2mq6zt3vxw5yabcd", Left: []wire.Left{
		{Instance: "default", Sandboxes: 2, Look: "nomad operator api /v1/jobs"},
	}}, f.err
}

// Logs passes on "one\n" and "two\n", or what onLogs does.
func (f *fake) Logs(ctx context.Context, _ uuid.UUID, query scheduler.LogQuery, write func(runtime.LogChunk) error) (scheduler.LogEnd, error) {
	f.note(func() { f.logs = query })
	if f.err != nil {
		return scheduler.LogEnd{}, f.err
	}
	if f.onLogs == nil {
		f.onLogs = func(_ context.Context, write func(string) error) error {
			if err := write("one\n"); err != nil {
				return err
			}
			return write("two\n")
		}
	}
	next := int64(0)
	err := f.onLogs(ctx, func(text string) error {
		chunk := runtime.LogChunk{Stream: query.Stream, Offset: next, Data: []byte(text)}
		next += int64(len(text))
		return write(chunk)
	})
	return scheduler.LogEnd{Session: session, State: "dead", Reason: "exit code 3"}, err
}

func (f *fake) CleanupExpired(context.Context) (scheduler.CleanupResult, error) {
	f.note(func() {})
	return scheduler.CleanupResult{Cleaned: f.cleaned, ErrorCount: 1}, f.err
}

func (f *fake) Repair(context.Context, uuid.UUID) (scheduler.RepairResult, error) {
	f.note(func() {})
	if f.gone {
		return scheduler.RepairResult{Result: scheduler.RepairRemoved}, f.err
	}
	return scheduler.RepairResult{Result: scheduler.RepairAdopted, Session: &session}, f.err
}

// Exec runs commands that copy their input to their output, or onExec.
func (f *fake) Exec(_ context.Context, _ uuid.UUID, command runtime.Command, renew time.Duration) (*scheduler.Exec, error) {
	f.note(func() { f.command, f.ttl = command, renew })
	if f.err != nil {
		return nil, f.err
	}
	run := f.onExec
	if run == nil {
		run = func(_ context.Context, streams runtime.Streams) (int, error) {
			_, err := io.Copy(streams.Stdout, streams.Stdin)
			return 0, err
		}
	}
	return &scheduler.Exec{Session: session, Run: run, Release: func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.released++
	}}, nil
}

// Events yields the changes, and then ends or waits for the end of ctx.
func (f *fake) Events(ctx context.Context, query scheduler.EventQuery) iter.Seq2[scheduler.EventBatch, error] {
	f.note(func() { f.events = query })
	return func(yield func(scheduler.EventBatch, error) bool) {
		if f.left != nil {
			defer func() { f.left <- struct{}{} }()
		}
		if f.err != nil {
			yield(scheduler.EventBatch{}, f.err)
			return
		}
		if !yield(scheduler.EventBatch{Index: 42}, nil) {
			return
		}
		for _, batch := range f.batches {
			if !yield(batch, nil) {
				return
			}
		}
		if query.Follow {
			<-ctx.Done()
			yield(scheduler.EventBatch{}, ctx.Err())
			return
		}
		if f.late != nil {
			yield(scheduler.EventBatch{}, f.late)
		}
	}
}

func (f *fake) Why(context.Context, uuid.UUID) ([]scheduler.Story, error) {
	f.note(func() {})
	return []scheduler.Story{
		{
			SessionID: session.SessionID, AgentID: session.AgentID, Runtime: session.Runtime,
			State: scheduler.StateDead, Outcome: "Its sandbox ended: exit code 3.",
			Events: []scheduler.StoryEvent{
				{Time: session.CreatedAt, Source: scheduler.SourceBivouac, Text: "created by anonymous"},
				{Source: session.Runtime, Text: "some <b>time</b>"},
			},
		},
		{SessionID: chat, AgentID: session.AgentID, Runtime: session.Runtime, Outcome: "Deleted by anonymous."},
	}, f.err
}

// log is an hclog output that may be read while it is written.
type log struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// agent is the API on a loopback address, with a client that holds every answer
// against openapi.json.
type agent struct {
	t        *testing.T
	url      string
	log      *log
	server   *http.Server
	served   chan struct{} // has one element for each request that was served
	recorder *apitest.Recorder
}

func testConfig(sessions api.Sessions, out io.Writer) api.Config {
	operator, _ := sessions.(api.Operator) // a fake is both
	return api.Config{
		Sessions: sessions,
		Operator: operator,
		Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
			_, _ = io.WriteString(w, "sandbox_active_count 3\n")
		}),
		Instance: func() string { return "default-0123456789abcdefghij" },
		Self:     wire.SelfAnswer{Version: "1.2.3", Revision: "abc", Config: map[string]any{"ttl": "30m"}},
		Runtimes: func(context.Context) []wire.Runtime {
			return []wire.Runtime{{Name: "process", Version: "1.2.3"}, {Name: "mine"}}
		},
		Replicas: func(context.Context) []wire.Replica {
			return []wire.Replica{{Name: "host-1", Version: "1.2.3", Addresses: []string{"127.0.0.1:4747"}, StartedAt: time.Date(2031, 3, 5, 14, 7, 30, 0, time.UTC)}}
		},
		Refused: func(context.Context, string) {},
		Logger:  hclog.New(&hclog.LoggerOptions{Output: out, Level: hclog.Trace}),
	}
}

func start(t *testing.T, sessions api.Sessions, change ...func(*api.Config)) *agent {
	t.Helper()
	return startRecorded(t, apitest.New(t, nil), sessions, change...)
}

// mostConnections is how many connections an agent under test keeps open.
const mostConnections = 200

// startRecorded is start with a recorder that several agents share.
func startRecorded(t *testing.T, recorder *apitest.Recorder, sessions api.Sessions, change ...func(*api.Config)) *agent {
	t.Helper()
	a := &agent{t: t, log: &log{}, served: make(chan struct{}, 1024), recorder: recorder}
	config := testConfig(sessions, a.log)
	for _, change := range change {
		change(&config)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must.NoError(t, err)
	a.url = "http://" + listener.Addr().String()
	handler := api.New(config)
	a.server = httpserver.New(handler, mostConnections, config.Logger)
	a.server.RegisterOnShutdown(handler.Stop)
	inner := a.server.Handler
	a.server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() { a.served <- struct{}{} }()
		inner.ServeHTTP(w, r)
	})
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := a.server.Serve(listener); err != http.ErrServerClosed {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(func() {
		_ = a.server.Close()
		serving.Wait()
	})
	return a
}

// request is one request to the API. What is empty is left out.
type request struct {
	method, path, body string
	host, contentType  string // contentType: application/json where there is a body
	header             http.Header
}

func (a *agent) newRequest(ctx context.Context, in request) *http.Request {
	a.t.Helper()
	var body io.Reader
	if in.body != "" {
		body = strings.NewReader(in.body)
	}
	req, err := http.NewRequestWithContext(ctx, in.method, a.url+in.path, body)
	must.NoError(a.t, err)
	if in.header != nil {
		req.Header = in.header.Clone()
	}
	if in.host != "" {
		req.Host = in.host
	}
	switch {
	case in.contentType != "":
		req.Header.Set("Content-Type", in.contentType)
	case in.body != "":
		req.Header.Set("Content-Type", "application/json")
	}
	return req
}

func (a *agent) send(in request) (*http.Response, string) {
	a.t.Helper()
	res, err := a.recorder.RoundTrip(a.newRequest(a.t.Context(), in))
	must.NoError(a.t, err)
	body, err := io.ReadAll(res.Body)
	must.NoError(a.t, err)
	must.NoError(a.t, res.Body.Close())
	return res, string(body)
}

// refused sends a request and returns the error that it is answered with.
func (a *agent) refused(in request) (int, wire.Error) {
	a.t.Helper()
	res, body := a.send(in)
	var answer wire.ErrorAnswer
	must.NoError(a.t, json.Unmarshal([]byte(body), &answer))
	return res.StatusCode, answer.Error
}

const goodCreate = `{"agent_id":"researcher","volume_host_path":"/srv/a"}`

var (
	sessionURL = "/v1/sessions/" + chat.String()
	create     = request{method: "PUT", path: sessionURL, body: goodCreate}
	get        = request{method: "GET", path: sessionURL}
	list       = request{method: "GET", path: "/v1/sessions"}
	count      = request{method: "GET", path: "/v1/sessions/counts"}
	pools      = request{method: "GET", path: "/v1/pools"}
	renew      = request{method: "POST", path: sessionURL + "/renew", body: `{"ttl":"10m"}`}
	exec       = request{method: "POST", path: sessionURL + "/exec", body: `{"command":["cat"],"stdin":"hello"}`}
	execStream = request{method: "GET", path: sessionURL + `/exec?command=%5B%22cat%22%5D`} // not asking for a websocket
	why        = request{method: "GET", path: sessionURL + "/why"}
	remove     = request{method: "DELETE", path: sessionURL}
	readLogs   = request{method: "GET", path: sessionURL + "/logs"}
	readFrames = request{method: "GET", path: sessionURL + "/logs", header: http.Header{"Accept": {wire.TypeFrames}}}
	cleanup    = request{method: "POST", path: "/v1/cleanup"}
	adopt      = request{method: "POST", path: "/v1/operator/adopt", body: `{"instance":"default-4f7k2mq6zt3vxw5yabcd"}`}
	forget     = request{method: "POST", path: "/v1/operator/forget"}
	repair     = request{method: "POST", path: "/v1/operator/repair/" + chat.String()}
	events     = request{method: "GET", path: "/v1/events?follow=false"}
	live       = request{method: "GET", path: "/v1/agent/live"}
	health     = request{method: "GET", path: "/v1/agent/health"}
	self       = request{method: "GET", path: "/v1/agent/self"}
	metrics    = request{method: "GET", path: "/v1/metrics"}
	openAPI    = request{method: "GET", path: "/v1/openapi.json"}
)
