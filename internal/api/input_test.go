package api_test

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/scheduler"
)

func TestInputThatIsRefused(t *testing.T) {
	body := func(text string) request { r := create; r.body = text; return r }
	query := func(r request, q string) request { r.path += "?" + q; return r }
	chatID := func(id string) request { r := get; r.path = "/v1/sessions/" + id; return r }

	cases := []struct {
		when string
		send request
		says string
	}{
		{"a chat ID that is no UUID", chatID("42"), "chat_id"},
		{"a chat ID without dashes", chatID("7d3f2a545b0e4a558d2c3f1f9b6f2c01"), "chat_id"},
		{"a chat ID in braces", chatID("%7B7d3f2a54-5b0e-4a55-8d2c-3f1f9b6f2c01%7D"), "chat_id"},
		{"a chat ID as a URN", chatID("urn:uuid:7d3f2a54-5b0e-4a55-8d2c-3f1f9b6f2c01"), "chat_id"},
		{"a chat ID with an escaped slash", chatID("a%2Fb"), "chat_id"},
		{"a chat ID of another alphabet", chatID("gd3f2a54-5b0e-4a55-8d2c-3f1f9b6f2c01"), "chat_id"},

		{"no JSON", body(`agent_id=a`), "not a JSON object"},
		{"an unknown field", body(`{"agent_id":"a","image":"x"}`), `unknown field "image"`},
		{"a field given twice", body(`{"agent_id":"a","agent_id":"b"}`), "duplicate field agent_id"},
		{"bytes that are not UTF-8", body("{\"agent_id\":\"a\xff\"}"), "agent_id is not Unicode"},
		{"two JSON values", body(goodCreate + goodCreate), "goes on"},
		{"a body over the limit", body(`{"agent_id":"` + strings.Repeat("a", 64<<10) + `"}`), "over 65536 bytes"},
		{"a TTL without a unit", body(`{"ttl":"30"}`), "ttl"},
		{"an empty TTL", body(`{"ttl":""}`), "ttl"},
		{"a TTL of nothing", body(`{"ttl":"0s"}`), "ttl is not more than zero"},
		{"a TTL below zero", body(`{"ttl":"-1m"}`), "ttl is not more than zero"},
		{"an empty runtime", body(`{"agent_id":"a","volume_host_path":"/srv/a","runtime":""}`), "runtime is empty"},
		{"labels that are no object", body(`{"labels":"x"}`), "labels is not an object"},
		{"a label that is no string", body(`{"labels":{"a":1}}`), "labels.a is not a string"},
		{"a field that a delete does not have", request{method: "DELETE", path: sessionURL, body: `{"ttl":"1m"}`}, "unknown field"},

		{"a parameter that a delete does not have", query(remove, "index=1"), "unknown query parameter"},
		{"a parameter in another case", query(list, "Agent_ID=a"), "unknown query parameter"},
		{"a parameter given twice", query(list, "agent_id=a&agent_id=b"), "duplicate query parameter agent_id"},
		{"a parameter that is not UTF-8", query(list, "agent_id=%ff"), "agent_id is not UTF-8"},
		{"a parameter that is empty", query(list, "agent_id="), "agent_id is empty"},
		{"a query that is broken", query(list, "agent_id=%zz"), "query"},
		{"a query with semicolons", query(list, "agent_id=a;wait=1s"), "query"},
		{"a page of nothing", query(list, "per_page=0"), "per_page"},
		{"a page that is too long", query(list, "per_page=1001"), "per_page"},
		{"a page that is no number", query(list, "per_page=ten"), "per_page"},
		{"an index that is no number", query(get, "index=x"), "index"},
		{"an index below zero", query(get, "index=-1"), "index"},
		{"a wait without a unit", query(get, "index=1&wait=30"), "wait"},
		{"a wait of nothing", query(get, "index=1&wait=0s"), "wait"},
		{"a wait that is too long", query(get, "index=1&wait=10m1s"), "wait is over 10m"},
	}
	f := &fake{}
	a := start(t, f)
	for _, c := range cases {
		t.Run(c.when, func(t *testing.T) {
			status, refusal := a.refused(c.send)
			must.Eq(t, 400, status)
			must.Eq(t, wire.CodeInvalid, refusal.Code)
			must.StrContains(t, refusal.Message, c.says)
			must.Eq(t, 0, f.calls)
		})
	}
	must.StrContains(t, a.log.String(), "[INFO]", must.Sprint("the request IDs of errors are in the log"))
	for _, level := range []string{"[WARN]", "[ERROR]"} {
		must.StrNotContains(t, a.log.String(), level, must.Sprint("a caller's mistake is no trouble of the agent"))
	}
}

func TestInputThatTheSchedulerGets(t *testing.T) {
	f := &fake{}
	a := start(t, f)

	a.send(request{method: "PUT", path: sessionURL, contentType: "application/json; charset=utf-8",
		body: ` { "ttl" : "1h30m" , "volume_host_path":"/srv/\u00e4" , "agent_id":"a\"b" } ` + "\n"})
	must.Eq(t, chat, f.create.ChatID)
	must.Eq(t, `a"b`, f.create.AgentID)
	must.Eq(t, "/srv/ä", f.create.VolumeHostPath)
	must.Eq(t, 90*time.Minute, f.create.TTL)
	must.Eq(t, "", f.create.Runtime)
	must.Nil(t, f.create.Progress)
	a.send(request{method: "PUT", path: sessionURL, body: `{"agent_id":"a","volume_host_path":"/srv/a","runtime":"mine"}`})
	must.Eq(t, "mine", f.create.Runtime)
	must.Nil(t, f.create.Labels)
	a.send(request{method: "PUT", path: sessionURL, body: `{"agent_id":"a","volume_host_path":"/srv/a","runtime":null,"labels":{"b":"1"}}`})
	must.Eq(t, "", f.create.Runtime)
	must.Eq(t, map[string]string{"b": "1"}, f.create.Labels)
	a.send(request{method: "PUT", path: sessionURL, body: `{"agent_id":"a","volume_host_path":"/srv/a","labels":{}}`})
	must.NotNil(t, f.create.Labels)
	a.send(request{method: "PUT", path: sessionURL, body: `{"agent_id":"a","volume_host_path":"/srv/a","labels":null}`})
	must.Nil(t, f.create.Labels)

	a.send(renew)
	must.Eq(t, 10*time.Minute, f.ttl)
	a.send(request{method: "POST", path: sessionURL + "/renew"})
	must.Eq(t, 0, f.ttl)
	a.send(request{method: "POST", path: sessionURL + "/renew", body: `{}`})
	must.Eq(t, 0, f.ttl)

	a.send(list)
	must.Eq(t, scheduler.Query{PerPage: 100}, f.query)
	a.send(request{method: "GET", path: "/v1/sessions?agent_id=a%20b&per_page=1000&next_token=t&index=7&wait=30s"})
	must.Eq(t, scheduler.Query{
		AgentID: "a b", PerPage: 1000, NextToken: "t",
		Block: scheduler.Block{Index: 7, Wait: 30 * time.Second},
	}, f.query)
	a.send(request{method: "GET", path: sessionURL + "?index=7"})
	must.Eq(t, scheduler.Block{Index: 7, Wait: 5 * time.Minute}, f.query.Block)
	a.send(request{method: "GET", path: sessionURL + "?index=0&wait=10m"})
	must.Eq(t, scheduler.Block{}, f.query.Block)
	a.send(request{method: "GET", path: "/v1/sessions/7D3F2A54-5B0E-4A55-8D2C-3F1F9B6F2C01"})
}

func TestRequestID(t *testing.T) {
	var known string
	var caller scheduler.Caller
	a := start(t, &fake{onGet: func(ctx context.Context) error {
		known, caller = scheduler.RequestIDFrom(ctx), scheduler.CallerFrom(ctx)
		return nil
	}})
	cases := []struct {
		when, given string
		kept        bool
	}{
		{"none", "", false},
		{"a sane one", "req-1.A_b", true},
		{"a long one", strings.Repeat("a", 128), true},
		{"one that is too long", strings.Repeat("a", 129), false},
		{"one with a space", "a b", false},
		{"one with a quote", `a"b`, false},
		{"one that is not ASCII", "ä", false},
	}
	for _, c := range cases {
		t.Run(c.when, func(t *testing.T) {
			r := get
			r.header = http.Header{wire.HeaderRequestID: {c.given}}
			res, _ := a.send(r)
			id := res.Header.Get(wire.HeaderRequestID)
			must.Eq(t, c.kept, id == c.given)
			must.NotEq(t, "", id)
			<-a.served
			must.StrContains(t, a.log.String(), "request_id="+id)
			must.Eq(t, id, known, must.Sprint("the use case knows it"))
			must.Eq(t, "anonymous", caller.Name)
		})
	}
}
