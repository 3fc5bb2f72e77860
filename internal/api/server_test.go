package api_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoenig/test/must"
	"go.opentelemetry.io/otel/trace"

	"github.com/bivouac/bivouac/internal/agent/httpserver"
	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

func TestPathsAndMethodsThatTheAPILacks(t *testing.T) {
	a := start(t, &fake{})
	for _, path := range []string{"/", "/v1", "/v1/sessions/", "//v1/sessions", "/v1/../v1/sessions", "/v2/sessions", sessionURL + "/", sessionURL + "/stop"} {
		t.Run(path, func(t *testing.T) {
			status, refusal := a.refused(request{method: "GET", path: path})
			must.Eq(t, 404, status)
			must.Eq(t, wire.CodeUnknownPath, refusal.Code)
		})
	}
	for _, c := range []struct{ method, path, allow string }{
		{"POST", "/v1/sessions", "GET, HEAD"},
		{"PATCH", sessionURL, "DELETE, GET, HEAD, PUT"},
		{"OPTIONS", sessionURL, "DELETE, GET, HEAD, PUT"},
		{"GET", sessionURL + "/renew", "POST"},
		{"GET", "/v1/cleanup", "POST"},
		{"DELETE", "/v1/metrics", "GET, HEAD"},
	} {
		t.Run(c.method+" "+c.path, func(t *testing.T) {
			r := request{method: c.method, path: c.path}
			status, refusal := a.refused(r)
			must.Eq(t, 405, status)
			must.Eq(t, wire.CodeMethodNotAllowed, refusal.Code)
			res, _ := a.send(r)
			must.Eq(t, c.allow, res.Header.Get("Allow"))
		})
	}
}

func TestHeadIsGetWithoutTheBody(t *testing.T) {
	res, body := start(t, &fake{}).send(request{method: "HEAD", path: sessionURL})
	must.Eq(t, 200, res.StatusCode)
	must.Eq(t, "42", res.Header.Get(wire.HeaderIndex))
	must.Eq(t, "", body)
}

func TestWebPagesOfOtherOriginsChangeNothing(t *testing.T) {
	f := &fake{}
	a := start(t, f)
	for _, header := range []http.Header{
		{"Sec-Fetch-Site": {"cross-site"}},
		{"Sec-Fetch-Site": {"same-site"}},
		{"Origin": {"https://evil.example"}},
		{"Origin": {"null"}},
	} {
		r := cleanup
		r.header = header
		status, refusal := a.refused(r)
		must.Eq(t, 403, status)
		must.Eq(t, wire.CodeForbiddenOrigin, refusal.Code)
	}
	must.Eq(t, 0, f.calls)

	r := cleanup
	r.header = http.Header{"Origin": {a.url}}
	res, _ := a.send(r)
	must.Eq(t, 200, res.StatusCode)
}

func TestStagesOfACreate(t *testing.T) {
	var late func(runtime.Stage)
	f := &fake{onCreate: func(_ context.Context, cmd scheduler.CreateCommand) error {
		if cmd.Progress == nil {
			return nil
		}
		late = cmd.Progress
		for _, stage := range []runtime.Stage{runtime.StagePlaced, runtime.StageStarted, runtime.StageReady} {
			cmd.Progress(stage)
		}
		return nil
	}}
	a := start(t, f)

	stagesOf := func(r request) (stages []string, res *http.Response) {
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
			Got1xxResponse: func(status int, header textproto.MIMEHeader) error {
				stages = append(stages, fmt.Sprint(status, " ", header.Get(wire.HeaderStage)))
				return nil
			},
		})
		res, err := a.recorder.RoundTrip(a.newRequest(ctx, r))
		must.NoError(t, err)
		must.NoError(t, res.Body.Close())
		must.Eq(t, 201, res.StatusCode)
		must.Eq(t, "", res.Header.Get(wire.HeaderStage))
		return stages, res
	}
	asked := create
	asked.header = http.Header{wire.HeaderStages: {"true"}}
	stages, _ := stagesOf(asked)
	must.Eq(t, []string{"102 placed", "102 started", "102 ready"}, stages)

	<-a.served
	for range 100 { // given a driver that tells stages after its answer
		late(runtime.StageReady)
	}
	stages, _ = stagesOf(create)
	must.SliceEmpty(t, stages)
}

func TestStagesAreNotForHTTP10(t *testing.T) {
	f := &fake{onCreate: func(_ context.Context, cmd scheduler.CreateCommand) error {
		if cmd.Progress != nil {
			return errors.New("stages asked for")
		}
		return nil
	}}
	a := start(t, f)
	conn, err := net.Dial("tcp", strings.TrimPrefix(a.url, "http://"))
	must.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	_, err = fmt.Fprintf(conn, "PUT %s HTTP/1.0\r\nContent-Type: application/json\r\nX-Bivouac-Stages: true\r\nContent-Length: %d\r\n\r\n%s",
		sessionURL, len(goodCreate), goodCreate)
	must.NoError(t, err)
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	must.NoError(t, err)
	must.Eq(t, 201, res.StatusCode)
}

func TestBlockingReadsAreBounded(t *testing.T) {
	inside := make(chan struct{})
	release := make(chan struct{})
	f := &fake{onGet: func(ctx context.Context) error {
		select {
		case inside <- struct{}{}:
			<-release
		case <-release:
		}
		return nil
	}}
	a := start(t, f)
	blocking := get
	blocking.path += "?index=1"

	var watchers sync.WaitGroup
	for range 128 {
		watchers.Go(func() {
			res, _ := a.send(blocking)
			if res.StatusCode != http.StatusOK {
				t.Errorf("a watcher is answered with %d", res.StatusCode)
			}
		})
	}
	for range 128 {
		<-inside
	}
	status, refusal := a.refused(blocking)
	must.Eq(t, 429, status)
	must.Eq(t, wire.CodeBusy, refusal.Code)
	res, _ := a.send(list) // which does not block
	must.Eq(t, 200, res.StatusCode)

	close(release)
	watchers.Wait()
	res, _ = a.send(blocking)
	must.Eq(t, 200, res.StatusCode)
}

func TestShutdownEndsBlockingReads(t *testing.T) {
	inside := make(chan struct{})
	f := &fake{onGet: func(ctx context.Context) error {
		close(inside)
		<-ctx.Done()
		return fmt.Errorf("get: %w", ctx.Err())
	}}
	a := start(t, f)
	blocking := get
	blocking.path += "?index=1"
	var watcher sync.WaitGroup
	watcher.Go(func() {
		if status, refusal := a.refused(blocking); status != 503 || refusal.Code != wire.CodeShuttingDown {
			t.Errorf("the watcher is answered with %d %s", status, refusal.Code)
		}
	})
	<-inside
	must.NoError(t, a.server.Shutdown(t.Context()))
	watcher.Wait()
}

func TestCallerWhoLeaves(t *testing.T) {
	inside := make(chan struct{})
	f := &fake{onCreate: func(ctx context.Context, _ scheduler.CreateCommand) error {
		close(inside)
		<-ctx.Done()
		return ctx.Err()
	}}
	a := start(t, f)
	ctx, leave := context.WithCancel(t.Context())
	var caller sync.WaitGroup
	caller.Go(func() {
		if _, err := a.recorder.RoundTrip(a.newRequest(ctx, create)); !errors.Is(err, context.Canceled) {
			t.Errorf("the caller got %v", err)
		}
	})
	<-inside
	leave()
	caller.Wait()
	<-a.served
	must.StrContains(t, a.log.String(), "error=canceled")
	must.StrNotContains(t, a.log.String(), "[WARN]")
	must.StrNotContains(t, a.log.String(), "[ERROR]")
}

func TestPanicIsAnsweredAndLogged(t *testing.T) {
	boom := true
	f := &fake{onCreate: func(_ context.Context, cmd scheduler.CreateCommand) error {
		cmd.Progress(runtime.StagePlaced)
		if boom {
			panic("boom")
		}
		return nil
	}}
	a := start(t, f)
	asked := create
	asked.header = http.Header{wire.HeaderStages: {"true"}}
	status, refusal := a.refused(asked)
	must.Eq(t, 500, status)
	must.Eq(t, wire.CodeInternal, refusal.Code)
	must.StrNotContains(t, refusal.Message, "boom")
	<-a.served
	must.StrContains(t, a.log.String(), "panic=boom")
	must.StrContains(t, a.log.String(), "server_test.go") // the stack
	must.StrContains(t, a.log.String(), refusal.RequestID)

	boom = false
	res, _ := a.send(asked)
	must.Eq(t, 201, res.StatusCode)
}

func TestPanicInMidAnswerClosesTheConnection(t *testing.T) {
	a := start(t, &fake{}, func(c *api.Config) {
		c.Metrics = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			_, _ = io.WriteString(w, "half")
			panic("boom")
		})
	})
	_, err := a.recorder.RoundTrip(a.newRequest(t.Context(), metrics))
	must.Error(t, err)
	res, _ := a.send(get)
	must.Eq(t, 200, res.StatusCode)
}

func TestUseCasesJoinTheCallersTrace(t *testing.T) {
	traces := make(chan string, 1)
	f := &fake{onGet: func(ctx context.Context) error {
		traces <- trace.SpanContextFromContext(ctx).TraceID().String()
		return nil
	}}
	r := get
	r.header = http.Header{"Traceparent": {"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}}
	start(t, f).send(r)
	must.Eq(t, "4bf92f3577b34da6a3ce929d0e0e4736", <-traces)
}

// pipe is a listener of one connection in memory, so that time may be a
// synctest bubble's.
type pipe struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (p *pipe) Accept() (net.Conn, error) {
	select {
	case conn := <-p.conns:
		return conn, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}
func (p *pipe) Close() error   { p.once.Do(func() { close(p.closed) }); return nil }
func (p *pipe) Addr() net.Addr { return &net.TCPAddr{} }

// overTime serves f on a connection in memory and gives the caller's end.
func overTime(t *testing.T, f *fake, talk func(t *testing.T, conn net.Conn)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		config := testConfig(f, io.Discard)
		server := httpserver.New(api.New(config), 0, config.Logger)
		caller, served := net.Pipe()
		listener := &pipe{conns: make(chan net.Conn, 1), closed: make(chan struct{})}
		listener.conns <- served
		var serving sync.WaitGroup
		serving.Go(func() { _ = server.Serve(listener) })
		talk(t, caller)
		_ = caller.Close()
		_ = server.Close()
		serving.Wait()
	})
}

func TestCreateMayTakeLongerThanAnyLimitOfTheConnection(t *testing.T) {
	f := &fake{onCreate: func(ctx context.Context, _ scheduler.CreateCommand) error {
		select {
		case <-time.After(time.Hour):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}}
	overTime(t, f, func(t *testing.T, conn net.Conn) {
		answers := bufio.NewReader(conn)
		for range 2 { // the second over a connection that was used before
			_, err := fmt.Fprintf(conn, "PUT %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
				sessionURL, len(goodCreate), goodCreate)
			must.NoError(t, err)
			res, err := http.ReadResponse(answers, nil)
			must.NoError(t, err)
			_, err = io.Copy(io.Discard, res.Body)
			must.NoError(t, err)
			must.Eq(t, 201, res.StatusCode)
		}
	})
}

func TestCallerWhoSendsHalfABodyIsNotWaitedFor(t *testing.T) {
	overTime(t, &fake{}, func(t *testing.T, conn net.Conn) {
		began := time.Now()
		_, err := fmt.Fprintf(conn, "PUT %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{", sessionURL)
		must.NoError(t, err)
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		must.NoError(t, err)
		must.Eq(t, 400, res.StatusCode)
		must.Eq(t, 10*time.Second, time.Since(began))
	})
}

func TestCallerWhoDoesNotReadIsNotWaitedFor(t *testing.T) {
	overTime(t, &fake{}, func(t *testing.T, conn net.Conn) {
		_, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n", sessionURL)
		must.NoError(t, err)
		<-time.After(time.Minute) // of the bubble: over the limit of a write
		_, err = http.ReadResponse(bufio.NewReader(conn), nil)
		must.ErrorIs(t, err, io.ErrUnexpectedEOF)
	})
}
