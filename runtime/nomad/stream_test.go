package nomad_test

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
)

// moment is a point of a create at which the event stream breaks, or another
// fault of the stream.
type moment struct {
	name    string
	provoke func(t *testing.T, p *proxy, about []byte)
}

// moments returns all points of a create. about is a text that identifies its
// events.
func moments() []moment {
	list := []moment{
		{"before it is registered", func(_ *testing.T, p *proxy, _ []byte) {
			p.setFault(func(_ http.ResponseWriter, r *http.Request, _ http.Handler) bool {
				if isRegister(r) {
					p.breakStreams()
				}
				return false
			})
		}},
		{"before the registration is answered", func(_ *testing.T, p *proxy, _ []byte) {
			p.setFault(func(w http.ResponseWriter, r *http.Request, server http.Handler) bool {
				if !isRegister(r) {
					return false
				}
				server.ServeHTTP(w, r)
				p.breakStreams()
				return true
			})
		}},
		{"and again while what stands is read", func(_ *testing.T, p *proxy, _ []byte) {
			var lists atomic.Int32
			p.setFault(func(_ http.ResponseWriter, r *http.Request, _ http.Handler) bool {
				isList := r.Method == http.MethodGet && (r.URL.Path == "/v1/jobs" || r.URL.Path == "/v1/allocations")
				if isRegister(r) || isList && lists.Add(1) <= 4 {
					p.breakStreams()
				}
				return false
			})
		}},
		{"and does not come back", func(_ *testing.T, p *proxy, _ []byte) {
			p.setFault(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
				if isRegister(r) {
					p.breakStreams()
				}
				return r.URL.Path == "/v1/event/stream" && drop(w, r, nil)
			})
		}},
		{"and Nomad is slow", func(t *testing.T, p *proxy, _ []byte) {
			p.setFault(func(_ http.ResponseWriter, r *http.Request, _ http.Handler) bool {
				if isRegister(r) {
					p.breakStreams()
				}
				select {
				case <-time.After(1500 * time.Millisecond):
				case <-t.Context().Done():
				}
				return false
			})
		}},
	}
	for n := range int32(5) {
		list = append(list, moment{fmt.Sprintf("after %d events", n+1), func(_ *testing.T, p *proxy, about []byte) {
			var seen atomic.Int32
			p.setEvents(func(piece []byte) bool {
				if bytes.Contains(piece, about) && seen.Add(1) == n+1 {
					p.breakStreams()
				}
				return false
			})
		}})
		list = append(list, moment{fmt.Sprintf("and takes event %d with it", n+1), func(_ *testing.T, p *proxy, about []byte) {
			var seen atomic.Int32
			p.setEvents(func(piece []byte) bool {
				if bytes.Contains(piece, about) && seen.Add(1) == n+1 {
					p.breakStreams()
					return true
				}
				return false
			})
		}})
	}
	return append(list, moment{"but is up, and brings nothing more", func(_ *testing.T, p *proxy, about []byte) {
		var silent atomic.Bool
		p.setEvents(func(piece []byte) bool {
			if bytes.Contains(piece, about) {
				silent.Store(true)
			}
			return silent.Load()
		})
	}})
}

// TestCreate_tells_why_although_the_event_stream_breaks checks that a create
// that cannot succeed fails with Nomad's reason, long before its own limit,
// whenever the event stream breaks.
func TestCreate_tells_why_although_the_event_stream_breaks(t *testing.T) {
	t.Parallel()
	failures := []struct {
		name, body string
		is         error
		says       string
	}{
		{"not placed", task("raw_exec", shell("exec sleep 100"), `constraint {
			attribute = "${attr.kernel.name}"
			value     = "plan9"
		}`), runtime.ErrNotPlaced, "plan9 rules out 1 node"},
		{"exit", task("raw_exec", shell("exit 3"), ""), runtime.ErrNotReady, "exit code 3"},
	}
	for _, m := range moments() {
		for _, f := range failures {
			t.Run(f.name+"/"+m.name, func(t *testing.T) {
				t.Parallel()
				p := newProxy(t)
				r := openThrough(t, p, templateOf(t, patience.String(), f.body))
				spec := newSpec(t, r)
				m.provoke(t, p, []byte(spec.SessionID))

				began := time.Now()
				_, err := r.Create(patiently(t), spec, ignore)
				t.Logf("after %v: %v", time.Since(began).Round(time.Millisecond), err)
				must.ErrorIs(t, err, f.is)
				must.ErrorContains(t, err, f.says)
				p.setFault(nil)
			})
		}
	}
}

// TestCreate_reads_a_job_that_it_has_not_heard_of covers a stream that begins between the
// registration of the job and its allocation.
func TestCreate_reads_a_job_that_it_has_not_heard_of(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	spec := newSpec(t, r)
	p.setEvents(func(piece []byte) bool {
		return bytes.Contains(piece, []byte(spec.SessionID)) && bytes.Contains(piece, []byte(`"Topic":"Job"`))
	})
	sandbox, err := r.Create(patiently(t), spec, ignore)
	must.NoError(t, err)
	must.Eq(t, spec.ChatID, sandbox.ChatID)
}

// TestStop_does_not_wait_for_events checks that a stream that is open but
// delivers nothing does not delay Stop, which relies on Nomad's answers to its
// own requests.
func TestStop_does_not_wait_for_events(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	spec := newSpec(t, r)
	_, err := r.Create(patiently(t), spec, ignore)
	must.NoError(t, err)

	p.setEvents(func([]byte) bool { return true })
	// This is less time than the driver takes to give up a silent stream.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	must.NoError(t, r.Stop(ctx, spec.SessionID))
}
