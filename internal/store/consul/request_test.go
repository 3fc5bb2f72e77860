package consul

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/shoenig/test/must"
)

func TestObserver(t *testing.T) {
	type observation struct {
		operation string
		status    int
		failed    bool
	}
	status := http.StatusOK
	var failure error
	var seen []observation
	client := &transport{
		RoundTripper: roundTripper(func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: status, Body: http.NoBody}, failure
		}),
		observers: []Observer{func(operation string, _ time.Duration, status int, err error) {
			seen = append(seen, observation{operation, status, err != nil})
		}},
	}
	send := func(method, path string) []observation {
		seen = nil
		response, err := client.RoundTrip(httptest.NewRequest(method, "http://consul/prefix"+path, nil))
		if err == nil {
			must.NoError(t, response.Body.Close())
		}
		return seen
	}

	t.Run("is told what a request is for", func(t *testing.T) {
		for _, tc := range []struct{ method, path, want string }{
			{"GET", "/v1/kv/bivouac/v1/sessions/00/x?consistent=", "read"},
			{"GET", "/v1/kv/bivouac/v1/changed?consistent=&index=7&wait=60000ms", "blocking_read"},
			{"PUT", "/v1/kv/bivouac/v1/clock?cas=0", "write"},
			{"PUT", "/v1/txn?consistent=", "txn"},
			{"PUT", "/v1/session/renew/1", "session"},
			{"GET", "/v1/status/leader", "other"},
		} {
			must.Eq(t, []observation{{tc.want, http.StatusOK, false}}, send(tc.method, tc.path))
		}
	})
	t.Run("is told the status, also of a request that Consul is too busy for", func(t *testing.T) {
		status = http.StatusTooManyRequests
		must.Eq(t, []observation{{"txn", http.StatusTooManyRequests, false}}, send("PUT", "/v1/txn"))
	})
	t.Run("is told the error if there is no answer", func(t *testing.T) {
		failure = errors.New("connection refused")
		must.Eq(t, []observation{{"txn", 0, true}}, send("PUT", "/v1/txn"))
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
