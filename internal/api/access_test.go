package api_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/test/apitest"
	"github.com/bivouac/bivouac/scheduler"
)

// callers are the callers of a test, by their tokens.
var callers = map[string]scheduler.Caller{
	"nobody":   {Name: "nobody", Method: "token", Policies: []*scheduler.Policy{}},
	"reader":   {Name: "reader", Policies: []*scheduler.Policy{{Agents: []scheduler.AgentRule{{Capabilities: scheduler.CapRead}}}}},
	"operator": {Name: "operator", Policies: []*scheduler.Policy{{Operator: scheduler.LevelWrite}}},
	"auditor":  {Name: "auditor", Policies: []*scheduler.Policy{{Operator: scheduler.LevelRead}}},
	"scraper":  {Name: "scraper", Policies: []*scheduler.Policy{{Metrics: true}}},
}

func authenticates(c *api.Config) {
	c.Authenticate = func(_ context.Context, credential, _ string) (scheduler.Caller, error) {
		if credential == "flood" {
			return scheduler.Caller{}, &scheduler.LimitError{Limit: "failed_tries", Detail: "too many"}
		}
		caller, ok := callers[credential]
		if !ok {
			return scheduler.Caller{}, fmt.Errorf("%w: unknown token", scheduler.ErrUnauthenticated)
		}
		return caller, nil
	}
}

// requests has one request for each operation of openapi.json, by its operationId.
var requests = map[string]request{
	"listSessions": list, "createSession": create, "getSession": get, "deleteSession": remove, "renewSession": renew,
	"countSessions": count, "listPools": pools,
	"exec": exec, "execStream": execStream,
	"listEvents":      events,
	"explainSessions": why,
	"readLogs":        readLogs, "cleanupSessions": cleanup, "repairSession": repair, "adopt": adopt, "forget": forget,
	"agentLive": live, "agentHealth": health, "agentSelf": self, "agentMetrics": metrics, "openAPI": openAPI,
}

// TestAccess sends a request to each operation of openapi.json as each caller. What
// x-access says decides who is served.
func TestAccess(t *testing.T) {
	served := map[string][]string{
		"open":           {"", "wrong", "flood", "nobody", "reader", "operator", "auditor", "scraper"},
		"authenticated":  {"nobody", "reader", "operator", "auditor", "scraper"}, // the scheduler decides, and the fake allows all
		"operator write": {"operator"},
		"operator read":  {"operator", "auditor"},
		"metrics read":   {"scraper"},
	}
	recorder := apitest.New(t, nil)
	a := startRecorded(t, recorder, &fake{}, authenticates)
	tried := 0
	for id, access := range accesses(t) {
		r, ok := requests[id]
		must.True(t, ok, must.Sprintf("%s has no request in this test", id))
		must.MapContainsKey(t, served, access, must.Sprintf("x-access of %s", id))
		for _, caller := range served["open"] {
			tried++
			want := map[string]int{"": 401, "wrong": 401, "flood": 429}[caller]
			if want == 0 {
				want = 403
			}
			for _, allowed := range served[access] {
				if allowed == caller {
					want = 200
				}
			}
			status, refusal, header := a.as(caller, r)
			if want == 200 && (status == 201 || status == 426) { // 426: served, but not as a websocket
				status = 200
			}
			must.Eq(t, want, status, must.Sprintf("%s as %q", id, caller))
			switch want {
			case 401:
				must.Eq(t, wire.CodeUnauthenticated, refusal.Code)
				must.StrHasPrefix(t, "Bearer", header.Get("WWW-Authenticate"))
			case 403:
				must.Eq(t, wire.CodePermissionDenied, refusal.Code)
			case 429:
				must.Eq(t, wire.CodeBusy, refusal.Code)
			}
		}
	}
	must.Eq(t, len(requests)*len(served["open"]), tried)
	must.StrNotContains(t, a.log.String(), "flood")
}

// as sends a request with a token.
func (a *agent) as(token string, r request) (int, wire.Error, http.Header) {
	a.t.Helper()
	r.header = http.Header{}
	if token != "" {
		r.header.Set(wire.HeaderToken, token)
	}
	res, body := a.send(r)
	var answer wire.ErrorAnswer
	if res.StatusCode >= 400 {
		must.NoError(a.t, json.Unmarshal([]byte(body), &answer))
	}
	return res.StatusCode, answer.Error, res.Header
}

func TestCredentials(t *testing.T) {
	a := start(t, &fake{}, authenticates)
	for name, tc := range map[string]struct {
		header http.Header
		want   int
	}{
		"in the header of its own":      {http.Header{"X-Bivouac-Token": {"reader"}}, 200},
		"as a bearer":                   {http.Header{"Authorization": {"Bearer reader"}}, 200},
		"as a bearer in other letters":  {http.Header{"Authorization": {"bEARER reader"}}, 200},
		"twice":                         {http.Header{"X-Bivouac-Token": {"reader", "reader"}}, 401},
		"in both headers":               {http.Header{"X-Bivouac-Token": {"reader"}, "Authorization": {"Bearer reader"}}, 401},
		"with another scheme":           {http.Header{"Authorization": {"Basic cmVhZGVyOg=="}}, 401},
		"without a scheme":              {http.Header{"Authorization": {"reader"}}, 401},
		"in a list":                     {http.Header{"Authorization": {"Bearer reader, Bearer operator"}}, 401},
		"in a header that is not known": {http.Header{"X-Token": {"reader"}}, 401},
	} {
		t.Run(name, func(t *testing.T) {
			r := get
			r.header = tc.header
			res, body := a.send(r)
			must.Eq(t, tc.want, res.StatusCode, must.Sprint(body))
		})
	}
	t.Run("in the query", func(t *testing.T) {
		r := get
		r.path += "?token=reader"
		status, refusal := a.refused(r)
		must.Eq(t, 401, status)
		must.Eq(t, wire.CodeUnauthenticated, refusal.Code)
	})
}

func TestLog_many_refused_strangers_do_not_fill_it(t *testing.T) {
	a := start(t, &fake{}, authenticates)
	for i := range 300 {
		a.as([]string{"", "wrong", "flood"}[i%3], get)
	}
	a.as("nobody", cleanup)

	for range 301 {
		<-a.served // its line is written
	}
	lines := strings.Split(a.log.String(), "\n")
	above := slices.DeleteFunc(lines, func(line string) bool {
		return !strings.Contains(line, "request: ") || strings.Contains(line, "[DEBUG]")
	})
	must.Between(t, 100, len(above), 200)
	must.StrContains(t, above[len(above)-1], "caller=nobody")
}

// TestKnown tells known callers from strangers, who must not occupy connections.
func TestKnown(t *testing.T) {
	var known atomic.Int64
	a := start(t, &fake{}, authenticates, func(c *api.Config) { c.Known = func(context.Context) { known.Add(1) } })
	for _, tc := range []struct {
		caller string
		r      request
		want   int64
	}{
		{"reader", get, 1}, {"nobody", cleanup, 1}, {"wrong", get, 0}, {"", get, 0}, {"", health, 0}, {"reader", health, 0},
	} {
		known.Store(0)
		a.as(tc.caller, tc.r)
		must.Eq(t, tc.want, known.Load(), must.Sprintf("%q %s", tc.caller, tc.r.path))
	}
}

func TestRefusals_areCounted(t *testing.T) {
	var mu sync.Mutex
	counted := map[string]int{}
	a := start(t, &fake{err: &scheduler.QuotaError{Limit: 1, Scope: "all AI agents"}}, authenticates, func(c *api.Config) {
		c.Refused = func(_ context.Context, limit string) {
			mu.Lock()
			defer mu.Unlock()
			counted[limit]++
		}
	})
	for _, caller := range []string{"", "wrong", "flood", "reader"} {
		a.as(caller, create)
		<-a.served
	}
	mu.Lock()
	defer mu.Unlock()
	must.Eq(t, map[string]int{"unauthenticated": 2, "failed_tries": 1, "max_sessions": 1}, counted)
}

func TestHealth_shows_details_to_operators_only(t *testing.T) {
	a := start(t, &fake{}, authenticates, func(c *api.Config) {
		c.Checks = []api.Check{{Name: "consul", Run: func(context.Context) error { return fmt.Errorf("10.1.2.3 refused") }}}
	})
	for caller, detailed := range map[string]bool{"": false, "wrong": false, "reader": false, "auditor": true, "operator": true} {
		r := health
		r.header = http.Header{wire.HeaderToken: {caller}}
		res, body := a.send(r)
		must.Eq(t, 503, res.StatusCode)
		must.Eq(t, detailed, strings.Contains(body, "10.1.2.3"), must.Sprintf("as %q", caller))
		must.StrContains(t, body, "failing: consul")
	}
}
