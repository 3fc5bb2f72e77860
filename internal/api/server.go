package api

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"go.opentelemetry.io/otel/propagation"
	"golang.org/x/time/rate"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/audit"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// Sessions are the use cases that the API serves. *scheduler.Scheduler implements it.
type Sessions interface {
	Create(ctx context.Context, cmd scheduler.CreateCommand) (scheduler.CreateResult, error)
	Get(ctx context.Context, chatID uuid.UUID, block scheduler.Block) (scheduler.Session, uint64, error)
	List(ctx context.Context, query scheduler.Query) (scheduler.Page, error)
	Counts(ctx context.Context, agentID string) (scheduler.Counts, time.Time, error)
	Pools(ctx context.Context) ([]scheduler.PoolStatus, error)
	Renew(ctx context.Context, chatID uuid.UUID, ttl time.Duration) (scheduler.Session, error)
	Delete(ctx context.Context, chatID uuid.UUID) (scheduler.DeleteResult, error)
	Logs(ctx context.Context, chatID uuid.UUID, query scheduler.LogQuery, write func(runtime.LogChunk) error) (scheduler.LogEnd, error)
	CleanupExpired(ctx context.Context) (scheduler.CleanupResult, error)
	Repair(ctx context.Context, chatID uuid.UUID) (scheduler.RepairResult, error)
	Exec(ctx context.Context, chatID uuid.UUID, command runtime.Command, renew time.Duration) (*scheduler.Exec, error)
	Events(ctx context.Context, query scheduler.EventQuery) iter.Seq2[scheduler.EventBatch, error]
	Why(ctx context.Context, chatID uuid.UUID) ([]scheduler.Story, error)
}

// Operator carries out decisions that only an operator can make, about a store without
// an identity.
type Operator interface {
	// Adopt gives the store the identity that running sandboxes have, and makes records
	// of those sandboxes. If they have several identities, instance selects one.
	Adopt(ctx context.Context, instance string) (wire.AdoptAnswer, error)
	// Forget gives the store a new identity. Running sandboxes are left alone.
	Forget(ctx context.Context) (wire.ForgetAnswer, error)
}

// Config is the configuration of the API. All fields except Checks, Operator,
// Authenticate, Known, Hosts, ClientCertificates, Audit, Connections and UI are required.
type Config struct {
	Sessions Sessions
	Store    string          // name of the session store for messages: "Consul at HOST:PORT"
	Checks   []Check         // empty: always healthy
	Metrics  http.Handler    // serves /v1/metrics
	Operator Operator        // nil: no operator decisions are possible
	Self     wire.SelfAnswer // served as it is, except Instance, Runtimes and Replicas; must contain no secrets
	Instance func() string   // the ID of the instance; empty if not yet known
	Runtimes func(ctx context.Context) []wire.Runtime
	Replicas func(ctx context.Context) []wire.Replica // those that run; nil if they are not known
	Logger   hclog.Logger
	// Authenticate returns the caller with a credential, which may be empty. address is
	// where the request came from. If Authenticate is nil, there is no authentication,
	// and everybody may do everything.
	Authenticate func(ctx context.Context, credential, address string) (scheduler.Caller, error)
	// Known is called with the context of each request whose caller is known. It is nil
	// if nothing depends on that.
	Known func(ctx context.Context)
	// Hosts are the names that the Host header may have, apart from loopback, in lower
	// case. With authentication it may also be any IP address.
	Hosts []string
	// ClientCertificates asks for a verified client certificate in all requests over TLS,
	// except for open endpoints.
	ClientCertificates bool
	Audit              *audit.Log // nil: none
	// UI serves the paths below /ui/. They are open: the files of a web page are no
	// secret, and a browser sends no token for them. Nil: there is no such path.
	UI http.Handler
	// Connections is how many connections the server keeps, 0 for any number. Streams of
	// events take at most half of them.
	Connections int
	// Refused is called with the name of the limit when a request is refused.
	Refused func(ctx context.Context, limit string)
}

// API is the Control API as an http.Handler.
type API struct {
	config   Config
	mux      *http.ServeMux
	open     map[string]bool // the paths that need no credential
	csrf     *http.CrossOriginProtection
	requests scheduler.Places  // for unary requests about sessions
	waiting  scheduler.Places  // for blocking reads, streams and upgrades
	readers  scheduler.Places  // for streams of events
	shares   *scheduler.Shares // of each caller in readers
	scans    scheduler.Places  // for filtered lists, which may read all records
	upgrades upgrades
	checkup  checkup
	waiters  *scheduler.Shares // of each caller in waiting
	told     *rate.Limiter     // for log lines about refused strangers
	stopping context.Context
	stop     context.CancelFunc
}

// New returns the API. It starts nothing.
func New(config Config) *API {
	stopping, stop := context.WithCancel(context.Background())
	readers := maxReaders
	if config.Connections > 0 {
		readers = min(readers, config.Connections/2)
	}
	a := &API{
		config:   config,
		mux:      http.NewServeMux(),
		open:     map[string]bool{},
		csrf:     http.NewCrossOriginProtection(),
		requests: scheduler.NewPlaces(maxRequests, "requests", "%d requests already"),
		waiting:  scheduler.NewPlaces(maxWaiting, "waiting", "%d blocking reads and streams already"),
		scans:    scheduler.NewPlaces(maxScans, "scans", "%d filtered lists already"),
		readers:  scheduler.NewPlaces(readers, "event_readers", "%d streams of events already"),
		shares:   scheduler.NewShares((readers+1)/2, "event_readers", "the caller has %d streams of events already"),
		checkup:  checkup{turn: make(chan struct{}, 1)},
		waiters:  scheduler.NewShares(maxWaitShare, "caller_waiting", "%d blocking reads and streams of this caller already"),
		told:     rate.NewLimiter(strangersPerSecond, strangersAtOnce),
		stopping: stopping,
		stop:     stop,
	}
	a.upgrades.ended.L = &a.upgrades.mu
	for _, e := range a.resources() {
		a.handle(e.path, e.methods)
	}
	if config.UI != nil {
		a.open[uiPath] = true
		a.mux.Handle(uiPath, config.UI)
	}
	a.mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fail(w, errUnknownPath) })
	return a
}

// uiPath is the folder of the web page.
const uiPath = "/ui/"

// resource is a path of the API with its endpoints.
type resource struct {
	path    string
	methods methods
}

func (a *API) resources() []resource {
	none := scheduler.Places{}
	// Requests about sessions need a place. Requests about the server itself need none,
	// so that the server can report its state when it is busy.
	return []resource{
		{"/v1/sessions", methods{
			"GET": {unary, authenticated, a.requests, a.list, []string{"agent_id", "state", "text", "per_page", "next_token", "index", "wait"}},
		}},
		{"/v1/sessions/counts", methods{"GET": {unary, authenticated, a.requests, a.counts, []string{"agent_id"}}}},
		{"/v1/pools", methods{"GET": {unary, authenticated, a.requests, a.pools, nil}}},
		{"/v1/sessions/{chat_id}", methods{
			"GET":    {unary, authenticated, a.requests, a.get, []string{"index", "wait"}},
			"PUT":    {unary, authenticated, a.requests, a.create, nil},
			"DELETE": {unary, authenticated, a.requests, a.delete, nil},
		}},
		{"/v1/sessions/{chat_id}/renew", methods{"POST": {unary, authenticated, a.requests, a.renew, nil}}},
		{execPath, methods{
			"GET":  {upgrade, authenticated, a.waiting, a.execStream, execParams},
			"POST": {unary, authenticated, a.requests, a.exec, []string{"renew"}},
		}},
		{"/v1/events", methods{
			"GET": {stream, authenticated, a.readers, a.events, []string{"index", "agent_id", "chat_id", "type", "follow"}},
		}},
		{"/v1/sessions/{chat_id}/why", methods{"GET": {unary, authenticated, a.requests, a.why, nil}}},
		{"/v1/sessions/{chat_id}/logs", methods{
			"GET": {stream, authenticated, a.waiting, a.logs, []string{"type", "follow", "tail", "task"}},
		}},
		{"/v1/cleanup", methods{"POST": {unary, operatorWrite, a.requests, a.cleanup, nil}}},
		{"/v1/operator/adopt", methods{"POST": {unary, operatorWrite, a.requests, a.adopt, nil}}},
		{"/v1/operator/forget", methods{"POST": {unary, operatorWrite, a.requests, a.forget, nil}}},
		{"/v1/operator/repair/{chat_id}", methods{"POST": {unary, operatorWrite, a.requests, a.repair, nil}}},
		{"/v1/agent/live", methods{"GET": {unary, open, none, a.live, nil}}},
		{"/v1/agent/health", methods{"GET": {unary, open, none, a.health, nil}}},
		{"/v1/agent/self", methods{"GET": {unary, operatorRead, none, a.self, nil}}},
		{"/v1/metrics", methods{"GET": {unary, metricsRead, none, a.metrics, nil}}},
		{"/v1/openapi.json", methods{"GET": {unary, open, none, a.openAPI, nil}}},
	}
}

// The limits of a request. There is no limit on how long an answer takes to begin,
// because blocking reads and creates may take long.
const (
	bodyLimit    = 10 * time.Second // to read the body
	writeLimit   = 30 * time.Second // for each write of an answer
	maxBody      = 64 << 10         // bytes
	maxRequests  = 1024             // unary requests about sessions at a time, counted once their bodies are read
	maxWaiting   = 128              // blocking reads, streams and upgrades at a time
	maxWaitShare = maxWaiting / 2   // of waiting ones, for each authenticated caller
	maxScans     = 8                // filtered lists at a time
	maxReaders   = 2048             // streams of events at a time; an authenticated caller may have half of them
	maxRequestID = 128              // bytes
)

// The limit for log lines above debug about strangers, who could fill the disk otherwise.
const (
	strangersPerSecond = 1
	strangersAtOnce    = 100
)

// Stop ends blocking reads, streams and upgraded connections. New ones end at once.
// Register it to run when the server shuts down, and call [API.Wait] after that.
func (a *API) Stop() { a.stop() }

// ServeHTTP answers one request. It recovers from panics.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	ans := newAnswer(w, r, a.config.Store)
	defer func() {
		if cause := recover(); cause != nil {
			a.recovered(ans, cause)
		}
		a.audit(ans, r)
		a.log(ans, r, time.Since(began))
		if ans.broken {
			panic(http.ErrAbortHandler) // makes net/http close the connection
		}
	}()

	if r.ContentLength != 0 {
		ans.readLimit(bodyLimit)
	}
	if err := a.admit(r); err != nil {
		fail(ans, err)
		return
	}
	_, pattern := a.mux.Handler(r)
	if err := a.checkCertificate(r, a.open[pattern]); err != nil {
		fail(ans, err)
		return
	}
	caller, err := a.authenticate(r, a.open[pattern])
	if err != nil {
		fail(ans, err)
		return
	}
	ans.caller = caller
	if a.config.Known != nil && !a.open[pattern] {
		a.config.Known(r.Context())
	}
	if err := receive(ans, r); err != nil {
		fail(ans, err)
		return
	}
	ctx := propagation.TraceContext{}.Extract(r.Context(), propagation.HeaderCarrier(r.Header))
	ctx = scheduler.WithRequestID(scheduler.WithCaller(ctx, caller), ans.requestID)
	a.mux.ServeHTTP(ans, r.WithContext(ctx))
}

func (a *API) recovered(ans *answer, cause any) {
	if err, ok := cause.(error); ok && errors.Is(err, http.ErrAbortHandler) {
		ans.broken = true
		return
	}
	a.config.Logger.Error("panic while answering a request",
		"request_id", ans.requestID, "panic", cause, "stack", string(debug.Stack()))
	fail(ans, fmt.Errorf("panic: %v", cause))
}

// log writes one line for each request. The level is debug if the request succeeded or
// the caller has gone, and info or above if the answer is an error. A caller who got an
// error can therefore find the request ID in the log at info, except if many strangers
// were refused.
func (a *API) log(ans *answer, r *http.Request, took time.Duration) {
	level := hclog.Debug
	switch {
	case r.Context().Err() != nil:
	case ans.status == http.StatusInternalServerError:
		level = hclog.Error
	case ans.status > http.StatusInternalServerError, ans.status == http.StatusTooManyRequests:
		level = hclog.Warn
	case ans.err != nil:
		level = hclog.Info
	}
	isStranger := a.config.Authenticate != nil && ans.caller.Method == ""
	if isStranger && level > hclog.Debug && !a.told.Allow() {
		level = hclog.Debug
	}
	args := []any{"request_id", ans.requestID, "method", clip(r.Method, 32), "path", clip(r.URL.EscapedPath(), 200),
		"status", ans.status, "took", took}
	if a.config.Authenticate != nil {
		args = append(args, "caller", ans.caller.Name)
	}
	if ans.err != nil {
		if limit, ok := errors.AsType[*scheduler.LimitError](ans.err); ok {
			a.config.Refused(r.Context(), limit.Limit)
		}
		switch {
		case errors.Is(ans.err, scheduler.ErrQuota):
			a.config.Refused(r.Context(), "max_sessions")
		case errors.Is(ans.err, scheduler.ErrUnauthenticated):
			a.config.Refused(r.Context(), "unauthenticated")
		}
		args = append(args, "error", errorFor(ans.err, ans.store).code, "detail", clip(ans.err.Error(), 4096))
	}
	a.config.Logger.Log(level, "request", args...)
}

// clip shortens text for the log, so that a few requests cannot fill the log.
func clip(text string, length int) string {
	if len(text) <= length {
		return text
	}
	return strings.ToValidUTF8(text[:length], "") + "…"
}
