package api

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

// serving returns an API with one more endpoint, and the URL of that.
func serving(t *testing.T, e endpoint) (*API, string) {
	t.Helper()
	a := New(Config{Logger: hclog.NewNullLogger()})
	a.handle("/v1/test", methods{"GET": e})
	server := httptest.NewServer(a)
	t.Cleanup(server.Close)
	return a, server.URL + "/v1/test"
}

func get(t *testing.T, url string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	must.NoError(t, err)
	res, err := http.DefaultClient.Do(req)
	must.NoError(t, err)
	t.Cleanup(func() { _ = res.Body.Close() })
	return res
}

func TestStream(t *testing.T) {
	t.Run("sends each part when it is written and ends when the API stops", func(t *testing.T) {
		ended := make(chan error, 1)
		a, url := serving(t, endpoint{kind: stream, handle: func(w http.ResponseWriter, r *http.Request, _ query) error {
			if _, err := io.WriteString(w, "first\n"); err != nil {
				return err
			}
			<-r.Context().Done()
			ended <- r.Context().Err()
			return nil
		}})
		lines := bufio.NewScanner(get(t, url).Body)
		must.True(t, lines.Scan())
		must.Eq(t, "first", lines.Text())
		a.Stop()
		must.ErrorIs(t, <-ended, context.Canceled)
		must.False(t, lines.Scan())
		must.NoError(t, lines.Err())
	})
	t.Run("takes none of the places of other requests", func(t *testing.T) {
		a := New(Config{Logger: hclog.NewNullLogger()})
		for range maxWaiting {
			_, err := a.waiting.Enter()
			must.NoError(t, err)
		}
		_, err := a.waiting.Enter()
		must.Error(t, err)
		_, err = a.requests.Enter()
		must.NoError(t, err)
	})
}

func TestOneCallerTakesAtMostHalfOfThePlaces(t *testing.T) {
	a := New(Config{})
	enter := func(caller scheduler.Caller) (leave func(), err error) { return a.enter(a.waiting, caller) }
	caller := scheduler.Caller{Name: "ci", Method: "token"}
	var leaves []func()
	for range maxWaiting / 2 {
		leave, err := enter(caller)
		must.NoError(t, err)
		leaves = append(leaves, leave)
	}
	_, err := enter(caller)
	limit, ok := errors.AsType[*scheduler.LimitError](err)
	must.True(t, ok)
	must.Eq(t, "caller_waiting", limit.Limit)

	for name, other := range map[string]scheduler.Caller{
		"of another name":                 {Name: "other", Method: "token"},
		"of the same name in a JWT":       {Name: "ci", Method: "jwt/ci"},
		"where nobody needs a credential": {Name: scheduler.DefaultOwner},
	} {
		t.Run("leaves places for a caller "+name, func(t *testing.T) {
			leave, err := enter(other)
			must.NoError(t, err)
			leave()
		})
	}
	for _, leave := range leaves {
		leave()
	}
	leave, err := enter(caller)
	must.NoError(t, err)
	leave()

	t.Run("has all of the other places", func(t *testing.T) {
		for range maxWaiting {
			_, err := a.enter(a.requests, caller)
			must.NoError(t, err)
		}
	})
	t.Run("has all without authentication", func(t *testing.T) {
		for range maxWaiting {
			_, err := enter(scheduler.Caller{Name: scheduler.DefaultOwner})
			must.NoError(t, err)
		}
	})
}

// A second answer in the same body would be taken for a part of the first.
func TestAnErrorAfterTheFirstByteCutsTheAnswerOff(t *testing.T) {
	for name, handle := range map[string]func() error{
		"an error": func() error { return errors.New("too late") },
		"a panic":  func() error { panic("too late") },
	} {
		for _, kind := range []kind{unary, stream} {
			t.Run(fmt.Sprintf("%s, kind %d", name, kind), func(t *testing.T) {
				_, url := serving(t, endpoint{kind: kind, handle: func(w http.ResponseWriter, _ *http.Request, _ query) error {
					// More than the server holds back.
					if _, err := io.WriteString(w, strings.Repeat("x", 1<<16)); err != nil {
						return err
					}
					return handle()
				}})
				res := get(t, url)
				must.Eq(t, http.StatusOK, res.StatusCode)
				text, err := io.ReadAll(res.Body)
				must.ErrorIs(t, err, io.ErrUnexpectedEOF)
				must.StrNotContains(t, string(text), "error")
			})
		}
	}
}

func TestUpgrade(t *testing.T) {
	a, url := serving(t, endpoint{kind: upgrade, handle: func(w http.ResponseWriter, r *http.Request, _ query) error {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		_, err = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: test\r\n\r\nhello\n")
		if err := errors.Join(err, rw.Flush()); err != nil {
			return err
		}
		<-r.Context().Done()
		return nil
	}})
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	must.NoError(t, err)
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "test")
	res, err := http.DefaultClient.Do(req)
	must.NoError(t, err)
	must.Eq(t, http.StatusSwitchingProtocols, res.StatusCode)
	lines := bufio.NewScanner(res.Body)
	must.True(t, lines.Scan())
	must.Eq(t, "hello", lines.Text())
	a.Stop() // ends it
	must.False(t, lines.Scan())
	must.NoError(t, res.Body.Close())
}

// TestRequestsEndWithTheirCredential says what becomes of requests whose caller's
// credential expires in the meantime.
func TestRequestsEndWithTheirCredential(t *testing.T) {
	const lifetime = time.Minute
	// served returns the answer to a request, and whether its connection is then closed.
	served := func(t *testing.T, e endpoint) (rec *httptest.ResponseRecorder, cut bool) {
		t.Helper()
		a := New(Config{
			Logger:  hclog.NewNullLogger(),
			Refused: func(context.Context, string) {},
			Authenticate: func(context.Context, string, string) (scheduler.Caller, error) {
				return scheduler.Caller{Name: "ci", Method: "jwt/ci", Expires: time.Now().Add(lifetime)}, nil
			},
		})
		a.handle("/v1/test", methods{"GET": e})
		rec, began := httptest.NewRecorder(), time.Now()
		defer func() {
			cut = recover() != nil
			must.Eq(t, lifetime, time.Since(began))
		}()
		a.ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1/v1/test", nil))
		return rec, false
	}
	untilEnd := func(text string) func(http.ResponseWriter, *http.Request, query) error {
		return func(w http.ResponseWriter, r *http.Request, _ query) error {
			if _, err := io.WriteString(w, text); text != "" && err != nil {
				return err
			}
			<-r.Context().Done()
			return nil
		}
	}
	bubble := func(name string, test func(t *testing.T)) {
		t.Run(name, func(t *testing.T) { synctest.Test(t, test) })
	}
	bubble("a stream is cut off", func(t *testing.T) {
		rec, cut := served(t, endpoint{kind: stream, handle: untilEnd("first\n")})
		must.Eq(t, "first\n", rec.Body.String())
		must.True(t, cut)
	})
	bubble("a stream that has not begun is refused", func(t *testing.T) {
		rec, cut := served(t, endpoint{kind: stream, handle: func(_ http.ResponseWriter, r *http.Request, _ query) error {
			<-r.Context().Done()
			return r.Context().Err()
		}})
		must.Eq(t, http.StatusUnauthorized, rec.Code)
		must.StrContains(t, rec.Body.String(), "the credential expired")
		must.False(t, cut)
	})
	bubble("an upgraded connection is told why it ends", func(t *testing.T) {
		var why error
		served(t, endpoint{kind: upgrade, handle: func(_ http.ResponseWriter, r *http.Request, _ query) error {
			<-r.Context().Done()
			why = context.Cause(r.Context())
			return nil
		}})
		must.ErrorIs(t, why, errCredentialExpired)
	})
	bubble("a blocking read is refused", func(t *testing.T) {
		a := New(Config{})
		read := func(ctx context.Context) error {
			<-ctx.Done()
			return fmt.Errorf("get: %w", ctx.Err())
		}
		caller := scheduler.WithCaller(t.Context(), scheduler.Caller{Name: "ci", Expires: time.Now().Add(lifetime)})
		request := httptest.NewRequestWithContext(caller, http.MethodGet, "/", nil)
		must.ErrorIs(t, a.read(request, scheduler.Block{Index: 1}, read), errCredentialExpired)
	})
}
