package apitest_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/apitest"
)

// test is a testing.TB that records its failures.
type test struct {
	testing.TB
	failures []string
}

func (t *test) Errorf(format string, args ...any) {
	t.failures = append(t.failures, fmt.Sprintf(format, args...))
}

// answering is a transport that gives the same answer to every request.
type answering struct {
	status int
	header http.Header
	body   string
}

func (a answering) RoundTrip(*http.Request) (*http.Response, error) {
	header := a.header.Clone()
	if header.Get("Content-Type") == "" {
		header.Set("Content-Type", "application/json")
	}
	return &http.Response{StatusCode: a.status, Header: header, Body: io.NopCloser(strings.NewReader(a.body))}, nil
}

const (
	session   = "/v1/sessions/7d3f2a54-5b0e-4a55-8d2c-3f1f9b6f2c01"
	deleted   = `{"result":"not_found","chat_id":"7d3f2a54-5b0e-4a55-8d2c-3f1f9b6f2c01"}`
	withError = `{"error":{"code":"unknown_path","message":"none","request_id":"r1"}}`
)

func TestRecorderNoticesADeviation(t *testing.T) {
	r1 := http.Header{"X-Request-Id": {"r1"}}
	cases := []struct {
		when   string
		method string
		path   string
		body   string
		answer answering
		says   string // empty: no deviation
	}{
		{"an answer as described", "DELETE", session, "", answering{200, r1, deleted}, ""},
		{"an undocumented status", "DELETE", session, "", answering{202, r1, deleted}, "'202' does not exist"},
		{"an undocumented error", "DELETE", session, "", answering{404, r1, withError}, "'404' does not exist"},
		{"a field that is not described", "DELETE", session, "", answering{200, r1, `{"extra":1,` + deleted[1:]}, "extra"},
		{"a field that is missing", "DELETE", session, "", answering{200, r1, `{"result":"not_found"}`}, "chat_id"},
		{"a field that does not belong to the result", "DELETE", session, "", answering{200, r1, strings.Replace(deleted, "not_found", "deleted", 1)}, "session_id"},
		{"a value that is not allowed", "DELETE", session, "", answering{200, r1, strings.Replace(deleted, "not_found", "gone", 1)}, "result"},
		{"a UUID that is none", "DELETE", session, "", answering{200, r1, strings.Replace(deleted, "-", "x", 1)}, "uuid"},
		{"a header that is missing", "DELETE", session, "", answering{200, http.Header{}, deleted}, "X-Request-Id"},
		{"a header that is not described", "DELETE", session, "", answering{200, http.Header{"X-Request-Id": {"r1"}, "X-New": {"1"}}, deleted}, "X-New"},
		{"another media type", "DELETE", session, "", answering{200, http.Header{"X-Request-Id": {"r1"}, "Content-Type": {"text/html"}}, deleted}, "text/html"},
		{"a request that should have been refused", "POST", session + "/renew", `{"ttl":5}`, answering{200, r1, `{}`}, "the request was accepted"},

		{"an unknown path", "GET", "/v2", "", answering{404, r1, withError}, ""},
		{"an unknown path that is served", "GET", "/v2", "", answering{200, r1, withError}, "neither the path nor the method"},
		{"an unknown path in plain text", "GET", "/v2", "", answering{404, r1, "404 page not found"}, "not JSON"},
		{"an unknown path with a trailing slash", "GET", session + "/", "", answering{404, r1, withError}, ""},
		{"an unknown method", "PATCH", session, "", answering{405, http.Header{"X-Request-Id": {"r1"}, "Allow": {"GET"}}, withError}, ""},
		{"an unknown method without Allow", "PATCH", session, "", answering{405, r1, withError}, "Allow"},
		{"an error of another shape", "GET", "/v2", "", answering{404, r1, `{"error":{"message":"none","request_id":"r1"}}`}, "code"},
		{"an error with another request ID", "GET", "/v2", "", answering{404, http.Header{"X-Request-Id": {"r2"}}, withError}, "request_id"},
	}
	for _, c := range cases {
		t.Run(c.when, func(t *testing.T) {
			inner := &test{TB: t}
			recorder := apitest.New(inner, c.answer)
			req, err := http.NewRequestWithContext(t.Context(), c.method, "http://127.0.0.1"+c.path, strings.NewReader(c.body))
			must.NoError(t, err)
			req.Header.Set("Content-Type", "application/json")
			res, err := recorder.RoundTrip(req)
			must.NoError(t, err)
			body, err := io.ReadAll(res.Body)
			must.NoError(t, err)
			must.Eq(t, c.answer.body, string(body))
			if c.says == "" {
				must.SliceEmpty(t, inner.failures)
				return
			}
			must.StrContains(t, strings.Join(inner.failures, "\n"), c.says)
		})
	}
}

func TestRecorderSaysWhatItSaw(t *testing.T) {
	recorder := apitest.New(t, answering{200, http.Header{"X-Request-Id": {"r1"}}, deleted})
	req, err := http.NewRequestWithContext(t.Context(), http.MethodDelete, "http://127.0.0.1"+session, http.NoBody)
	must.NoError(t, err)
	_, err = recorder.RoundTrip(req)
	must.NoError(t, err)
	must.Eq(t, []string{"DELETE /v1/sessions/{chat_id} 200"}, recorder.Seen())
	must.SliceContains(t, recorder.Documented(), "DELETE /v1/sessions/{chat_id} 200")
	must.SliceNotContains(t, recorder.Documented(), "PUT /v1/sessions/{chat_id} 102")
}
