package api_test

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/store/chatmutex"
	"github.com/bivouac/bivouac/internal/store/memory"
	"github.com/bivouac/bivouac/internal/test/apitest"
	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// crowd is the API over a real scheduler, whose starts take until they are let
// go, and all the answers that it gave.
type crowd struct {
	t       *testing.T
	store   *memory.Store
	driver  *fakeruntime.Driver
	api     http.RoundTripper
	started chan struct{} // has one element for each start under way
	finish  chan struct{} // closed when starts may end

	callers sync.WaitGroup
	answers chan answered

	mu      sync.Mutex
	refused map[string]int // by limit
}

// config is that of an API whose refusals the crowd counts.
func (c *crowd) config(sessions api.Sessions) api.Config {
	config := testConfig(sessions, new(log))
	c.refused = make(map[string]int)
	config.Refused = func(_ context.Context, limit string) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.refused[limit]++
	}
	return config
}

type answered struct {
	status     int
	retryAfter string
	body       []byte
}

// direct calls a handler with no connection in between.
type direct struct{ http.Handler }

func (d direct) RoundTrip(r *http.Request) (*http.Response, error) {
	rec := httptest.NewRecorder()
	d.ServeHTTP(rec, r)
	res := rec.Result()
	res.Request = r
	return res, nil
}

func newCrowd(t *testing.T) *crowd {
	t.Helper()
	c := &crowd{
		t: t, store: memory.NewStore(), driver: fakeruntime.New("fake"),
		started: make(chan struct{}, 10_000), finish: make(chan struct{}), answers: make(chan answered, 10_000),
	}
	c.driver.Intercept(func(_ context.Context, call fakeruntime.Call) error {
		if call.Op == fakeruntime.OpCreate && call.Moment == fakeruntime.Before {
			c.started <- struct{}{}
			<-c.finish
		}
		return nil
	})
	sessions, err := scheduler.New(scheduler.Config{
		Store: c.store, Locker: memory.NewLocker(c.store),
		Drivers: map[string]runtime.Driver{"fake": c.driver}, DefaultRuntime: "fake",
		TTL: time.Hour, MaxTTL: time.Hour, CleanupInterval: time.Minute,
		Logger: hclog.NewNullLogger(), Meter: metricnoop.Meter{}, Tracer: tracenoop.Tracer{}, Now: time.Now,
	})
	must.NoError(t, err)
	c.api = apitest.New(t, direct{api.New(c.config(sessions))})
	return c
}

// comes sends a request and does not wait for its answer.
func (c *crowd) comes(method, path string, body []byte) {
	c.callers.Go(func() {
		req := httptest.NewRequestWithContext(c.t.Context(), method, "http://127.0.0.1"+path, bytes.NewReader(body))
		req.RequestURI = ""
		if body != nil {
			req.Header.Set("Content-Type", "application/json")
		}
		res, err := c.api.RoundTrip(req)
		if err != nil {
			c.t.Error(err)
			return
		}
		var text bytes.Buffer
		_, err = text.ReadFrom(res.Body)
		if err != nil {
			c.t.Error(err)
		}
		c.answers <- answered{res.StatusCode, res.Header.Get("Retry-After"), text.Bytes()}
	})
}

func (c *crowd) wantsSandbox(chat uuid.UUID) {
	body, err := json.Marshal(wire.CreateRequest{AgentID: "agent-1", VolumeHostPath: "/data"})
	must.NoError(c.t, err)
	c.comes(http.MethodPut, "/v1/sessions/"+chat.String(), body)
}

// turnedAway waits for n answers, which must all be refusals that say when to
// come back.
func (c *crowd) turnedAway(n int) {
	c.t.Helper()
	for range n {
		a := <-c.answers
		must.Eq(c.t, http.StatusTooManyRequests, a.status, must.Sprint(string(a.body)))
		must.Eq(c.t, "1", a.retryAfter)
	}
}

// served lets starts end, waits for all answers, and counts them by their result.
func (c *crowd) served() map[string]int {
	c.t.Helper()
	close(c.finish)
	c.callers.Wait()
	results := make(map[string]int)
	for range len(c.answers) {
		a := <-c.answers
		var answer wire.CreateAnswer
		must.NoError(c.t, json.Unmarshal(a.body, &answer), must.Sprint(a.status))
		results[answer.Result]++
	}
	return results
}

// standing holds sandboxes against records: there is one for each, and nothing
// that is half-made. It returns how many.
func (c *crowd) standing() int {
	c.t.Helper()
	page, err := c.store.List(c.t.Context(), scheduler.Query{PerPage: scheduler.MaxPerPage})
	must.NoError(c.t, err)
	recorded := make(map[string]bool)
	for _, s := range page.Sessions {
		must.Eq(c.t, scheduler.StateRunning, s.State)
		recorded[s.SessionID.String()] = true
	}
	for _, s := range c.driver.Running() {
		must.MapContainsKey(c.t, recorded, s.SessionID)
	}
	must.Len(c.t, len(recorded), c.driver.Running())
	return len(recorded)
}

// The starts that one replica makes at a time.
const starts = 128

func TestFiveHundredChatsAtOnce(t *testing.T) {
	c := newCrowd(t)
	for range 500 {
		c.wantsSandbox(uuid.New())
	}
	c.turnedAway(500 - starts)
	must.Eq(t, map[string]int{"starts": 500 - starts}, c.refused)
	for range starts {
		<-c.started
	}
	must.Eq(t, map[string]int{"created": starts}, c.served())
	must.Eq(t, starts, c.standing())

	// Afterwards there is room again.
	c.wantsSandbox(uuid.New())
	c.callers.Wait()
	must.Eq(t, starts+1, c.standing())
}

func TestAThousandCallersOfOneChat(t *testing.T) {
	c := newCrowd(t)
	chat := uuid.New()
	c.wantsSandbox(chat)
	<-c.started
	for range 999 {
		c.wantsSandbox(chat)
	}
	c.turnedAway(999 - chatmutex.MaxWaiters)
	must.Eq(t, map[string]int{"chat_waiters": 999 - chatmutex.MaxWaiters}, c.refused)
	must.Eq(t, map[string]int{"created": 1, "reused": chatmutex.MaxWaiters}, c.served())
	must.Eq(t, 1, c.standing())
}

func TestRequestsAreBounded(t *testing.T) {
	// Given as many requests about sessions as there are places.
	const places = 1024
	inside, release := make(chan struct{}), make(chan struct{})
	c := &crowd{t: t, answers: make(chan answered, 10_000)}
	c.api = apitest.New(t, direct{api.New(c.config(&fake{onGet: func(context.Context) error {
		inside <- struct{}{}
		<-release
		return nil
	}}))})
	for range places {
		c.comes(http.MethodGet, "/v1/sessions/"+chat.String(), nil)
	}
	for range places {
		<-inside
	}

	// Then what comes next about sessions is turned away, whatever it is …
	c.comes(http.MethodGet, "/v1/sessions/"+chat.String(), nil)
	c.comes(http.MethodDelete, "/v1/sessions/"+chat.String(), nil)
	c.comes(http.MethodPost, "/v1/sessions/"+chat.String()+"/renew", nil)
	c.comes(http.MethodPost, "/v1/cleanup", nil)
	c.wantsSandbox(chat)
	c.turnedAway(5)
	must.Eq(t, map[string]int{"requests": 5}, c.refused)
	// … while the agent still says how it is.
	c.comes(http.MethodGet, "/v1/agent/health", nil)
	must.Eq(t, http.StatusOK, (<-c.answers).status)

	close(release)
	c.callers.Wait()
	must.Len(t, places, drain(c.answers))
}

func drain(answers chan answered) (all []answered) {
	for range len(answers) {
		all = append(all, <-answers)
	}
	return all
}
