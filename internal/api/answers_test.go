package api_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/test/apitest"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

func TestDocumentIsValidOpenAPI(t *testing.T) {
	start(t, &fake{}).recorder.CheckDocument()
}

// given sets up what a request meets, beside a scheduler where all goes well.
type given func(*fake, *api.Config)

func failing(err error) given { return func(f *fake, _ *api.Config) { f.err = err } }

func TestEveryDocumentedAnswerIsGiven(t *testing.T) {
	fine := given(func(*fake, *api.Config) {})
	foreign := func(r request) request { r.host = "evil.example"; return r }
	bare := func(r request) request { r.body, r.contentType = "", ""; return r }
	misspelt := func(r request) request { r.path += "?no_such=1"; return r }
	asForm := func(r request) request {
		r.body, r.contentType = "a=b", "application/x-www-form-urlencoded"
		return r
	}
	down := fmt.Errorf("get: %w", scheduler.ErrUnavailable)
	panics := func(_ *fake, c *api.Config) {
		c.Metrics = http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("metrics") })
	}

	cases := []struct {
		when   string
		given  given
		send   request
		status int
		code   wire.Code // empty: not an error
	}{
		{"created", fine, create, 201, ""},
		{"replaced", func(f *fake, _ *api.Config) { f.result = scheduler.ResultReplaced }, create, 201, ""},
		{"reused", func(f *fake, _ *api.Config) { f.result = scheduler.ResultReused }, create, 200, ""},
		{"create of what the scheduler refuses", failing(scheduler.ErrInvalid), create, 400, "invalid"},
		{"create of what the runtime cannot do", failing(runtime.ErrInvalid), create, 400, "runtime_invalid"},
		{"create for a foreign host", fine, foreign(create), 403, "forbidden_host"},
		{"create of a chat with another agent", failing(&scheduler.ConflictError{Session: session, Reason: "agent_id"}), create, 409, "conflict"},
		{"create from a form", fine, asForm(create), 415, "unsupported_media_type"},
		{"create among too many", failing(scheduler.ErrBusy), create, 429, "busy"},
		{"create that meets a fault", failing(errors.New("oops")), create, 500, "internal"},
		{"create without room", failing(runtime.ErrNotPlaced), create, 503, "not_placed"},
		{"create of a sandbox that fails", failing(runtime.ErrNotReady), create, 503, "not_ready"},
		{"create beside a sandbox that does not end", failing(runtime.ErrNotStopped), create, 503, "not_stopped"},
		{"create that is overtaken by a stop", failing(runtime.ErrConflict), create, 503, "sandbox_conflict"},
		{"create without a runtime", failing(runtime.ErrUnavailable), create, 503, "runtime_unavailable"},
		{"create that cannot be written to the audit log", failing(scheduler.ErrAuditUnavailable), create, 503, "audit_unavailable"},
		{"create that cannot get the lock", failing(scheduler.ErrLockTimeout), create, 503, "lock_timeout"},
		{"create that loses the lock", failing(scheduler.ErrLockLost), create, 503, "lock_lost"},
		{"create that takes too long", failing(context.DeadlineExceeded), create, 503, "deadline_exceeded"},
		{"create that is canceled", failing(context.Canceled), create, 503, "canceled"},
		{"create of a sandbox that is not ready in time", failing(fmt.Errorf("%w: %w", runtime.ErrNotReady, context.DeadlineExceeded)), create, 504, "not_ready"},

		{"get", fine, get, 200, ""},
		{"get that is misspelt", fine, misspelt(get), 400, "invalid"},
		{"get for a foreign host", fine, foreign(get), 403, "forbidden_host"},
		{"get of a chat without a session", failing(scheduler.ErrNotFound), get, 404, "not_found"},
		{"get among too many", failing(scheduler.ErrBusy), get, 429, "busy"},
		{"get of a damaged record", failing(scheduler.ErrDamaged), get, 500, "damaged_record"},
		{"get of a record of a newer version", failing(scheduler.ErrNewerRecord), get, 503, "newer_record"},
		{"get without a store", failing(down), get, 503, "store_unavailable"},

		{"list", fine, list, 200, ""},
		{"list that is misspelt", fine, misspelt(list), 400, "invalid"},
		{"list for a foreign host", fine, foreign(list), 403, "forbidden_host"},
		{"list among too many", failing(scheduler.ErrBusy), list, 429, "busy"},
		{"list that meets a fault", failing(errors.New("oops")), list, 500, "internal"},
		{"list without a store", failing(down), list, 503, "store_unavailable"},

		{"list in an unknown state", fine, request{method: "GET", path: "/v1/sessions?text=a&state=ended"}, 400, "invalid"},
		{"list that waits for a text", fine, request{method: "GET", path: "/v1/sessions?text=a&index=1"}, 400, "invalid"},

		{"count", fine, count, 200, ""},
		{"count that is misspelt", fine, misspelt(count), 400, "invalid"},
		{"count for a foreign host", fine, foreign(count), 403, "forbidden_host"},
		{"count among too many", failing(scheduler.ErrBusy), count, 429, "busy"},
		{"count that meets a fault", failing(errors.New("oops")), count, 500, "internal"},
		{"count without a store", failing(down), count, 503, "store_unavailable"},

		{"pools", fine, pools, 200, ""},
		{"pools that are misspelt", fine, misspelt(pools), 400, "invalid"},
		{"pools for a foreign host", fine, foreign(pools), 403, "forbidden_host"},
		{"pools for a caller who may not see all sessions", failing(scheduler.ErrPermissionDenied), pools, 403, "permission_denied"},
		{"pools among too many", failing(scheduler.ErrBusy), pools, 429, "busy"},
		{"pools that meet a fault", failing(errors.New("oops")), pools, 500, "internal"},
		{"pools without a store", failing(down), pools, 503, "store_unavailable"},

		{"renew", fine, renew, 200, ""},
		{"renew that is misspelt", fine, misspelt(renew), 400, "invalid"},
		{"renew for a foreign host", fine, foreign(renew), 403, "forbidden_host"},
		{"renew of a chat without a session", failing(scheduler.ErrNotFound), renew, 404, "not_found"},
		{"renew that comes too late", failing(scheduler.ErrExpired), renew, 409, "expired"},
		{"renew of a session whose sandbox ended", failing(scheduler.ErrNotRunning), renew, 409, "not_running"},
		{"renew from a form", fine, asForm(renew), 415, "unsupported_media_type"},
		{"renew among too many", failing(scheduler.ErrBusy), renew, 429, "busy"},
		{"renew that meets a fault", failing(errors.New("oops")), renew, 500, "internal"},
		{"renew without a store", failing(down), renew, 503, "store_unavailable"},

		{"exec", fine, exec, 200, ""},
		{"exec of what the scheduler refuses", failing(scheduler.ErrInvalid), exec, 400, "invalid"},
		{"exec for a foreign host", fine, foreign(exec), 403, "forbidden_host"},
		{"exec in a chat without a session", failing(scheduler.ErrNotFound), exec, 404, "not_found"},
		{"exec in a sandbox that ended", failing(scheduler.ErrNotRunning), exec, 409, "not_running"},
		{"exec in a session that expired", failing(scheduler.ErrExpired), exec, 409, "expired"},
		{"exec from a form", fine, asForm(exec), 415, "unsupported_media_type"},
		{"exec among too many", failing(scheduler.ErrBusy), exec, 429, "busy"},
		{"exec that meets a fault", failing(errors.New("oops")), exec, 500, "internal"},
		{"exec in a runtime without the ability", failing(errors.ErrUnsupported), exec, 501, "unsupported"},
		{"exec without a store", failing(down), exec, 503, "store_unavailable"},

		{"exec stream that is misspelt", fine, func(r request) request { r.path += "&no_such=1"; return r }(execStream), 400, "invalid"},
		{"exec stream for a foreign host", fine, foreign(execStream), 403, "forbidden_host"},
		{"exec stream in a chat without a session", failing(scheduler.ErrNotFound), execStream, 404, "not_found"},
		{"exec stream in a sandbox that ended", failing(scheduler.ErrNotRunning), execStream, 409, "not_running"},
		{"exec stream that is no websocket", fine, execStream, 426, "upgrade_required"},
		{"exec stream among too many", failing(scheduler.ErrBusy), execStream, 429, "busy"},
		{"exec stream that meets a fault", failing(errors.New("oops")), execStream, 500, "internal"},
		{"exec stream in a runtime without the ability", failing(errors.ErrUnsupported), execStream, 501, "unsupported"},
		{"exec stream without a store", failing(down), execStream, 503, "store_unavailable"},

		{"why", fine, why, 200, ""},
		{"why that is misspelt", fine, misspelt(why), 400, "invalid"},
		{"why for a foreign host", fine, foreign(why), 403, "forbidden_host"},
		{"why of a chat of which nothing is known", failing(scheduler.ErrNotFound), why, 404, "not_found"},
		{"why among too many", failing(scheduler.ErrBusy), why, 429, "busy"},
		{"why that meets a fault", failing(errors.New("oops")), why, 500, "internal"},
		{"why without a store", failing(down), why, 503, "store_unavailable"},

		{"logs", fine, readLogs, 200, ""},
		{"logs in frames", fine, readFrames, 200, ""},
		{"logs that are misspelt", fine, misspelt(readLogs), 400, "invalid"},
		{"logs of an unknown task", failing(runtime.ErrInvalid), readLogs, 400, "runtime_invalid"},
		{"logs for a foreign host", fine, foreign(readLogs), 403, "forbidden_host"},
		{"logs of a chat without a session", failing(scheduler.ErrNotFound), readLogs, 404, "not_found"},
		{"logs as a picture", fine, request{method: "GET", path: readLogs.path, header: http.Header{"Accept": {"image/png"}}}, 406, "not_acceptable"},
		{"logs that are not kept", failing(runtime.ErrLogsDisabled), readLogs, 409, "logs_disabled"},
		{"logs of a sandbox that is not there", failing(scheduler.ErrNotRunning), readLogs, 409, "not_running"},
		{"logs among too many", failing(scheduler.ErrBusy), readLogs, 429, "busy"},
		{"logs that meet a fault", failing(errors.New("oops")), readLogs, 500, "internal"},
		{"logs of a runtime that has none", failing(errors.ErrUnsupported), readLogs, 501, "unsupported"},
		{"logs without a runtime", failing(runtime.ErrUnavailable), readLogs, 503, "runtime_unavailable"},

		{"delete", fine, remove, 200, ""},
		{"delete of nothing", func(f *fake, _ *api.Config) { f.gone = true }, remove, 200, ""},
		{"delete that is misspelt", fine, misspelt(remove), 400, "invalid"},
		{"delete for a foreign host", fine, foreign(remove), 403, "forbidden_host"},
		{"delete with a form", fine, asForm(remove), 415, "unsupported_media_type"},
		{"delete among too many", failing(scheduler.ErrBusy), remove, 429, "busy"},
		{"delete that meets a fault", failing(runtime.ErrNotFound), remove, 500, "internal"},
		{"delete of a sandbox that does not end", failing(runtime.ErrNotStopped), remove, 503, "not_stopped"},
		{"delete without a runtime", failing(runtime.ErrUnavailable), remove, 503, "runtime_unavailable"},

		{"cleanup", fine, cleanup, 200, ""},
		{"cleanup that is misspelt", fine, misspelt(cleanup), 400, "invalid"},
		{"cleanup for a foreign host", fine, foreign(cleanup), 403, "forbidden_host"},
		{"cleanup from a form", fine, asForm(cleanup), 415, "unsupported_media_type"},
		{"cleanup among too many", failing(scheduler.ErrBusy), cleanup, 429, "busy"},
		{"cleanup that meets a fault", failing(errors.New("oops")), cleanup, 500, "internal"},
		{"cleanup without a store", failing(down), cleanup, 503, "store_unavailable"},

		{"events", func(f *fake, _ *api.Config) { f.batches = batches }, events, 200, ""},
		{"events of a reader that misses some", func(f *fake, _ *api.Config) { f.late = scheduler.ErrIndexTooOld }, events, 200, ""},
		{"events of an unknown type", failing(scheduler.ErrInvalid), events, 400, "invalid"},
		{"events for a foreign host", fine, foreign(events), 403, "forbidden_host"},
		{"events that are no longer kept", failing(scheduler.ErrIndexTooOld), events, 410, "index_too_old"},
		{"events among too many", failing(scheduler.ErrBusy), events, 429, "busy"},
		{"events that meet a fault", failing(errors.New("oops")), events, 500, "internal"},
		{"events without a store", failing(down), events, 503, "store_unavailable"},

		{"adopt", fine, adopt, 200, ""},
		{"adopt without a name", fine, bare(adopt), 200, ""},
		{"adopt of what nobody bears", failing(scheduler.ErrInvalid), adopt, 400, "invalid"},
		{"adopt where records are in memory", func(_ *fake, c *api.Config) { c.Operator = nil }, adopt, 400, "invalid"},
		{"adopt for a foreign host", fine, foreign(adopt), 403, "forbidden_host"},
		{"adopt from a form", fine, asForm(adopt), 415, "unsupported_media_type"},
		{"adopt that meets a fault", failing(errors.New("oops")), adopt, 500, "internal"},
		{"adopt without a store", failing(down), adopt, 503, "store_unavailable"},

		{"forget", fine, forget, 200, ""},
		{"forget where an identity stands", failing(scheduler.ErrInvalid), forget, 400, "invalid"},
		{"forget where records are in memory", func(_ *fake, c *api.Config) { c.Operator = nil }, forget, 400, "invalid"},
		{"forget for a foreign host", fine, foreign(forget), 403, "forbidden_host"},
		{"forget with a form", fine, asForm(forget), 415, "unsupported_media_type"},
		{"forget that meets a fault", failing(errors.New("oops")), forget, 500, "internal"},
		{"forget without a store", failing(down), forget, 503, "store_unavailable"},

		{"repair", fine, repair, 200, ""},
		{"repair that removes the record", func(f *fake, _ *api.Config) { f.gone = true }, repair, 200, ""},
		{"repair that is misspelt", fine, misspelt(repair), 400, "invalid"},
		{"repair for a foreign host", fine, foreign(repair), 403, "forbidden_host"},
		{"repair of a chat without a session", failing(scheduler.ErrNotFound), repair, 404, "not_found"},
		{"repair from a form", fine, asForm(repair), 415, "unsupported_media_type"},
		{"repair among too many", failing(scheduler.ErrBusy), repair, 429, "busy"},
		{"repair that meets a fault", failing(errors.New("oops")), repair, 500, "internal"},
		{"repair without a store", failing(down), repair, 503, "store_unavailable"},

		{"live", fine, live, 200, ""},
		{"live that is misspelt", fine, misspelt(live), 400, "invalid"},
		{"live for a foreign host", fine, foreign(live), 403, "forbidden_host"},
		{"live beside a failing part", func(_ *fake, c *api.Config) {
			c.Checks = []api.Check{{Name: "consul", Run: func(context.Context) error { return errors.New("refused") }}}
		}, live, 200, ""},

		{"health", fine, health, 200, ""},
		{"health that is misspelt", fine, misspelt(health), 400, "invalid"},
		{"health for a foreign host", fine, foreign(health), 403, "forbidden_host"},
		{"health of a failing part", func(_ *fake, c *api.Config) {
			c.Checks = []api.Check{{Name: "consul", Run: func(context.Context) error { return errors.New("refused") }}}
		}, health, 503, "unhealthy"},

		{"self", fine, self, 200, ""},
		{"self that is misspelt", fine, misspelt(self), 400, "invalid"},
		{"self for a foreign host", fine, foreign(self), 403, "forbidden_host"},
		{"self that is no JSON", func(_ *fake, c *api.Config) { c.Self.Config = func() {} }, self, 500, "internal"},

		{"metrics", fine, metrics, 200, ""},
		{"metrics that are misspelt", fine, misspelt(metrics), 400, "invalid"},
		{"metrics for a foreign host", fine, foreign(metrics), 403, "forbidden_host"},
		{"metrics that panic", panics, metrics, 500, "internal"},

		{"openapi.json", fine, openAPI, 200, ""},
		{"openapi.json that is misspelt", fine, misspelt(openAPI), 400, "invalid"},
		{"openapi.json for a foreign host", fine, foreign(openAPI), 403, "forbidden_host"},
	}
	recorder := apitest.New(t, nil)
	for _, c := range cases {
		t.Run(c.when, func(t *testing.T) {
			f := &fake{}
			a := startRecorded(t, recorder, f, func(config *api.Config) { c.given(f, config) })
			res, body := a.send(c.send)
			must.Eq(t, c.status, res.StatusCode, must.Sprint(body))
			if c.code != "" {
				var answer wire.ErrorAnswer
				must.NoError(t, json.Unmarshal([]byte(body), &answer))
				must.Eq(t, c.code, answer.Error.Code)
			}
		})
	}
	for name, r := range requests {
		t.Run(name+" without a token, and after too many wrong ones", func(t *testing.T) {
			a := startRecorded(t, recorder, &fake{}, authenticates)
			a.as("wrong", r)
			a.as("flood", r)
		})
	}
	must.Eq(t, recorder.Documented(), recorder.Seen())
}

func TestAdoptNamesTheInstanceThatTheCallerChose(t *testing.T) {
	f := &fake{}
	_, body := start(t, f).send(adopt)
	must.Eq(t, "default-4f7k2mq6zt3vxw5yabcd", f.adopt)
	must.Eq(t, `{"instance":"default-4f7k2mq6zt3vxw5yabcd","adopted":3,"failed":1}`+"\n", body)
}

func TestSessionAsTheCallerSeesIt(t *testing.T) {
	a := start(t, &fake{})
	res, body := a.send(create)
	must.Eq(t, `{"result":"created","session":{`+
		`"session_id":"0f0c3c1a-6c1d-4f0e-9a53-0d9a7f3b8a10","chat_id":"7d3f2a54-5b0e-4a55-8d2c-3f1f9b6f2c01",`+
		`"agent_id":"researcher","volume_host_path":"/srv/a&b <c>","runtime":"process","container_id":"4711",`+
		`"endpoint":{"ip":"10.0.3.7","port":25017},`+
		`"created_at":"2026-03-01T09:30:00.123456Z","expires_at":"2026-03-01T10:00:00.123456Z",`+
		`"state":"running","reason":"","owner":"anonymous","labels":{},"warm":false},`+
		`"access_token":"5ec2e7ab5ec2e7ab5ec2e7ab5ec2e7ab5ec2e7ab5ec2e7ab5ec2e7ab5ec2e7ab"}`+"\n", body)
	must.Eq(t, "application/json", res.Header.Get("Content-Type"))
}

func TestPoolsAsTheCallerSeesThem(t *testing.T) {
	_, body := start(t, &fake{}).send(pools)
	must.Eq(t, `{"pools":[{"name":"default","runtime":"nomad","size":10,"ready":7,"starting":3,"ending":1}]}`+"\n", body)
}

func TestAccessToken(t *testing.T) {
	token := string(session.AccessToken)
	for _, c := range []struct {
		name  string
		err   error
		send  request
		shown bool
	}{
		{"is_in_the_answer_to_a_create", nil, create, true},
		{"is_in_the_answer_to_a_get", nil, get, true},
		{"is_in_no_conflict", &scheduler.ConflictError{Session: session, Reason: "agent_id"}, create, false},
		{"is_in_no_list", nil, list, false},
		{"is_in_no_renewal", nil, renew, false},
		{"is_in_no_deletion", nil, remove, false},
		{"is_in_no_clean_up", nil, cleanup, false},
		{"is_in_no_repair", nil, repair, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := start(t, &fake{err: c.err, cleaned: []scheduler.Session{session}})
			res, body := a.send(c.send)
			if c.err == nil {
				must.Less(t, 300, res.StatusCode, must.Sprint(body))
			}
			must.Eq(t, c.shown, strings.Contains(body, `"access_token":"`+token+`"`))
			must.Eq(t, c.shown, strings.Contains(body, token))
			<-a.served
			must.StrNotContains(t, a.log.String(), token)
		})
	}
}

func TestWhyAsTheCallerSeesIt(t *testing.T) {
	_, body := start(t, &fake{}).send(why)
	must.Eq(t, `{"chat_id":"7d3f2a54-5b0e-4a55-8d2c-3f1f9b6f2c01","sessions":[`+
		`{"session_id":"0f0c3c1a-6c1d-4f0e-9a53-0d9a7f3b8a10","agent_id":"researcher","runtime":"process","state":"dead",`+
		`"outcome":"Its sandbox ended: exit code 3.","events":[`+
		`{"time":"2026-03-01T09:30:00.123456Z","source":"bivouac","text":"created by anonymous"},`+
		`{"time":null,"source":"process","text":"some <b>time</b>"}]},`+
		`{"session_id":"7d3f2a54-5b0e-4a55-8d2c-3f1f9b6f2c01","agent_id":"researcher","runtime":"process","state":"gone",`+
		`"outcome":"Deleted by anonymous.","events":[]}]}`+"\n", body)
}

func TestEndpointThatIsNotKnownIsNull(t *testing.T) {
	a := start(t, &fake{err: &scheduler.ConflictError{Session: scheduler.Session{State: scheduler.StateCreating}, Reason: "agent_id"}})
	_, body := a.send(create)
	must.StrContains(t, body, `"endpoint":null`)
	must.StrContains(t, body, `"reason":"agent_id"`)
}

func TestDeleteSaysWhatItEnded(t *testing.T) {
	f := &fake{}
	a := start(t, f)
	_, body := a.send(remove)
	must.Eq(t, `{"result":"deleted","chat_id":"7d3f2a54-5b0e-4a55-8d2c-3f1f9b6f2c01",`+
		`"session_id":"0f0c3c1a-6c1d-4f0e-9a53-0d9a7f3b8a10","container_id":"4711"}`+"\n", body)

	f.gone = true
	_, body = a.send(remove)
	must.Eq(t, `{"result":"not_found","chat_id":"7d3f2a54-5b0e-4a55-8d2c-3f1f9b6f2c01"}`+"\n", body)
}

func TestListsAreNeverNull(t *testing.T) {
	_, body := start(t, &fake{}).send(cleanup)
	must.Eq(t, `{"cleaned":[],"error_count":1}`+"\n", body)
}

func TestAdviceToComeBack(t *testing.T) {
	cases := []struct {
		err   error
		after string // in seconds, or nothing
	}{
		{scheduler.ErrBusy, "1"},
		{scheduler.ErrLockTimeout, "1"},
		{scheduler.ErrLockLost, "1"},
		{runtime.ErrConflict, "1"},
		{runtime.ErrNotPlaced, "5"},
		{runtime.ErrNotStopped, "5"},
		{scheduler.ErrUnavailable, "5"},
		{runtime.ErrUnavailable, "5"},
		{runtime.ErrNotReady, ""},
		{scheduler.ErrInvalid, ""},
		{errors.New("oops"), ""},
	}
	recorder := apitest.New(t, nil)
	for _, c := range cases {
		t.Run(scheduler.Kind(c.err), func(t *testing.T) {
			res, _ := startRecorded(t, recorder, &fake{err: c.err}).send(create)
			must.Eq(t, c.after, res.Header.Get("Retry-After"))
		})
	}
}

func TestStoreUnavailable_names_the_store_and_the_reason(t *testing.T) {
	err := &scheduler.UnavailableError{Reason: "it has no leader", Detail: "secret"}
	a := start(t, &fake{err: fmt.Errorf("create: %w", err)}, func(c *api.Config) { c.Store = "Consul at 127.0.0.1:8500" })
	_, refusal := a.refused(create)
	must.Eq(t, "Consul at 127.0.0.1:8500 cannot be reached, or its answer is unknown: it has no leader", refusal.Message)
}

func TestServerDenied_names_the_store_and_the_reason(t *testing.T) {
	err := &scheduler.UnavailableError{Reason: "the Consul token lacks the permission key:write", Detail: "secret"}
	a := start(t, &fake{err: fmt.Errorf("create: %w: %w", scheduler.ErrServerDenied, err)}, func(c *api.Config) { c.Store = "Consul at 127.0.0.1:8500" })
	_, refusal := a.refused(create)
	must.Eq(t, "server_permission_denied", refusal.Code)
	must.Eq(t, "Consul at 127.0.0.1:8500 refuses the credentials of this server: the Consul token lacks the permission key:write", refusal.Message)
}

func TestWordsOfAnErrorThatTheCallerIsTold(t *testing.T) {
	const secret = "http://10.1.2.3:8500/v1/txn?token=s3cret"
	cases := []struct {
		err  error
		told bool // the error's own words
	}{
		{scheduler.ErrInvalid, true},
		{runtime.ErrNotPlaced, true},
		{runtime.ErrNotReady, true},
		{runtime.ErrNotStopped, true},
		{scheduler.ErrLockTimeout, true},
		{scheduler.ErrUnavailable, false},
		{runtime.ErrUnavailable, false},
		{scheduler.ErrDamaged, false},
		{context.DeadlineExceeded, false},
		{errors.New("oops"), false},
	}
	recorder := apitest.New(t, nil)
	for _, c := range cases {
		t.Run(scheduler.Kind(c.err), func(t *testing.T) {
			a := startRecorded(t, recorder, &fake{err: fmt.Errorf("%w: %s", c.err, secret)})
			_, refusal := a.refused(create)
			must.Eq(t, c.told, strings.Contains(refusal.Message, secret))
			<-a.served
			must.StrContains(t, a.log.String(), secret)
			must.StrContains(t, a.log.String(), refusal.RequestID)
		})
	}
}

func TestBlockingReadIndex(t *testing.T) {
	f := &fake{}
	a := start(t, f)
	res, _ := a.send(get)
	must.Eq(t, "42", res.Header.Get(wire.HeaderIndex))
	res, _ = a.send(list)
	must.Eq(t, "43", res.Header.Get(wire.HeaderIndex))

	f.err = scheduler.ErrNotFound
	res, _ = a.send(get)
	must.Eq(t, 404, res.StatusCode)
	must.Eq(t, "42", res.Header.Get(wire.HeaderIndex))
}

func TestHealthNamesWhatIsFailing(t *testing.T) {
	a := start(t, &fake{}, func(c *api.Config) {
		c.Checks = []api.Check{
			{Name: "store", Run: func(context.Context) error { return nil }},
			{Name: "slow", Run: func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }},
			{Name: "broken", Run: func(context.Context) error { panic("oh") }},
			{Name: "extra", Run: func(context.Context) error { return errors.New("refused") }, Optional: true},
		}
	})
	began := time.Now()
	res, body := a.send(health)
	must.Eq(t, 503, res.StatusCode)
	must.Less(t, 10*time.Second, time.Since(began))
	var answer wire.HealthAnswer
	must.NoError(t, json.Unmarshal([]byte(body), &answer))
	must.Eq(t, map[string]wire.Check{
		"store":  {Status: "ok"},
		"slow":   {Status: "failing", Error: "context deadline exceeded"},
		"broken": {Status: "failing", Error: "panic: oh"},
		"extra":  {Status: "failing", Error: "refused"},
	}, answer.Checks)
	must.Eq(t, "failing: slow, broken", answer.Error.Message)
}

func TestAnAgentIsHealthyWithoutWhatItCanDoWithout(t *testing.T) {
	a := start(t, &fake{}, func(c *api.Config) {
		c.Checks = []api.Check{{Name: "extra", Run: func(context.Context) error { return errors.New("refused") }, Optional: true}}
	})
	res, body := a.send(health)
	must.Eq(t, 200, res.StatusCode)
	must.Eq(t, `{"status":"ok","instance":"default-0123456789abcdefghij","checks":{"extra":{"status":"failing","error":"refused"}}}`, strings.TrimSpace(body))
}
