package e2e

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/uuid"
	nomad "github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/wire"
)

// statusOf returns the status of the sandbox's answer to a GET / with an
// Authorization header. If that is empty, the request has none.
func statusOf(t *testing.T, s wire.Session, authorization string) int {
	t.Helper()
	must.NotNil(t, s.Endpoint)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+s.Endpoint.AddrPort().String()+"/", nil)
	must.NoError(t, err)
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	resp, err := (&http.Client{Timeout: patience}).Do(req)
	must.NoError(t, err)
	must.NoError(t, resp.Body.Close())
	return resp.StatusCode
}

// recorder collects what replicas send and answer.
type recorder struct {
	mu   sync.Mutex
	text strings.Builder
}

func (r *recorder) add(text []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.text.Write(text)
}

func (r *recorder) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.String()
}

// startCollector starts a collector of traces and returns its URL, and what it gets.
func startCollector(t *testing.T) (string, *recorder) {
	got := &recorder{}
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		got.add(body)
	}))
	t.Cleanup(server.Close)
	return server.URL, got
}

// TestAccessToken runs sandboxes that refuse strangers.
func TestAccessToken(t *testing.T) {
	t.Parallel()
	requireToken := map[string]string{
		"raw_exec": `-job-var=args=["demo-sandbox", "-require-token"]`,
		"docker":   `-job-var=args=["-require-token"]`,
	}
	eachTemplate(t, func(t *testing.T, template string) {
		w := newWorld(t, template, requireToken[template], "-log-level=trace")
		traces, spans := startCollector(t)
		w.env = append(w.env, "OTEL_EXPORTER_OTLP_ENDPOINT="+traces, "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf")
		first, second := w.start(), w.start()
		chat := uuid.NewString()

		// The session becomes ready, as its readiness check needs no token, and its
		// sandbox lets in the caller who has the token.
		created := first.create(chat, w.body(), http.StatusCreated)
		token := created.AccessToken
		must.Len(t, 64, []byte(token))
		must.Eq(t, http.StatusOK, statusOf(t, created.Session, "Bearer "+token))
		must.Eq(t, http.StatusUnauthorized, statusOf(t, created.Session, ""))
		must.Eq(t, http.StatusUnauthorized, statusOf(t, created.Session, "Bearer "+strings.Repeat("0", 64)))

		// Every replica returns it to a create and a get of this chat.
		must.Eq(t, token, second.create(chat, w.body(), http.StatusOK).AccessToken)
		must.Eq(t, token, call[wire.GetAnswer](second, http.MethodGet, sessionPath(chat), nil, http.StatusOK).AccessToken)

		// Nomad has it in the environment of the task and not in meta, nor in lists.
		alloc, _, err := w.nomad.Allocations().Info(created.Session.ContainerID, nil)
		must.NoError(t, err)
		task := alloc.Job.TaskGroups[0].Tasks[0]
		must.Eq(t, token, task.Env["BIVOUAC_ACCESS_TOKEN"])
		list, _, err := w.nomad.Jobs().ListOptions(&nomad.JobListOptions{Fields: &nomad.JobListFields{Meta: true}}, nil)
		must.NoError(t, err)
		must.True(t, slices.ContainsFunc(list, func(j *nomad.JobListStub) bool { return j.ID == alloc.JobID }))
		for _, part := range []any{alloc.Job.Meta, alloc.Job.TaskGroups[0].Meta, task.Meta, list} {
			text, err := json.Marshal(part)
			must.NoError(t, err)
			must.StrNotContains(t, string(text), token)
		}

		// No other answer contains it.
		answers := &recorder{}
		other := w.body()
		other.AgentID = "agent-2"
		for _, ask := range []struct {
			method, path string
			body         any
		}{
			{http.MethodPut, sessionPath(chat), other},
			{http.MethodGet, "/v1/sessions", nil},
			{http.MethodPost, sessionPath(chat) + "/renew", wire.RenewRequest{TTL: "2h"}},
			{http.MethodPost, "/v1/cleanup", nil},
			{http.MethodPost, "/v1/operator/repair/" + chat, nil},
			{http.MethodGet, "/v1/agent/health", nil},
			{http.MethodGet, "/v1/agent/self", nil},
			{http.MethodGet, "/v1/metrics", nil},
		} {
			_, text, err := first.try(ask.method, ask.path, ask.body)
			must.NoError(t, err)
			answers.add(text)
		}
		must.StrContains(t, answers.String(), created.Session.SessionID.String())
		must.StrNotContains(t, answers.String(), token)

		// A session whose record is lost is adopted without it: neither Nomad's lists nor
		// the sandbox tell it.
		_, err = w.consul.KV().Delete(w.recordKey(chat), nil)
		must.NoError(t, err)
		adopted := first.create(chat, w.body(), http.StatusOK)
		must.Eq(t, created.Session.SessionID, adopted.Session.SessionID)
		must.Eq(t, "", adopted.AccessToken)
		must.Eq(t, http.StatusOK, statusOf(t, created.Session, "Bearer "+token))

		// Neither logs nor traces have it.
		first.delete(chat)
		for _, r := range []*replica{first, second} {
			r.stop(syscall.SIGINT)
			log, err := os.ReadFile(r.Log)
			must.NoError(t, err)
			must.StrContains(t, string(log), chat)
			must.StrNotContains(t, string(log), token)
		}
		must.StrContains(t, spans.String(), created.Session.SessionID.String())
		must.StrNotContains(t, spans.String(), token)
	})
}
