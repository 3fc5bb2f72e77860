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

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
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
