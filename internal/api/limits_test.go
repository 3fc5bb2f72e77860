package api_test

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
)

// unsent is a body that is never sent.
type unsent struct {
	awaited chan<- struct{}
	over    <-chan struct{}
}

func (b unsent) Read([]byte) (int, error) {
	b.awaited <- struct{}{}
	<-b.over
	return 0, io.ErrUnexpectedEOF
}

func TestRequestsThatWaitForTheirBodyTakeNoPlace(t *testing.T) {
	// Given more requests than there are places, whose bodies do not come.
	const many = 1100
	api := api.New(testConfig(&fake{}, new(log)))
	awaited, over := make(chan struct{}), make(chan struct{})
	var callers sync.WaitGroup
	for range many {
		callers.Go(func() {
			req := httptest.NewRequestWithContext(t.Context(), http.MethodPut, "http://127.0.0.1"+sessionURL, unsent{awaited, over})
			rec := httptest.NewRecorder()
			api.ServeHTTP(rec, req)
			must.Eq(t, http.StatusBadRequest, rec.Code)
		})
	}
	for range many {
		<-awaited
	}

	// Then others are served.
	rec := httptest.NewRecorder()
	api.ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1"+sessionURL, nil))
	must.Eq(t, http.StatusOK, rec.Code)
	close(over)
	callers.Wait()
}

func TestBodiesThatAreNotPlainJSONAreRefused(t *testing.T) {
	f := &fake{}
	a := start(t, f)
	for name, header := range map[string]http.Header{
		"a second Content-Type": {"Content-Type": {"application/json", "text/plain"}},
		"another charset":       {"Content-Type": {"application/json; charset=utf-16"}},
		"a compressed body":     {"Content-Type": {"application/json"}, "Content-Encoding": {"gzip"}},
		"no Content-Type":       {"Content-Type": nil},
	} {
		t.Run(name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, a.url+sessionURL, strings.NewReader(goodCreate))
			must.NoError(t, err)
			req.Header = header
			res, err := http.DefaultClient.Do(req)
			must.NoError(t, err)
			must.NoError(t, res.Body.Close())
			must.Eq(t, http.StatusUnsupportedMediaType, res.StatusCode)
			must.Eq(t, 0, f.calls)
		})
	}
	t.Run("UTF-8 that is named is fine", func(t *testing.T) {
		r := create
		r.contentType = "application/json; charset=UTF-8"
		res, _ := a.send(r)
		must.Eq(t, http.StatusCreated, res.StatusCode)
	})
}

func TestNobodyFillsTheLogWithAPath(t *testing.T) {
	a := start(t, &fake{})
	a.send(request{method: "GET", path: "/" + strings.Repeat("x", 30_000)})
	<-a.served
	must.Less(t, 1000, len(a.log.String()))
}

func TestTheServerItselfIsNoPath(t *testing.T) {
	a := start(t, &fake{})
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", strings.TrimPrefix(a.url, "http://"))
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, conn.Close()) })
	_, err = io.WriteString(conn, "OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n")
	must.NoError(t, err)
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	must.NoError(t, err)
	body, err := io.ReadAll(res.Body)
	must.NoError(t, err)
	must.NoError(t, res.Body.Close())
	must.Eq(t, http.StatusNotFound, res.StatusCode)
	must.StrContains(t, string(body), string(wire.CodeUnknownPath))
}

func TestHealthIsCheckedOnceForAllWhoAsk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var runs atomic.Int32
		config := testConfig(&fake{}, new(bytes.Buffer))
		config.Checks = []api.Check{{Name: "nomad", Run: func(ctx context.Context) error {
			runs.Add(1)
			select {
			case <-time.After(time.Second):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}}}
		api := api.New(config)
		ask := func(ctx context.Context) int {
			rec := httptest.NewRecorder()
			api.ServeHTTP(rec, httptest.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1/v1/agent/health", nil))
			return rec.Code
		}

		// Also if the one whose question began it does not wait for the answer.
		gone, leave := context.WithCancel(t.Context())
		leave()
		var callers sync.WaitGroup
		callers.Go(func() { ask(gone) })
		for range 100 {
			callers.Go(func() { must.Eq(t, http.StatusOK, ask(t.Context())) })
		}
		callers.Wait()
		must.Eq(t, 1, runs.Load())

		// What was found is told for a second.
		<-time.After(2 * time.Second)
		must.Eq(t, http.StatusOK, ask(t.Context()))
		must.Eq(t, 2, runs.Load())
	})
}
