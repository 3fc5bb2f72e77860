package nomad_test

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/faultproxy"
	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// proxy sits between a driver and the real Nomad. It injects faults that Nomad
// itself cannot be made to show.
type proxy struct {
	*faultproxy.Proxy

	mu       sync.Mutex
	fault    func(w http.ResponseWriter, r *http.Request, server http.Handler) (handled bool)
	events   func(piece []byte) (lost bool) // called for each piece of a stream
	requests []string                       // method and path; without streams and heartbeats
	streams  map[int]context.CancelFunc
	opened   int
}

func newProxy(t *testing.T) *proxy {
	t.Helper()
	p := &proxy{streams: make(map[int]context.CancelFunc)}
	var err error
	p.Proxy, err = faultproxy.Start("127.0.0.1:0", p.handle, stack.NomadForTest(t).Addr())
	must.NoError(t, err)
	t.Cleanup(p.Close)
	return p
}

func (p *proxy) handle(w http.ResponseWriter, r *http.Request, server http.Handler) {
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
	if fault == nil || !fault(w, r, server) {
		server.ServeHTTP(w, r)
	}
}

func (p *proxy) setFault(fault func(http.ResponseWriter, *http.Request, http.Handler) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = fault
}

// setEvents sets the function that is called for each piece of a stream.
func (p *proxy) setEvents(see func(piece []byte) (lost bool)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.events = see
}

// streamWriter passes on a stream, except for the pieces that are lost.
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

// take returns the requests since the last call of take.
func (p *proxy) take() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	requests := p.requests
	p.requests = nil
	return requests
}

// openThrough starts a replica behind a proxy and waits until its event stream
// is open.
func openThrough(t *testing.T, p *proxy, template *jobs.Template) replica {
	t.Helper()
	client, err := api.NewClient(&api.Config{Address: "http://" + p.Addr()})
	must.NoError(t, err)
	r := open(t, client, template, "test-"+uuid.NewString())
	must.NoError(t, r.Current(patiently(t)))
	return r
}

func drop(http.ResponseWriter, *http.Request, http.Handler) bool { panic(http.ErrAbortHandler) }

func isRegister(r *http.Request) bool { return r.Method == http.MethodPut && r.URL.Path == "/v1/jobs" }

func count(requests []string, request string) (n int) {
	for _, r := range requests {
		if r == request {
			n++
		}
	}
	return n
}

// TestRequests_while_the_event_stream_is_up checks that a create makes one
// write and no read, and that Inspect makes no request.
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

// TestCreate_finds_out_what_became_of_a_registration covers a lost reply to a
// registration: Nomad has the job, and Create returns its sandbox.
func TestCreate_finds_out_what_became_of_a_registration(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	p.setFault(func(_ http.ResponseWriter, req *http.Request, server http.Handler) bool {
		if isRegister(req) {
			server.ServeHTTP(&faultproxy.Discard{}, req)
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

// TestCreate_does_not_repeat_a_registration covers a lost registration: Create
// does not repeat it blindly.
func TestCreate_does_not_repeat_a_registration(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	p.setFault(func(w http.ResponseWriter, req *http.Request, _ http.Handler) bool {
		return isRegister(req) && drop(w, req, nil)
	})
	spec := newSpec(t, r)
	p.take()
	_, err := r.Create(patiently(t), spec, ignore)
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	must.Eq(t, 1, count(p.take(), "PUT /v1/jobs"))
	p.setFault(nil)
}

// busyFor answers every request with 429 for a while. Nomad does that if one
// address has too many connections, and so may a proxy in front of Nomad.
func busyFor(d time.Duration) func(http.ResponseWriter, *http.Request, http.Handler) bool {
	over := time.Now().Add(d)
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) bool {
		if time.Now().After(over) {
			return false
		}
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	}
}

// TestDriver_outlasts_a_storm_of_429 checks that no call fails because Nomad
// refuses all requests for a while.
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

// TestRequests_are_bounded checks that the driver makes a limited number of
// requests to Nomad at a time, however many calls it gets.
func TestRequests_are_bounded(t *testing.T) {
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	var now, most atomic.Int32
	p.setFault(func(w http.ResponseWriter, req *http.Request, server http.Handler) bool {
		n := now.Add(1)
		defer now.Add(-1)
		for seen := most.Load(); n > seen && !most.CompareAndSwap(seen, n); seen = most.Load() {
		}
		server.ServeHTTP(w, req)
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
	must.Between(t, 2, most.Load(), 32+1) // plus one heartbeat
}

// TestDriver_does_without_events checks that everything works without the event
// stream, although with more requests. Changes in the meantime are noticed when
// the stream is back.
func TestDriver_does_without_events(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	before := newSpec(t, r)
	_, err := r.Create(patiently(t), before, ignore)
	must.NoError(t, err)
	deaths := watch(t, r)

	p.setFault(func(w http.ResponseWriter, req *http.Request, _ http.Handler) bool {
		return req.URL.Path == "/v1/event/stream" && drop(w, req, nil)
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

// TestInspect_knows_nothing_without_Nomad checks that an unknown state is not
// reported as dead: while Nomad does not answer, Inspect returns an error.
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
		if err != nil { // the driver has noticed that the stream broke
			must.ErrorIs(t, err, runtime.ErrUnavailable)
			break
		}
	}
	must.ErrorIs(t, r.awaitHealth(t, "ask for the leader"), runtime.ErrUnavailable)
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

// deny answers like Nomad to an unknown token.
func deny(w http.ResponseWriter, _ *http.Request, _ http.Handler) bool {
	http.Error(w, "Permission denied", http.StatusForbidden)
	return true
}

// TestDriver_tells_that_Nomad_denies_permission covers a token that Nomad no
// longer accepts. Each call says so at once, and a create leaves nothing to
// undo, because its registration was refused.
func TestDriver_tells_that_Nomad_denies_permission(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	standing, refused := newSpec(t, r), newSpec(t, r)
	_, err := r.Create(patiently(t), standing, ignore)
	must.NoError(t, err)

	p.setFault(func(w http.ResponseWriter, req *http.Request, _ http.Handler) bool {
		return req.URL.Path != "/v1/status/leader" && deny(w, req, nil)
	})
	health := r.awaitHealth(t, "Permission denied")
	_, create := r.Create(patiently(t), refused, ignore)
	stop := r.Stop(patiently(t), standing.SessionID)
	_, unknown := r.Create(patiently(t), standing, ignore)
	for what, err := range map[string]error{"health": health, "create": create, "stop": stop, "repeated create": unknown} {
		must.ErrorIs(t, err, runtime.ErrPermission, must.Sprint(what))
		must.ErrorContains(t, err, ": answer 403: Permission denied", must.Sprint(what))
		must.False(t, errors.Is(err, context.DeadlineExceeded), must.Sprint(what))
	}
	p.take()
	must.NoError(t, r.Delete(patiently(t), refused.SessionID))
	must.SliceEmpty(t, p.take())
	must.ErrorIs(t, r.Delete(patiently(t), standing.SessionID), runtime.ErrPermission)

	p.setFault(nil)
	must.NoError(t, r.Delete(patiently(t), standing.SessionID))
}

// TestDriver_tells_that_the_Task_API_denies_permission covers the token of an
// allocation that has ended. The Task API answers 500 to it, whatever the request.
func TestDriver_tells_that_the_Task_API_denies_permission(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	p.setFault(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) bool {
		http.Error(w, "Server error authenticating request", http.StatusInternalServerError)
		return true
	})
	_, create := r.Create(patiently(t), newSpec(t, r), ignore)
	must.ErrorIs(t, create, runtime.ErrPermission)
	must.ErrorIs(t, r.awaitHealth(t, "Server error authenticating request", "the Task API needs a valid token"), runtime.ErrPermission)
	p.setFault(nil)
}

// TestCreate_finds_what_stands_without_the_right_to_register covers a token
// that lacks only the permission to register. Create still finds an existing
// sandbox.
func TestCreate_finds_what_stands_without_the_right_to_register(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	spec := newSpec(t, r)
	first, err := r.Create(patiently(t), spec, ignore)
	must.NoError(t, err)
	p.setFault(func(w http.ResponseWriter, req *http.Request, _ http.Handler) bool {
		return isRegister(req) && deny(w, req, nil)
	})
	again, err := r.Create(patiently(t), spec, ignore)
	must.NoError(t, err)
	must.Eq(t, first.ContainerID, again.ContainerID)
}

// watch returns a channel of changes. It ends with the test.
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
