package consul

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/internal/test/storetest"
	"github.com/bivouac/bivouac/scheduler"
)

// guarded is a Consul that denies by default.
type guarded struct {
	*cluster // its client may do everything
}

func openGuarded(t *testing.T) *guarded {
	t.Helper()
	management := uuid.NewString()
	stack.NeedServers(t)
	server, err := stack.StartConsul(t.Context(), stack.ConsulConfig{ManagementToken: management, MaxHTTPConns: 2000})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, server.Stop()) })
	root, err := NewClient(&api.Config{Address: server.Addr()}, credentials.NewToken(management))
	must.NoError(t, err)
	return &guarded{&cluster{client: root, addr: server.Addr(), prefix: "acl/"}}
}

// allow returns a new token with these rules.
func (g *guarded) allow(t *testing.T, rules string) *api.ACLToken {
	t.Helper()
	policy, _, err := g.client.ACL().PolicyCreate(&api.ACLPolicy{Name: uuid.NewString(), Rules: rules}, nil)
	must.NoError(t, err)
	token, _, err := g.client.ACL().TokenCreate(&api.ACLToken{Policies: []*api.ACLTokenPolicyLink{{ID: policy.ID}}}, nil)
	must.NoError(t, err)
	return token
}

// leastRules is all that Bivouac needs.
const leastRules = `key_prefix "acl/" { policy = "write" } session_prefix "" { policy = "write" }`

// TestLeastPolicy runs the contracts of stores and locks with a token that has no more
// rights than needed.
func TestLeastPolicy(t *testing.T) {
	g := openGuarded(t)
	g.token = credentials.NewToken(g.allow(t, leastRules).SecretID)
	var clusters atomic.Int32
	open := func(*testing.T) storetest.Cluster { // each with keys of its own
		next := *g.cluster
		next.prefix = fmt.Sprintf("acl/%d/", clusters.Add(1))
		return &next
	}
	storetest.Stores(t, open)
	storetest.Locks(t, open)
	storetest.Changes(t, open)
}

// TestTokenIsReplacedWhileLocksAreHeld deletes a replica's token and writes a new one to
// its file. The replica keeps its locks and its Consul session.
func TestTokenIsReplacedWhileLocksAreHeld(t *testing.T) {
	t.Parallel()
	g := openGuarded(t)
	first := g.allow(t, leastRules)
	path := filepath.Join(t.TempDir(), "token")
	must.NoError(t, os.WriteFile(path, []byte(first.SecretID+"\n"), 0o600))
	var err error
	g.token, err = credentials.TokenFile(path)
	must.NoError(t, err)
	r := g.join(t, g.addr)
	leases := map[uuid.UUID]scheduler.Lease{}
	for range 5 {
		chatID := uuid.New()
		leases[chatID] = lock(t, r, chatID)
	}
	hold, err := r.session.current(t.Context())
	must.NoError(t, err)

	_, err = g.client.ACL().TokenDelete(first.AccessorID, nil)
	must.NoError(t, err)
	_, _, err = r.Get(t.Context(), uuid.New(), scheduler.Block{})
	must.ErrorIs(t, err, scheduler.ErrServerDenied)
	must.ErrorContains(t, err, "ACL not found")
	second := g.allow(t, leastRules)
	must.NoError(t, os.WriteFile(path, []byte(second.SecretID+"\n"), 0o600))

	// Until the session was renewed with the second token.
	written := hold.until()
	must.Wait(t, wait.InitialSuccess(wait.BoolFunc(func() bool { return hold.over() || hold.until().After(written) }),
		wait.Timeout(patience), wait.Gap(10*time.Millisecond)))
	must.False(t, hold.over())
	for chatID, lease := range leases {
		session := freshSession()
		session.ChatID = chatID
		must.NoError(t, lease.Write(t.Context(), &session, scheduler.Release))
	}
	again, err := r.session.current(t.Context())
	must.NoError(t, err)
	must.Eq(t, hold.session, again.session)
}

// TestHealthTellsWhatTheTokenMayNotDo checks that, with a Consul that denies by
// default, Health names the permission that a token lacks, in Consul's words.
func TestHealthTellsWhatTheTokenMayNotDo(t *testing.T) {
	g := openGuarded(t)
	token := func(rules string) string { return g.allow(t, rules).SecretID }
	const session = ` session_prefix "" { policy = "write" }`
	for _, tc := range []struct {
		name, token string
		told        []string // nil means healthy
	}{
		{"enough", token(`key_prefix "acl/" { policy = "write" }` + session), nil},
		{"anonymous", "", []string{"anonymous token", "lacks permission 'key:write' on \"acl/v1/probe\""}},
		{"read only", token(`key_prefix "acl/" { policy = "read" }` + session), []string{"lacks permission 'key:write' on \"acl/v1/probe\""}},
		{"another prefix", token(`key_prefix "bivouac/" { policy = "write" }` + session), []string{"lacks permission 'key:write' on \"acl/v1/probe\""}},
		{"some folders", token(`key_prefix "acl/" { policy = "write" } key_prefix "acl/v1/flight/" { policy = "deny" }` + session), []string{"lacks permission 'key:write' on \"acl/v1/flight/probe\""}},
		{"no events", token(`key_prefix "acl/" { policy = "write" } key_prefix "acl/v1/events/" { policy = "read" }` + session), []string{"lacks permission 'key:write' on \"acl/v1/events/probe\""}},
		{"no session", token(`key_prefix "acl/" { policy = "write" }`), []string{"no Consul session", "lacks permission 'session:write'"}},
		{"no such token", uuid.NewString(), []string{"ACL not found"}},
	} {
		t.Run(strings.ReplaceAll(tc.name, " ", "_"), func(t *testing.T) {
			c := *g.cluster
			c.token = credentials.NewToken(tc.token)
			r := c.join(t, c.addr)
			_, err := r.session.current(t.Context()) // the session exists, or it could not be created
			health := r.Health(t.Context())
			if tc.told == nil {
				must.NoError(t, err)
				must.NoError(t, health)
				c.MustBeEmpty(t)
				return
			}
			must.ErrorIs(t, health, scheduler.ErrUnavailable)
			must.ErrorIs(t, health, scheduler.ErrServerDenied)
			must.Eq(t, "server_permission_denied", scheduler.Kind(health))
			for _, words := range tc.told {
				must.ErrorContains(t, health, words)
			}
			unavailable, ok := errors.AsType[*scheduler.UnavailableError](health)
			must.True(t, ok)
			must.RegexMatch(t, regexp.MustCompile("token is not permitted|token lacks the permission (key|session):write"), unavailable.Reason)
			must.StrNotContains(t, unavailable.Reason, "acl/")
			t.Log(health)
		})
	}
}

func TestPrefixesAreFolders(t *testing.T) {
	for _, prefix := range []string{"bivouac", "bivouac/", "/a/b/", "a.b", "a_b/c-d/1..2"} {
		_, err := newKeyspace(prefix)
		must.NoError(t, err, must.Sprint(prefix))
	}
	for _, prefix := range []string{
		"/", ".", "..", "./a", "a/..", "a/./b", ".hidden", "a//b", "a b", "a%2fb", "a?b", "a#b", "a\\b", "a\nb", "ä", strings.Repeat("a", maxPrefix+1),
	} {
		_, err := newKeyspace(prefix)
		must.ErrorContains(t, err, "prefix of keys", must.Sprint(prefix))
	}
}

func TestAddresses(t *testing.T) {
	for address, want := range map[string]string{
		"":                        "",
		"127.0.0.1:8500":          "127.0.0.1:8500",
		"127.0.0.1:8500/":         "127.0.0.1:8500",
		"http://localhost:8500//": "http://localhost:8500",
		"https://[::1]:8501":      "https://[::1]:8501",
		"https://proxy/consul/":   "https://proxy/consul",
		"unix:///run/consul.sock": "unix:///run/consul.sock",
	} {
		got, err := cleanAddress(address)
		must.NoError(t, err, must.Sprint(address))
		must.Eq(t, want, got)
	}
	for _, address := range []string{"not a url", "ftp://x", "127.0.0.1:8500/consul", "http://", "http://x?y", "http://user:s3cret@x:8500", "user:s3cret@x:8500", "x:99999", "unix://x"} {
		_, err := NewClient(&api.Config{Address: address}, nil)
		must.ErrorContains(t, err, "address", must.Sprint(address))
		must.StrNotContains(t, err.Error(), "s3cret")
	}
}

// TestAddressWithATrailingSlashReachesConsul covers a slash at the end of the
// address, which used to lead to a wrong path.
func TestAddressWithATrailingSlashReachesConsul(t *testing.T) {
	c := open(t)
	r := c.join(t, "http://"+c.addr+"/")
	_, err := r.session.current(t.Context())
	must.NoError(t, err)
	must.NoError(t, r.Health(t.Context()))
}

func TestClientSpeaksHTTP1(t *testing.T) {
	proto := make(chan string, 1)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		proto <- r.Proto
		_, _ = w.Write([]byte(`"127.0.0.1:8300"`))
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	client, err := NewClient(&api.Config{Address: server.URL, TLSConfig: api.TLSConfig{InsecureSkipVerify: true}}, nil)
	must.NoError(t, err)
	_, err = client.Status().Leader()
	must.NoError(t, err)
	must.Eq(t, "HTTP/1.1", <-proto)
}
