package ready_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/ready"
)

const sessionID = "0c7a4f9e-6a53-4b4c-9f0c-3b2f5d1e8a77"

func endpointOf(t *testing.T, hostport string) runtime.Endpoint {
	t.Helper()
	ap, err := netip.ParseAddrPort(hostport)
	must.NoError(t, err)
	return runtime.Endpoint{IP: ap.Addr(), Port: ap.Port()}
}

func serve(t *testing.T, handler http.HandlerFunc) runtime.Endpoint {
	t.Helper()
	srv := httptest.NewServer(handler)
	t.Cleanup(srv.Close)
	return endpointOf(t, strings.TrimPrefix(srv.URL, "http://"))
}

// closedPort is an endpoint that nobody listens on.
func closedPort(t *testing.T) runtime.Endpoint {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must.NoError(t, err)
	addr := ln.Addr().String()
	must.NoError(t, ln.Close())
	return endpointOf(t, addr)
}

func answer(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	}
}

func TestWait_accepts(t *testing.T) {
	cases := []struct {
		name    string
		check   ready.Check
		handler http.HandlerFunc
	}{
		{"a connection, when nothing more is asked", ready.Check{}, answer(500, "")},
		{"a 2xx status on the path", ready.Check{HTTPPath: "/healthz"}, answer(204, "")},
		{"a body that is the session's ID", ready.Check{HTTPPath: "/healthz", WantSessionID: true}, answer(200, sessionID+"\n")},
		{"a body that holds the session's ID", ready.Check{HTTPPath: "/healthz", WantSessionID: true}, answer(200, `{"session_id":"`+sessionID+`"}`)},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			must.NoError(t, tc.check.Wait(t.Context(), serve(t, tc.handler), sessionID))
		})
	}
}

func TestWait_refuses_until_the_deadline(t *testing.T) {
	withID := ready.Check{HTTPPath: "/healthz", WantSessionID: true}
	cases := []struct {
		name    string
		check   ready.Check
		handler http.HandlerFunc // nil: nobody listens
		cause   string
	}{
		{"a closed port", ready.Check{}, nil, "refused"},
		{"a closed port, for http", withID, nil, "refused"},
		{"an error status", ready.Check{HTTPPath: "/healthz"}, answer(503, "no \x1b[31mdatabase\n"), `GET /healthz: 503 Service Unavailable: "no \x1b[31mdatabase"`},
		{"a redirect", withID, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/elsewhere", http.StatusFound)
		}, "302"},
		{"a foreign process", withID, answer(200, "welcome"), `another process has this port: "welcome"`},
		{"a process that echoes the request", withID, func(w http.ResponseWriter, r *http.Request) {
			_ = r.Write(w)
		}, "session ID"},
		{"an ID past the first 4 KiB", withID, answer(200, strings.Repeat(" ", 4<<10)+sessionID), "session ID"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			endpoint := closedPort(t)
			if tc.handler != nil {
				endpoint = serve(t, tc.handler)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			err := tc.check.Wait(ctx, endpoint, sessionID)
			must.ErrorIs(t, err, runtime.ErrNotReady)
			must.ErrorIs(t, err, context.DeadlineExceeded)
			must.ErrorContains(t, err, tc.cause)
			must.ErrorContains(t, ready.LastTry(fmt.Errorf("create: %w", err)), tc.cause)
		})
	}
}

func TestWait_quotes_only_the_beginning_of_a_body(t *testing.T) {
	err := ready.Check{HTTPPath: "/"}.Once(t.Context(), serve(t, answer(500, strings.Repeat("x", 4<<10))), sessionID)
	must.EqError(t, err, `GET /: 500 Internal Server Error: "`+strings.Repeat("x", 200)+`"`)
}

// behind is a port whose connections are dealt with by handle, one after another.
func behind(t *testing.T, handle func(conn net.Conn)) runtime.Endpoint {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must.NoError(t, err)
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				handle(conn)
				_ = conn.Close() // the other side may be gone
			})
		}
	})
	t.Cleanup(func() {
		must.NoError(t, listener.Close())
		conns.Wait()
	})
	return endpointOf(t, listener.Addr().String())
}

// untilHungUp holds a connection until the caller hangs up.
func untilHungUp(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }

// A proxy takes connections for somebody who may not be there.
func TestWait_StayOpen(t *testing.T) {
	check := ready.Check{StayOpen: 300 * time.Millisecond}
	t.Run("accepts a connection that stays open", func(t *testing.T) {
		began := time.Now()
		must.NoError(t, check.Wait(t.Context(), behind(t, untilHungUp), sessionID))
		must.GreaterEq(t, check.StayOpen, time.Since(began))
	})
	t.Run("accepts a server that speaks first and hangs up, at once", func(t *testing.T) {
		patient := ready.Check{StayOpen: time.Hour}
		must.NoError(t, patient.Wait(t.Context(), behind(t, func(conn net.Conn) { _, _ = conn.Write([]byte("220 hello")) }), sessionID))
	})
	for _, tc := range []struct {
		name   string
		handle func(net.Conn)
		cause  string
	}{
		{"a connection that is closed at once", func(net.Conn) {}, "nothing listens behind it"},
		// It may be reset before it is open to the caller.
		{"a connection that is reset", func(conn net.Conn) { _ = conn.(*net.TCPConn).SetLinger(0) }, "reset"},
		{"a connection that is closed somewhat later", func(conn net.Conn) {
			_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			untilHungUp(conn)
		}, "nothing listens behind it"},
	} {
		t.Run("refuses "+tc.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			err := check.Wait(ctx, behind(t, tc.handle), sessionID)
			must.ErrorIs(t, err, runtime.ErrNotReady)
			must.ErrorIs(t, err, context.DeadlineExceeded)
			must.ErrorContains(t, err, tc.cause)
		})
	}
	t.Run("refuses one that stays open if the next one is closed", func(t *testing.T) {
		var conns atomic.Int32
		endpoint := behind(t, func(conn net.Conn) {
			if conns.Add(1)%2 == 1 {
				untilHungUp(conn)
			}
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		must.ErrorIs(t, check.Wait(ctx, endpoint, sessionID), runtime.ErrNotReady)
	})
	t.Run("ends with its caller", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		endpoint := behind(t, func(conn net.Conn) {
			cancel()
			untilHungUp(conn)
		})
		must.ErrorIs(t, ready.Check{StayOpen: time.Hour}.Wait(ctx, endpoint, sessionID), context.Canceled)
	})
}

func TestWait_tries_again_until_the_sandbox_is_up(t *testing.T) {
	var tries atomic.Int32
	endpoint := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		if tries.Add(1) < 4 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	must.NoError(t, ready.Check{HTTPPath: "/"}.Wait(t.Context(), endpoint, sessionID))
	must.GreaterEq(t, 4, tries.Load(), must.Sprint("one that takes too long is cut short"))
}

func TestWait_returns_the_context_error_when_cancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var tries atomic.Int32
	endpoint := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		if tries.Add(1) > 1 {
			cancel() // cuts this try short, so the first one is the last that finished
		}
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	err := ready.Check{HTTPPath: "/"}.Wait(ctx, endpoint, sessionID)
	must.ErrorIs(t, err, context.Canceled)
	must.False(t, strings.Contains(err.Error(), runtime.ErrNotReady.Error()))
	must.EqError(t, ready.LastTry(err), "GET /: 503 Service Unavailable")
}

func TestWait_refuses_what_can_never_be_answered(t *testing.T) {
	up := serve(t, answer(200, sessionID))
	cases := []struct {
		name      string
		check     ready.Check
		endpoint  runtime.Endpoint
		sessionID string
	}{
		{"a session ID without a path", ready.Check{WantSessionID: true}, up, sessionID},
		{"a path that does not begin with /", ready.Check{HTTPPath: "healthz"}, up, sessionID},
		{"no endpoint", ready.Check{}, runtime.Endpoint{}, sessionID},
		{"a connection that stays open, and http", ready.Check{HTTPPath: "/", StayOpen: time.Second}, up, sessionID},
		{"no session ID where one is asked for", ready.Check{HTTPPath: "/", WantSessionID: true}, up, ""},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			must.ErrorIs(t, tc.check.Wait(t.Context(), tc.endpoint, tc.sessionID), runtime.ErrInvalid)
		})
	}
}
