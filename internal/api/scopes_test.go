package api_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/store/memory"
	"github.com/bivouac/bivouac/internal/test/apitest"
	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// agentRule is the policy of a caller who has capabilities for one AI agent.
func agentRule(agent string, capabilities scheduler.Capabilities) []*scheduler.Policy {
	return []*scheduler.Policy{{Agents: []scheduler.AgentRule{{Prefix: agent, Capabilities: capabilities}}}}
}

// scopes are the callers of TestScopes, by their tokens.
var scopes = map[string][]*scheduler.Policy{
	"read":     agentRule("researcher", scheduler.CapRead),
	"all":      agentRule("", scheduler.CapRead),
	"write":    agentRule("researcher", scheduler.CapWrite),
	"logs":     agentRule("researcher", scheduler.CapRead|scheduler.CapLogs),
	"exec":     agentRule("researcher", scheduler.CapRead|scheduler.CapExec),
	"operator": {{Operator: scheduler.LevelWrite}},
	"metrics":  {{Metrics: true}},
	"other":    agentRule("other", scheduler.CapWrite|scheduler.CapLogs|scheduler.CapExec),
	"nothing":  {},
}

// TestScopes sends each request about the session of the AI agent "researcher" as each
// caller, to a scheduler with that session. Each operation of openapi.json whose access
// the scheduler decides has a row.
func TestScopes(t *testing.T) {
	const (
		shown, none, denied = "200 shown", "200 empty", "403 permission_denied"
		absent, gone        = "404 not_found", "200 not_found"
		unknown             = "401 unauthenticated"
		one, zero           = "200 counts 1", "200 counts 0"
	)
	// What callers who may not see the session get must be what they get for a chat
	// without one, unless they are denied by what they ask for.
	rows := map[string]map[string]string{
		"listSessions":    {"read": shown, "write": shown, "operator": none, "metrics": none, "other": none, "nothing": none},
		"countSessions":   {"read": one, "write": one, "operator": zero, "metrics": zero, "other": zero, "nothing": zero},
		"listPools":       {"read": denied, "all": "200 pools", "write": denied, "operator": denied, "metrics": denied, "other": denied, "nothing": denied},
		"getSession":      {"read": shown, "write": shown, "operator": absent, "metrics": absent, "other": absent, "nothing": absent},
		"createSession":   {"read": denied, "write": shown, "operator": denied, "metrics": denied, "other": denied, "nothing": denied},
		"renewSession":    {"read": denied, "write": shown, "operator": absent, "metrics": absent, "other": absent, "nothing": absent},
		"explainSessions": {"read": shown, "write": shown, "operator": absent, "metrics": absent, "other": absent, "nothing": absent},
		"readLogs":        {"logs": none, "read": denied, "write": denied, "operator": absent, "metrics": absent, "other": absent, "nothing": absent},
		"exec":            {"exec": "200 ", "read": denied, "write": denied, "operator": absent, "metrics": absent, "other": absent, "nothing": absent},
		"execStream":      {"exec": "426 upgrade_required", "read": denied, "write": denied, "operator": absent, "metrics": absent, "other": absent, "nothing": absent},
		"deleteSession":   {"read": denied, "write": "200 deleted", "operator": gone, "metrics": gone, "other": gone, "nothing": gone},
		"listEvents":      {"read": shown, "write": shown, "operator": none, "metrics": none, "other": none, "nothing": none},
	}
	recorder := apitest.New(t, nil)
	tried := 0
	for id, access := range accesses(t) {
		if access != "authenticated" {
			continue // TestAccess has these
		}
		row, ok := rows[id]
		must.True(t, ok, must.Sprintf("%s has no row in this test", id))
		row[""], row["wrong"] = unknown, unknown
		for _, more := range []string{"all", "logs", "exec"} { // these callers may read, too
			if _, ok := row[more]; !ok {
				row[more] = row["read"]
			}
		}
		must.MapLen(t, len(scopes)+2, row)
		for caller, want := range row {
			tried++
			t.Run(id+"/"+caller, func(t *testing.T) {
				sessions := newScheduler(t)
				created, err := sessions.Create(t.Context(), scheduler.CreateCommand{
					ChatID: chat, AgentID: "researcher", VolumeHostPath: "/srv/a",
				})
				must.NoError(t, err)
				a := startRecorded(t, recorder, sessions, scoped)
				r := requests[id]
				if id == "listEvents" {
					r.path += "&index=0"
				}
				r.header = http.Header{}
				if caller != "" {
					r.header.Set(wire.HeaderToken, caller)
				}
				res, body := a.send(r)
				must.Eq(t, want, outcomeOf(t, res.StatusCode, body))

				id := created.Session.SessionID.String()
				must.Eq(t, want == shown || strings.HasSuffix(want, " deleted"), strings.Contains(body, id),
					must.Sprint("who may not see the session sees nothing of it"))
				if want != shown && want != "200 deleted" {
					must.StrNotContains(t, body, "/srv/a")
					must.StrNotContains(t, body, string(created.Session.AccessToken))
				}
				_, _, err = sessions.Get(t.Context(), chat, scheduler.Block{})
				must.Eq(t, want == "200 deleted", err != nil, must.Sprint("only who may write ends it"))
			})
		}
	}
	must.Eq(t, len(rows)*(len(scopes)+2), tried)
}

// outcomeOf returns the status of an answer, and in a word what it says.
func outcomeOf(t *testing.T, status int, body string) string {
	t.Helper()
	var answer struct {
		Error    *wire.Error
		Result   string
		Session  *wire.Session
		Sessions *[]wire.Session
		Counts   map[string]int
		Pools    *[]wire.Pool
	}
	if lines := strings.SplitAfter(body, "\n"); len(lines) > 2 {
		return fmt.Sprintf("%d shown", status) // events
	}
	if body == "" { // a log without output
		body = "{\"sessions\":[]}"
	}
	must.NoError(t, json.Unmarshal([]byte(body), &answer))
	switch {
	case body == "{}\n":
		return fmt.Sprintf("%d empty", status)
	case answer.Error != nil:
		return fmt.Sprintf("%d %s", status, answer.Error.Code)
	case answer.Counts != nil:
		return fmt.Sprintf("%d counts %d", status, answer.Counts["running"])
	case answer.Pools != nil:
		return fmt.Sprintf("%d pools", status)
	case answer.Sessions != nil && len(*answer.Sessions) == 0:
		return fmt.Sprintf("%d empty", status)
	case answer.Session != nil || answer.Sessions != nil:
		return fmt.Sprintf("%d shown", status)
	default:
		return fmt.Sprintf("%d %s", status, answer.Result)
	}
}

func scoped(c *api.Config) {
	c.Authenticate = func(_ context.Context, credential, address string) (scheduler.Caller, error) {
		policies, ok := scopes[credential]
		if !ok {
			return scheduler.Caller{}, fmt.Errorf("%w: unknown token", scheduler.ErrUnauthenticated)
		}
		return scheduler.Caller{Name: credential, Address: address, Policies: policies}, nil
	}
}

// accesses returns x-access of each operation of openapi.json.
func accesses(t *testing.T) map[string]string {
	t.Helper()
	var document struct {
		Paths map[string]map[string]json.RawMessage
	}
	must.NoError(t, json.Unmarshal(api.OpenAPI, &document))
	all := map[string]string{}
	for _, methods := range document.Paths {
		delete(methods, "parameters") // of all methods
		for _, text := range methods {
			var operation struct {
				OperationID string `json:"operationId"`
				Access      string `json:"x-access"`
			}
			must.NoError(t, json.Unmarshal(text, &operation))
			all[operation.OperationID] = operation.Access
		}
	}
	return all
}

// newScheduler returns a scheduler with records in memory.
func newScheduler(t *testing.T, change ...func(*scheduler.Config)) *scheduler.Scheduler {
	t.Helper()
	store := memory.NewStore()
	config := scheduler.Config{
		Store: store, Locker: memory.NewLocker(store),
		Drivers:        map[string]runtime.Driver{"fake": fakeruntime.New("fake")},
		DefaultRuntime: "fake", TTL: time.Hour, MaxTTL: time.Hour, CleanupInterval: time.Minute,
		Logger: hclog.NewNullLogger(), Meter: metricnoop.Meter{}, Tracer: tracenoop.Tracer{}, Now: time.Now,
	}
	for _, change := range change {
		change(&config)
	}
	s, err := scheduler.New(config)
	must.NoError(t, err)
	return s
}
