package nomad_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// proxy stands between a driver and the real Nomad, for faults that cannot be
// provoked in Nomad itself.
type proxy struct {
	*httptest.Server
	forward *httputil.ReverseProxy

	mu       sync.Mutex
	fault    func(w http.ResponseWriter, r *http.Request) (handled bool)
	events   func(piece []byte) (lost bool) // sees each piece of a stream
	requests []string                       // method and path; streams and signs of life left out
	streams  map[int]context.CancelFunc
	opened   int
}

func newProxy(t *testing.T) *proxy {
	t.Helper()
	target, err := url.Parse("http://" + stack.NomadForTest(t).Addr())
	must.NoError(t, err)
	p := &proxy{forward: httputil.NewSingleHostReverseProxy(target), streams: make(map[int]context.CancelFunc)}
	p.forward.FlushInterval = -1
	p.forward.ErrorHandler = func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) }
	p.Server = httptest.NewServer(p)
	t.Cleanup(func() {
		p.breakStreams()
		p.Close()
	})
	return p
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	fault := p.fault
	if r.URL.Path == "/v1/event/stream" {
		ctx, cancel := context.WithCancel(r.Context())
		r = r.WithContext(ctx)
		w = streamWriter{w, p}
		p.opened++
		p.streams[p.opened] = cancel
	} else if r.URL.Query().Get("per_page") != "1" {
		p.requests = append(p.requests, r.Method+" "+r.URL.Path)
	}
	p.mu.Unlock()
	if fault == nil || !fault(w, r) {
		p.forward.ServeHTTP(w, r)
	}
}

func (p *proxy) setFault(fault func(http.ResponseWriter, *http.Request) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = fault
}

// setEvents lets see look at what streams bring.
func (p *proxy) setEvents(see func(piece []byte) (lost bool)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.events = see
}

// streamWriter passes a stream on, except for what is lost.
type streamWriter struct {
	http.ResponseWriter
	proxy *proxy
}

func (w streamWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w streamWriter) Write(piece []byte) (int, error) {
	w.proxy.mu.Lock()
	see := w.proxy.events
	w.proxy.mu.Unlock()
	if see != nil && see(piece) {
		return len(piece), nil
	}
	return w.ResponseWriter.Write(piece)
}

func (p *proxy) breakStreams() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, cancel := range p.streams {
		cancel()
		delete(p.streams, id)
	}
}

// take returns the requests since the last call.
func (p *proxy) take() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	requests := p.requests
	p.requests = nil
	return requests
}

// openThrough starts a replica behind a proxy and waits until its event stream
// is up.
func openThrough(t *testing.T, p *proxy, template *jobs.Template) replica {
	t.Helper()
	client, err := api.NewClient(&api.Config{Address: p.URL})
	must.NoError(t, err)
	r := open(t, client, template, "test-"+uuid.NewString())
	must.NoError(t, r.Current(patiently(t)))
	return r
}

func drop(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) }

func isRegister(r *http.Request) bool { return r.Method == http.MethodPut && r.URL.Path == "/v1/jobs" }

func count(requests []string, request string) (n int) {
	for _, r := range requests {
		if r == request {
			n++
		}
	}
	return n
}

// A create costs one write and no read, and looking at the sandbox nothing.
func TestRequests_while_the_event_stream_is_up(t *testing.T) {
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	spec := newSpec(t, r)
	p.take()

	_, err := r.Create(patiently(t), spec, ignore)
	must.NoError(t, err)
	must.Eq(t, []string{"PUT /v1/jobs"}, p.take())

	for range 100 {
		_, err = r.Inspect(t.Context(), spec.SessionID)
		must.NoError(t, err)
	}
	must.SliceEmpty(t, p.take())
}

// The reply to a registration is lost: Nomad has the job, and its sandbox is
// handed out.
func TestCreate_finds_out_what_became_of_a_registration(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	p.setFault(func(_ http.ResponseWriter, req *http.Request) bool {
		if isRegister(req) {
			p.forward.ServeHTTP(httptest.NewRecorder(), req)
			panic(http.ErrAbortHandler)
		}
		return false
	})
	spec := newSpec(t, r)
	p.take()
	sandbox, err := r.Create(patiently(t), spec, ignore)
	must.NoError(t, err)
	must.Eq(t, runtime.StateRunning, sandbox.State)
	must.Eq(t, 1, count(p.take(), "PUT /v1/jobs"))
}

// The registration itself is lost: it is not repeated blindly.
func TestCreate_does_not_repeat_a_registration(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	p.setFault(func(w http.ResponseWriter, req *http.Request) bool {
		return isRegister(req) && drop(w, req)
	})
	spec := newSpec(t, r)
	p.take()
	_, err := r.Create(patiently(t), spec, ignore)
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	must.Eq(t, 1, count(p.take(), "PUT /v1/jobs"))
	p.setFault(nil)
}

// busyFor turns every request away for a while, as Nomad does with too many
// connections from one address, or what stands in front of it.
func busyFor(d time.Duration) func(http.ResponseWriter, *http.Request) bool {
	over := time.Now().Add(d)
	return func(w http.ResponseWriter, _ *http.Request) bool {
		if time.Now().After(over) {
			return false
		}
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	}
}

// Nomad turns everything away for a while: nothing is dropped for that.
func TestDriver_outlasts_a_storm_of_429(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	spec := newSpec(t, r)
	storm := func() {
		p.setFault(busyFor(4 * time.Second))
		p.breakStreams()
	}

	storm()
	p.take()
	sandbox, err := r.Create(patiently(t), spec, ignore)
	must.NoError(t, err)
	must.Eq(t, runtime.StateRunning, sandbox.State)
	must.Less(t, 20, count(p.take(), "PUT /v1/jobs"), must.Sprint("it knocks with pauses"))

	storm()
	found, err := r.Inspect(patiently(t), spec.SessionID)
	must.NoError(t, err)
	must.Eq(t, sandbox.ContainerID, found.ContainerID)

	storm()
	must.NoError(t, r.Stop(patiently(t), spec.SessionID))
	stopped, err := r.Inspect(patiently(t), spec.SessionID)
	must.NoError(t, err)
	must.Eq(t, runtime.StateDead, stopped.State)
}

// However much is asked of the driver at a time, Nomad sees a bounded number of
// requests from it.
func TestRequests_are_bounded(t *testing.T) {
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	var now, most atomic.Int32
	p.setFault(func(w http.ResponseWriter, req *http.Request) bool {
		n := now.Add(1)
		defer now.Add(-1)
		for seen := most.Load(); n > seen && !most.CompareAndSwap(seen, n); seen = most.Load() {
		}
		p.forward.ServeHTTP(w, req)
		return true
	})
	var askers sync.WaitGroup
	for range 300 {
		askers.Go(func() {
			_, err := r.Inspect(patiently(t), uuid.NewString())
			if !errors.Is(err, runtime.ErrNotFound) {
				t.Error(err)
			}
		})
	}
	askers.Wait()
	must.Between(t, 2, most.Load(), 32+1) // and a sign of life
}

// Without events all works, at the price of requests; what happened in the
// meantime is noticed once they are back.
func TestDriver_does_without_events(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	before := newSpec(t, r)
	_, err := r.Create(patiently(t), before, ignore)
	must.NoError(t, err)
	deaths := watch(t, r)

	p.setFault(func(w http.ResponseWriter, req *http.Request) bool {
		return req.URL.Path == "/v1/event/stream" && drop(w, req)
	})
	p.breakStreams()
	during := newSpec(t, r)
	_, err = r.Create(patiently(t), during, ignore)
	must.NoError(t, err)
	must.NoError(t, r.Stop(patiently(t), during.SessionID))
	found, err := r.Inspect(t.Context(), during.SessionID)
	must.NoError(t, err)
	must.Eq(t, runtime.StateDead, found.State)
	_, _, err = r.client.Jobs().Deregister("bivouac-"+before.SessionID, false, nil)
	must.NoError(t, err)

	p.setFault(nil)
	for dead := range deaths {
		if dead.SessionID == before.SessionID && dead.State == runtime.StateDead {
			must.Eq(t, "stopped by an operator in Nomad", dead.Reason)
			break
		}
	}
}

// Doubt is not death: while Nomad cannot be asked, nothing is said of a sandbox.
func TestInspect_knows_nothing_without_Nomad(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	spec := newSpec(t, r)
	_, err := r.Create(patiently(t), spec, ignore)
	must.NoError(t, err)
	p.setFault(drop)
	p.breakStreams()
	for {
		_, err := r.Inspect(patiently(t), spec.SessionID)
		if err != nil { // the broken stream was noticed
			must.ErrorIs(t, err, runtime.ErrUnavailable)
			break
		}
	}
	must.ErrorIs(t, r.Health(t.Context()), runtime.ErrUnavailable)
	for _, err := range r.List(t.Context()) {
		must.ErrorIs(t, err, runtime.ErrUnavailable)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	err = r.Stop(ctx, spec.SessionID)
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	must.ErrorIs(t, err, context.DeadlineExceeded)
	p.setFault(nil)
}

// deny answers as Nomad does to a token that it does not know.
func deny(w http.ResponseWriter, _ *http.Request) bool {
	http.Error(w, "Permission denied", http.StatusForbidden)
	return true
}

// Nomad no longer takes the token. Each answer says so and comes at once, and a
// create leaves nothing to be undone: its registration was refused.
func TestDriver_tells_that_Nomad_denies_permission(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	standing, refused := newSpec(t, r), newSpec(t, r)
	_, err := r.Create(patiently(t), standing, ignore)
	must.NoError(t, err)

	p.setFault(func(w http.ResponseWriter, req *http.Request) bool {
		return req.URL.Path != "/v1/status/leader" && deny(w, req)
	})
	health := r.Health(patiently(t))
	_, create := r.Create(patiently(t), refused, ignore)
	stop := r.Stop(patiently(t), standing.SessionID)
	_, unknown := r.Create(patiently(t), standing, ignore)
	for what, err := range map[string]error{"health": health, "create": create, "stop": stop, "repeated create": unknown} {
		must.ErrorIs(t, err, runtime.ErrUnavailable, must.Sprint(what))
		must.ErrorContains(t, err, "refused by Nomad: answer 403: Permission denied", must.Sprint(what))
		must.False(t, errors.Is(err, context.DeadlineExceeded), must.Sprint(what))
	}
	p.take()
	must.NoError(t, r.Delete(patiently(t), refused.SessionID))
	must.SliceEmpty(t, p.take())
	must.ErrorIs(t, r.Delete(patiently(t), standing.SessionID), runtime.ErrUnavailable)

	p.setFault(nil)
	must.NoError(t, r.Delete(patiently(t), standing.SessionID))
}

// The right to register alone may be missing: what stands is found all the same.
func TestCreate_finds_what_stands_without_the_right_to_register(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	spec := newSpec(t, r)
	first, err := r.Create(patiently(t), spec, ignore)
	must.NoError(t, err)
	p.setFault(func(w http.ResponseWriter, req *http.Request) bool { return isRegister(req) && deny(w, req) })
	again, err := r.Create(patiently(t), spec, ignore)
	must.NoError(t, err)
	must.Eq(t, first.ContainerID, again.ContainerID)
}

// watch reports changes until the test ends.
func watch(t *testing.T, r replica) <-chan runtime.Sandbox {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	reports := make(chan runtime.Sandbox, 100)
	ended := make(chan error, 1)
	go func() {
		defer close(reports)
		ended <- r.Watch(ctx, func(changed runtime.Sandbox) { reports <- changed })
	}()
	t.Cleanup(func() {
		timedOut := errors.Is(ctx.Err(), context.DeadlineExceeded)
		cancel()
		<-ended
		must.False(t, timedOut, must.Sprint("the expected report did not come"))
	})
	return reports
}
