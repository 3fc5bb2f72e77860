package api_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/audit"
	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/scheduler"
)

// disk is a disk that takes audit lines until it is full.
type disk struct {
	mu   sync.Mutex
	text bytes.Buffer
	room int // lines that still fit; negative: all
}

func (d *disk) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.room == 0 {
		return 0, syscall.ENOSPC
	}
	d.room--
	return d.text.Write(p)
}

func (d *disk) has(room int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.room = room
}

// taken returns the text that was written since the last call.
func (d *disk) taken() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	defer d.text.Reset()
	return d.text.String()
}

// accessToken matches the secret of a sandbox in an answer.
var accessToken = regexp.MustCompile(`"access_token":"([^"]+)"`)

// The credentials of the audited server's callers. They must be in no line.
const (
	supportToken = "bvk_support-secret"
	readerToken  = "bvk_reader-secret"
	opsToken     = "eyJhbGciOiJSUzI1NiJ9.ops-secret.c2ln"
	wrongToken   = "bvk_wrong-secret"
)

// audited is a server with a real scheduler and an audit log.
type audited struct {
	*agent
	disk   *disk
	clock  *clock
	driver *fakeruntime.Driver
	// secrets must be in no line: credentials, parts of them, and the access tokens of
	// sandboxes that were returned.
	secrets map[string]bool
}

// clock is a clock that a test moves.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func startAudited(t *testing.T, enforced bool) audited {
	t.Helper()
	a := audited{disk: &disk{room: -1}, clock: &clock{now: time.Now()}, driver: fakeruntime.New("fake"), secrets: map[string]bool{
		supportToken: true, readerToken: true, opsToken: true, wrongToken: true, "secret": true, "Bearer": true,
	}}
	sink, err := audit.Open(audit.Settings{Name: "disk", Path: audit.Stdout, Enforced: enforced}, a.disk)
	must.NoError(t, err)
	log := audit.New(audit.Config{Sinks: []*audit.Sink{sink}, Node: "n", Logger: hclog.NewNullLogger(), Lost: func(string) {}})
	sessions := newScheduler(t, func(c *scheduler.Config) {
		c.Drivers["fake"], c.Audit, c.Now = a.driver, log, a.clock.Now
	})
	rule := func(capabilities scheduler.Capabilities) []*scheduler.Policy {
		return []*scheduler.Policy{{Name: "p", Agents: []scheduler.AgentRule{{Prefix: "support-", Capabilities: capabilities}}}}
	}
	callers := map[string]scheduler.Caller{
		supportToken: {Name: "support", Method: "token", Policies: rule(scheduler.CapWrite | scheduler.CapExec)},
		readerToken:  {Name: "reader", Method: "token", Policies: rule(scheduler.CapRead)},
		opsToken:     {Name: "ops", Method: "jwt/nomad", Accessor: "jti-1", Policies: []*scheduler.Policy{{Name: "ops", Operator: scheduler.LevelWrite}}},
	}
	a.agent = start(t, sessions, func(c *api.Config) {
		c.Audit = log
		c.Authenticate = func(_ context.Context, credential, address string) (scheduler.Caller, error) {
			caller, ok := callers[credential]
			if !ok {
				return scheduler.Caller{}, fmt.Errorf("%w: unknown token", scheduler.ErrUnauthenticated)
			}
			caller.Address = address
			return caller, nil
		}
	})
	return a
}

// does sends a request and returns the status and the lines that it caused.
func (a audited) does(token string, r request) (status int, lines []string) {
	a.t.Helper()
	r.header = r.header.Clone()
	if r.header == nil {
		r.header = http.Header{}
	}
	r.header.Set("Authorization", "Bearer "+token)
	r.header.Set(wire.HeaderRequestID, "r1")
	r.header.Set("User-Agent", "test")
	res, body := a.send(r)
	<-a.served
	text := a.disk.taken()
	if match := accessToken.FindStringSubmatch(body); match != nil {
		a.secrets[match[1]] = true
	}
	for secret := range a.secrets {
		must.StrNotContains(a.t, text, secret)
		must.StrNotContains(a.t, a.log.String(), secret)
	}
	a.t.Logf("%d %s", res.StatusCode, body)
	for line := range strings.Lines(text) {
		lines = append(lines, a.short(line))
	}
	return res.StatusCode, lines
}

// short returns a line as "STAGE NAME METHOD OPERATION ENDPOINT CHAT AGENT COMMAND
// SESSION STATUS RESULT ERROR EXIT_CODE", with what does not apply left out. Whatever all lines of a
// request have is checked.
func (a audited) short(text string) string {
	a.t.Helper()
	var line struct {
		Payload struct {
			Stage string
			Auth  struct {
				Name, Method string
				AccessorID   string `json:"accessor_id"`
			}
			Request struct {
				ID, Operation, Endpoint string
				ChatID                  string `json:"chat_id"`
				AgentID                 string `json:"agent_id"`
				Command                 *audit.Command
				Meta                    struct {
					RemoteAddress string `json:"remote_address"`
					UserAgent     string `json:"user_agent"`
				} `json:"request_meta"`
			}
			Session *struct {
				SessionID string `json:"session_id"`
				AgentID   string `json:"agent_id"`
			}
			Response struct {
				StatusCode    int `json:"status_code"`
				Result, Error string
				ExitCode      *int `json:"exit_code"`
			}
			Gap json.RawMessage
		}
	}
	must.NoError(a.t, json.Unmarshal([]byte(text), &line), must.Sprint(text))
	p := line.Payload
	if p.Gap != nil {
		return "gap"
	}
	must.Eq(a.t, "r1", p.Request.ID, must.Sprint(text))
	must.StrHasPrefix(a.t, "127.0.0.1:", p.Request.Meta.RemoteAddress)
	if p.Request.Endpoint != "" {
		must.Eq(a.t, "test", p.Request.Meta.UserAgent)
	}
	if p.Auth.Name == "ops" {
		must.Eq(a.t, "jti-1", p.Auth.AccessorID)
	}
	words := []string{strings.ToLower(strings.TrimPrefix(p.Stage, "Operation")), p.Auth.Name, p.Auth.Method, p.Request.Operation, p.Request.Endpoint}
	switch p.Request.ChatID {
	case "":
	case chat.String():
		words = append(words, "chat")
	default:
		words = append(words, p.Request.ChatID)
	}
	words = append(words, p.Request.AgentID)
	if command := p.Request.Command; command != nil {
		words = append(words, fmt.Sprintf("runs %q as %q tty %v", command.Args, command.User, command.TTY))
	}
	if p.Session != nil {
		_, err := uuid.Parse(p.Session.SessionID)
		must.NoError(a.t, err)
		words = append(words, "session of "+p.Session.AgentID)
	}
	if p.Response.StatusCode != 0 {
		words = append(words, fmt.Sprint(p.Response.StatusCode))
	}
	words = append(words, p.Response.Result, p.Response.Error)
	if p.Response.ExitCode != nil {
		words = append(words, fmt.Sprint("exit ", *p.Response.ExitCode))
	}
	return strings.Join(strings.Fields(strings.Join(words, " ")), " ")
}

func TestAudit(t *testing.T) {
	a := startAudited(t, true)
	agent := func(id string) request {
		r := create
		r.body = strings.ReplaceAll(r.body, "researcher", id)
		return r
	}
	listed := list
	listed.path += "?agent_id=support-1"
	broken := create
	broken.body = `{"agent_id":`
	nowhere := get
	nowhere.path = "/v1/" + chat.String()
	secret := get
	secret.path += "?token=" + wrongToken
	foreign := create
	foreign.header = http.Header{"Sec-Fetch-Site": {"cross-site"}}

	runs := exec
	runs.body = `{"command":["cat","-u"],"user":"u","stdin":"secret","env":{"KEY":"secret"}}`
	streams := execStream
	streams.path += "&tty=true&env=%7B%22KEY%22%3A%22secret%22%7D"

	const path = " /v1/sessions/{chat_id} "
	for _, step := range []struct {
		name   string
		given  func()
		token  string
		does   request
		status int
		lines  []string
	}{
		{"create", nil, supportToken, agent("support-1"), 201, []string{
			"received support token PUT" + path + "chat",
			"complete support token PUT" + path + "chat support-1 session of support-1 201 created",
		}},
		{"reuse", nil, supportToken, agent("support-1"), 200, []string{
			"received support token PUT" + path + "chat",
			"complete support token PUT" + path + "chat support-1 session of support-1 200 reused",
		}},
		{"conflict", nil, supportToken, agent("support-2"), 409, []string{
			"received support token PUT" + path + "chat",
			"complete support token PUT" + path + "chat support-2 session of support-1 409 conflict conflict",
		}},
		{"get", nil, readerToken, get, 200, []string{
			"received reader token GET" + path + "chat",
			"complete reader token GET" + path + "chat session of support-1 200",
		}},
		{"list", nil, readerToken, listed, 200, []string{
			"received reader token GET /v1/sessions",
			"complete reader token GET /v1/sessions support-1 200",
		}},
		{"renew", nil, supportToken, renew, 200, []string{
			"received support token POST /v1/sessions/{chat_id}/renew chat",
			"complete support token POST /v1/sessions/{chat_id}/renew chat session of support-1 200 renewed",
		}},
		{"exec", nil, supportToken, runs, 200, []string{
			`received support token POST /v1/sessions/{chat_id}/exec chat runs ["cat" "-u"] as "u" tty false`,
			`complete support token POST /v1/sessions/{chat_id}/exec chat runs ["cat" "-u"] as "u" tty false session of support-1 200 exit 0`,
		}},
		{"exec refused by policy", nil, readerToken, runs, 403, []string{
			`received reader token POST /v1/sessions/{chat_id}/exec chat runs ["cat" "-u"] as "u" tty false`,
			`complete reader token POST /v1/sessions/{chat_id}/exec chat runs ["cat" "-u"] as "u" tty false 403 permission_denied`,
		}},
		{"exec on what is no websocket", nil, supportToken, streams, 426, []string{
			`received support token GET /v1/sessions/{chat_id}/exec chat runs ["cat"] as "" tty true`,
			`complete support token GET /v1/sessions/{chat_id}/exec chat runs ["cat"] as "" tty true session of support-1 426 upgrade_required`,
		}},
		{"repair of what is intact", nil, opsToken, repair, 200, []string{
			"received ops jwt/nomad POST /v1/operator/repair/{chat_id} chat",
			"complete ops jwt/nomad POST /v1/operator/repair/{chat_id} chat session of support-1 200 intact",
		}},
		{"renewal refused by policy", nil, readerToken, renew, 403, []string{
			"received reader token POST /v1/sessions/{chat_id}/renew chat",
			"complete reader token POST /v1/sessions/{chat_id}/renew chat 403 error permission_denied",
		}},
		{"create refused by policy", nil, supportToken, agent("billing-1"), 403, []string{
			"received support token PUT" + path + "chat",
			"complete support token PUT" + path + "chat billing-1 403 error permission_denied",
		}},
		{"cleanup refused by policy", nil, supportToken, cleanup, 403, []string{
			"received support token POST /v1/cleanup",
			"complete support token POST /v1/cleanup 403 permission_denied",
		}},
		{"metrics refused by policy", nil, supportToken, metrics, 403, []string{
			"complete support token GET /v1/metrics 403 permission_denied",
		}},
		{"wrong token", nil, wrongToken, get, 401, []string{"complete anonymous GET" + path + "chat 401 unauthenticated"}},
		{"token in the query", nil, wrongToken, secret, 401, []string{"complete anonymous GET" + path + "chat 401 unauthenticated"}},
		{"foreign origin", nil, supportToken, foreign, 403, []string{"complete anonymous PUT" + path + "chat 403 forbidden_origin"}},
		{"create that is not understood", nil, supportToken, broken, 400, []string{
			"received support token PUT" + path + "chat",
			"complete support token PUT" + path + "chat 400 invalid",
		}},
		{"unknown path", nil, supportToken, nowhere, 404, nil},
		{"health", nil, supportToken, health, 200, nil},
		{"description", nil, supportToken, openAPI, 200, nil},
		{"configuration", nil, opsToken, self, 200, []string{
			"received ops jwt/nomad GET /v1/agent/self",
			"complete ops jwt/nomad GET /v1/agent/self 200",
		}},
		{"cleanup", func() { a.clock.advance(2 * time.Hour) }, opsToken, cleanup, 200, []string{
			"received ops jwt/nomad POST /v1/cleanup",
			"received ops jwt/nomad expire chat session of support-1",
			"complete ops jwt/nomad expire chat session of support-1 expired",
			"complete ops jwt/nomad POST /v1/cleanup 200",
		}},
		{"get of nothing", nil, readerToken, get, 404, []string{
			"received reader token GET" + path + "chat",
			"complete reader token GET" + path + "chat 404 not_found",
		}},
		{"create again", nil, supportToken, agent("support-1"), 201, []string{
			"received support token PUT" + path + "chat",
			"complete support token PUT" + path + "chat support-1 session of support-1 201 created",
		}},
		{"delete", nil, supportToken, remove, 200, []string{
			"received support token DELETE" + path + "chat",
			"complete support token DELETE" + path + "chat session of support-1 200 deleted",
		}},
		{"delete of nothing", nil, supportToken, remove, 200, []string{
			"received support token DELETE" + path + "chat",
			"complete support token DELETE" + path + "chat 200 not_found",
		}},
	} {
		t.Run(step.name, func(t *testing.T) {
			if step.given != nil {
				step.given()
			}
			status, lines := a.does(step.token, step.does)
			must.Eq(t, step.status, status)
			must.Eq(t, step.lines, lines)
		})
	}
	must.MapLen(t, 8, a.secrets, must.Sprint("two sandboxes have told their access token"))
}

func TestAudit_full_disk(t *testing.T) {
	support := create
	support.body = strings.ReplaceAll(create.body, "researcher", "support-1")

	t.Run("enforced: nothing is done", func(t *testing.T) {
		a := startAudited(t, true)
		a.disk.has(0)
		for _, r := range []request{support, get, list, renew, remove} {
			status, lines := a.does(supportToken, r)
			must.Eq(t, http.StatusServiceUnavailable, status)
			must.SliceEmpty(t, lines)
		}
		status, _ := a.does(opsToken, cleanup)
		must.Eq(t, http.StatusServiceUnavailable, status)
		must.SliceEmpty(t, a.driver.Running())

		status, _ = a.does("", health)
		must.Eq(t, http.StatusOK, status, must.Sprint("the API itself is healthy"))
		status, _ = a.does(wrongToken, get)
		must.Eq(t, http.StatusUnauthorized, status)

		a.disk.has(-1)
		status, lines := a.does(supportToken, support)
		must.Eq(t, http.StatusCreated, status)
		must.Eq(t, "gap", lines[0])
		must.Len(t, 3, lines)
	})

	t.Run("enforced: what has been done is answered", func(t *testing.T) {
		a := startAudited(t, true)
		a.disk.has(1)
		status, lines := a.does(supportToken, support)
		must.Eq(t, http.StatusCreated, status)
		must.Len(t, 1, lines)
		must.StrHasPrefix(t, "received", lines[0])
		must.Len(t, 1, a.driver.Running())
	})

	t.Run("best-effort: everything is done", func(t *testing.T) {
		a := startAudited(t, false)
		a.disk.has(0)
		status, lines := a.does(supportToken, support)
		must.Eq(t, http.StatusCreated, status)
		must.SliceEmpty(t, lines)
	})
}

func TestAudit_refused_requests_are_limited(t *testing.T) {
	a := startAudited(t, true)
	total := 0
	for range 300 {
		status, lines := a.does(wrongToken, get)
		must.Eq(t, http.StatusUnauthorized, status)
		total += len(lines)
	}
	must.Between(t, 100, total, 200) // one more for each second that this takes
	_, lines := a.does(supportToken, get)
	must.Len(t, 2, lines, must.Sprint("callers are not limited"))
}
