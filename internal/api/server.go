package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"go.opentelemetry.io/otel/propagation"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/scheduler"
)

// Sessions are the use cases that the API offers: a *scheduler.Scheduler.
type Sessions interface {
	Create(ctx context.Context, cmd scheduler.CreateCommand) (scheduler.CreateResult, error)
	Get(ctx context.Context, chatID uuid.UUID, block scheduler.Block) (scheduler.Session, uint64, error)
	List(ctx context.Context, query scheduler.Query) (scheduler.Page, error)
	Renew(ctx context.Context, chatID uuid.UUID, ttl time.Duration) (scheduler.Session, error)
	Delete(ctx context.Context, chatID uuid.UUID) (scheduler.DeleteResult, error)
	CleanupExpired(ctx context.Context) (scheduler.CleanupResult, error)
	Repair(ctx context.Context, chatID uuid.UUID) (scheduler.RepairResult, error)
}

// Operator carries out what only an operator can decide, about a store that lost
// its identity or that others may know.
type Operator interface {
	// Adopt gives the store the identity that sandboxes bear which run, of
	// several the one that instance names, and makes records of them.
	Adopt(ctx context.Context, instance string) (wire.AdoptAnswer, error)
	// Forget gives the store a fresh identity. What runs is left alone.
	Forget(ctx context.Context) (wire.ForgetAnswer, error)
}

// Config is what the API is made from. All but Checks, Operator and
// MaxConnections is required.
type Config struct {
	Sessions Sessions
	Store    string          // names what keeps the sessions, for messages: "Consul at HOST:PORT"
	Checks   []Check         // none: always healthy
	Metrics  http.Handler    // serves /v1/metrics
	Operator Operator        // nil: there is nothing to decide
	Self     wire.SelfAnswer // served as it is, but for Instance and Runtimes: it must hold no secrets
	Instance func() string   // the ID of the instance, empty while it is not known
	Runtimes func(ctx context.Context) []wire.Runtime
	Logger   hclog.Logger
	// Refused is told the name of the limit that refused a request.
	Refused func(ctx context.Context, limit string)

	// MaxConnections is how many connections a server keeps open at a time. To
	// make room for another one it closes the one that has been without a request
	// for longest. 0: any number.
	MaxConnections int
}

// API is the Control API as an http.Handler.
type API struct {
	config   Config
	mux      *http.ServeMux
	csrf     *http.CrossOriginProtection
	requests chan struct{} // one token for each request about sessions in flight
	watchers chan struct{} // one token for each blocking read in flight
	checkup  checkup
	stopping context.Context
	stop     context.CancelFunc
}

// New returns the API. It starts nothing.
func New(config Config) *API {
	stopping, stop := context.WithCancel(context.Background())
	a := &API{
		config:   config,
		mux:      http.NewServeMux(),
		csrf:     http.NewCrossOriginProtection(),
		requests: make(chan struct{}, maxRequests),
		watchers: make(chan struct{}, maxWatchers),
		checkup:  checkup{turn: make(chan struct{}, 1)},
		stopping: stopping,
		stop:     stop,
	}
	a.mux.Handle("/v1/sessions", methods{
		"GET": {a.list, []string{"agent_id", "per_page", "next_token", "index", "wait"}},
	})
	a.mux.Handle("/v1/sessions/{chat_id}", methods{
		"GET":    {a.get, []string{"index", "wait"}},
		"PUT":    {a.create, nil},
		"DELETE": {a.delete, nil},
	})
	a.mux.Handle("/v1/sessions/{chat_id}/renew", methods{"POST": {a.renew, nil}})
	a.mux.Handle("/v1/cleanup", methods{"POST": {a.cleanup, nil}})
	a.mux.Handle("/v1/operator/adopt", methods{"POST": {a.adopt, nil}})
	a.mux.Handle("/v1/operator/forget", methods{"POST": {a.forget, nil}})
	a.mux.Handle("/v1/operator/repair/{chat_id}", methods{"POST": {a.repair, nil}})
	a.mux.Handle("/v1/agent/health", methods{"GET": {a.health, nil}})
	a.mux.Handle("/v1/agent/self", methods{"GET": {a.self, nil}})
	a.mux.Handle("/v1/metrics", methods{"GET": {a.metrics, nil}})
	a.mux.Handle("/v1/openapi.json", methods{"GET": {a.openAPI, nil}})
	a.mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fail(w, errUnknownPath) })
	return a
}

// The limits of a connection. There is none on how long an answer may take to
// begin: a blocking read and a create take as long as they take.
const (
	headerLimit  = 10 * time.Second // to read a request's headers
	bodyLimit    = 10 * time.Second // to read its body
	writeLimit   = 30 * time.Second // to write an answer, once it is there
	idleLimit    = 2 * time.Minute
	maxHeader    = 32 << 10 // bytes
	maxBody      = 64 << 10 // bytes
	maxRequests  = 1024     // requests about sessions at a time, counted once their bodies are there
	maxWatchers  = 128      // of them, blocking reads
	maxRequestID = 128      // bytes
)

// Server returns a server of the API with its limits, for the caller to start.
// Its Shutdown ends the blocking reads at once and waits for everything else.
func (a *API) Server() *http.Server {
	server := &http.Server{
		Handler:           a,
		ConnState:         newConnections(a.config.MaxConnections).changed,
		ReadHeaderTimeout: headerLimit,
		IdleTimeout:       idleLimit,
		MaxHeaderBytes:    maxHeader,

		DisableGeneralOptionsHandler: true, // "OPTIONS *" is one more unknown path

		ErrorLog: a.config.Logger.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
	}
	server.RegisterOnShutdown(a.stop)
	return server
}

// everybody is the caller of each request, as long as callers are not told apart.
var everybody = scheduler.Caller{Name: "anonymous"}

// ServeHTTP answers one request. Nothing that goes wrong in it goes further.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	ans := newAnswer(w, r, a.config.Store)
	defer func() {
		if cause := recover(); cause != nil {
			a.recovered(ans, cause)
		}
		a.log(ans, r, time.Since(began))
		if ans.broken {
			panic(http.ErrAbortHandler) // net/http's way to say: close the connection
		}
	}()

	if r.ContentLength != 0 {
		ans.readLimit(bodyLimit)
	}
	if err := a.admit(r); err != nil {
		fail(ans, err)
		return
	}
	if err := receive(ans, r); err != nil {
		fail(ans, err)
		return
	}
	leave, err := a.enter(r)
	if err != nil {
		fail(ans, err)
		return
	}
	defer leave()
	ctx := propagation.TraceContext{}.Extract(r.Context(), propagation.HeaderCarrier(r.Header))
	ctx = scheduler.WithRequestID(scheduler.WithCaller(ctx, everybody), ans.requestID)
	a.mux.ServeHTTP(ans, r.WithContext(ctx))
}

// enter takes one of the places for requests about sessions, if there is one.
// Whoever asks how the agent is needs none: that it is busy is not that it is ill.
func (a *API) enter(r *http.Request) (leave func(), err error) {
	if !strings.HasPrefix(r.URL.Path, "/v1/sessions") && !strings.HasPrefix(r.URL.Path, "/v1/operator/") && r.URL.Path != "/v1/cleanup" {
		return func() {}, nil
	}
	select {
	case a.requests <- struct{}{}:
		return func() { <-a.requests }, nil
	default:
		return nil, &scheduler.LimitError{Limit: "requests", Detail: fmt.Sprintf("%d already", maxRequests)}
	}
}

func (a *API) recovered(ans *answer, cause any) {
	if err, ok := cause.(error); ok && errors.Is(err, http.ErrAbortHandler) {
		ans.broken = true
		return
	}
	a.config.Logger.Error("panic while answering a request",
		"request_id", ans.requestID, "panic", cause, "stack", string(debug.Stack()))
	if ans.status != 0 {
		ans.broken = true // too late to say anything else
		return
	}
	fail(ans, fmt.Errorf("panic: %v", cause))
}

// log writes one line for each request, at debug where it went well or the
// caller has gone. Who was answered an error finds its request ID at info or
// above.
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
	args := []any{"request_id", ans.requestID, "method", clip(r.Method, 32), "path", clip(r.URL.EscapedPath(), 200),
		"status", ans.status, "took", took}
	if ans.err != nil {
		if limit, ok := errors.AsType[*scheduler.LimitError](ans.err); ok {
			a.config.Refused(r.Context(), limit.Limit)
		}
		args = append(args, "error", errorFor(ans.err, ans.store).code, "detail", clip(ans.err.Error(), 4096))
	}
	a.config.Logger.Log(level, "request", args...)
}

// clip shortens what goes into the log, so that nobody can fill it with few
// requests.
func clip(text string, length int) string {
	if len(text) <= length {
		return text
	}
	return strings.ToValidUTF8(text[:length], "") + "…"
}
