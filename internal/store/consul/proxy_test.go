package consul

import (
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/consul/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/faultproxy"
)

// fault is how a proxy handles a request.
type fault = faultproxy.Handler

// answer answers with the status instead of Consul.
func answer(status int) fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) { w.WriteHeader(status) }
}

// answerAfter passes the request to Consul and answers with the status.
func answerAfter(status int) fault {
	return func(w http.ResponseWriter, r *http.Request, consul http.Handler) {
		consul.ServeHTTP(&faultproxy.Discard{}, r)
		w.WriteHeader(status)
	}
}

// request is a request that reached a proxy, described by what it does.
type request struct {
	kind     string // "get", "keys", "lock", "write", "release", "read txn", "session", "identity", or see changesKind
	blocking bool
	trees    int // how many shards or minutes it reads
}

// proxy sits between a replica and Consul.
type proxy struct {
	addr string

	mu    sync.Mutex
	seen  []request
	fault func(request) fault // if it is nil or returns nil, the request passes
}

func newProxy(t *testing.T, addr string) *proxy {
	t.Helper()
	p := &proxy{}
	started, err := faultproxy.Start("127.0.0.1:0", func(w http.ResponseWriter, r *http.Request, consul http.Handler) {
		if act := p.note(classifyRequest(r, string(faultproxy.Body(r)))); act != nil {
			act(w, r, consul)
			return
		}
		consul.ServeHTTP(w, r)
	}, addr)
	must.NoError(t, err)
	t.Cleanup(started.Close)
	p.addr = started.Addr()
	return p
}

func classifyRequest(r *http.Request, body string) request {
	query := r.URL.Query()
	switch {
	case strings.HasSuffix(r.URL.Path, "/v1/identity"), strings.HasSuffix(r.URL.Path, "/v1/sessions/"),
		strings.Contains(body, `/v1/identity"`) && strings.Count(body, `"KV"`) == 1:
		return request{kind: "identity"}
	case strings.HasPrefix(r.URL.Path, "/v1/kv/"):
		kind := "get"
		if query.Has("keys") {
			kind = "keys"
		}
		return request{kind: kind, blocking: query.Has("index")}
	case r.URL.Path != "/v1/txn", strings.Contains(body, `/v1/replicas/`) && !strings.Contains(body, `/v1/locks/`):
		return request{kind: "session"}
	case strings.Contains(body, `/v1/events/head"`) && !strings.Contains(body, `/v1/locks/`):
		return request{kind: changesKind(body)}
	case strings.Contains(body, `"`+string(api.KVLock)+`"`):
		return request{kind: "lock"}
	case strings.Contains(body, `"`+string(api.KVCheckIndex)+`"`):
		return request{kind: "write"}
	case strings.Contains(body, `"`+string(api.KVDeleteCAS)+`"`):
		return request{kind: "release"}
	default:
		return request{kind: "read txn", trees: strings.Count(body, `"`+string(api.KVGetTree)+`"`)}
	}
}

// changesKind returns what a transaction does that has to do with changes only.
func changesKind(body string) string {
	switch {
	case strings.Contains(body, `"`+string(api.KVCAS)+`"`), strings.Contains(body, `"`+string(api.KVDeleteTree)+`"`):
		return "tidy"
	case strings.Contains(body, `"`+string(api.KVCheckIndex)+`"`):
		return "note"
	case strings.Contains(body, `/v1/events/changed"`):
		return "read changes"
	default:
		return "upkeep" // reads the head
	}
}

func (p *proxy) note(r request) fault {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen = append(p.seen, r)
	if p.fault == nil {
		return nil
	}
	return p.fault(r)
}

// do sets how the proxy handles requests from now on.
func (p *proxy) do(rule func(request) fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = rule
}

// first applies a fault to the first n requests of a kind.
func first(n int, kind string, act fault) func(request) fault {
	return func(r request) fault {
		if r.kind != kind || n == 0 {
			return nil
		}
		n--
		return act
	}
}

// always applies a fault to every request.
func always(act fault) func(request) fault { return func(request) fault { return act } }

// trees returns how many shards or minutes were read since the last call, and
// clears the record of requests.
func (p *proxy) trees() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	trees := 0
	for _, r := range p.seen {
		trees += r.trees
	}
	p.seen = nil
	return trees
}

// kinds returns the requests to Consul's KV store since the last call, and
// clears the record of requests.
func (p *proxy) kinds() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var kinds []string
	for _, r := range p.seen {
		switch r.kind {
		case "session", "identity", "tidy", "upkeep": // they belong to no operation
			continue
		}
		if r.blocking {
			r.kind = "blocking " + r.kind
		}
		kinds = append(kinds, r.kind)
	}
	p.seen = nil
	return kinds
}
