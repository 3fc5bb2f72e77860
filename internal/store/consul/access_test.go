package consul

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/scheduler"
)

// TestHealthTellsWhatTheTokenMayNotDo checks that, with a Consul that denies by
// default, Health names the permission that a token lacks, in Consul's words.
func TestHealthTellsWhatTheTokenMayNotDo(t *testing.T) {
	management := uuid.NewString()
	stack.NeedServers(t)
	server, err := stack.StartConsul(t.Context(), stack.ConsulConfig{ManagementToken: management})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, server.Stop()) })
	root, err := NewClient(&api.Config{Address: server.Addr(), Token: management})
	must.NoError(t, err)
	const prefix = "acl/"
	token := func(name, rules string) string {
		policy, _, err := root.ACL().PolicyCreate(&api.ACLPolicy{Name: name, Rules: rules}, nil)
		must.NoError(t, err)
		made, _, err := root.ACL().TokenCreate(&api.ACLToken{Policies: []*api.ACLTokenPolicyLink{{ID: policy.ID}}}, nil)
		must.NoError(t, err)
		return made.SecretID
	}
	const session = ` session_prefix "" { policy = "write" }`
	for _, tc := range []struct {
		name, token string
		told        []string // nil means healthy
	}{
		{"enough", token("enough", `key_prefix "acl/" { policy = "write" }`+session), nil},
		{"anonymous", "", []string{"anonymous token", "lacks permission 'key:write' on \"acl/v1/probe\""}},
		{"read only", token("read", `key_prefix "acl/" { policy = "read" }`+session), []string{"lacks permission 'key:write' on \"acl/v1/probe\""}},
		{"another prefix", token("other", `key_prefix "bivouac/" { policy = "write" }`+session), []string{"lacks permission 'key:write' on \"acl/v1/probe\""}},
		{"some folders", token("folders", `key_prefix "acl/" { policy = "write" } key_prefix "acl/v1/flight/" { policy = "deny" }`+session), []string{"lacks permission 'key:write' on \"acl/v1/flight/probe\""}},
		{"no session", token("keys", `key_prefix "acl/" { policy = "write" }`), []string{"no Consul session", "lacks permission 'session:write'"}},
		{"no such token", uuid.NewString(), []string{"ACL not found"}},
	} {
		t.Run(strings.ReplaceAll(tc.name, " ", "_"), func(t *testing.T) {
			client, err := NewClient(&api.Config{Address: server.Addr(), Token: tc.token})
			must.NoError(t, err)
			c := &cluster{client: root, addr: server.Addr(), prefix: prefix}
			r := c.joinWith(t, client)
			_, err = r.session.current(t.Context()) // the session exists, or it could not be created
			health := r.Health(t.Context())
			if tc.told == nil {
				must.NoError(t, err)
				must.NoError(t, health)
				c.MustBeEmpty(t)
				return
			}
			must.ErrorIs(t, health, scheduler.ErrUnavailable)
			for _, words := range tc.told {
				must.ErrorContains(t, health, words)
			}
			unavailable, ok := errors.AsType[*scheduler.UnavailableError](health)
			must.True(t, ok)
			must.StrContains(t, unavailable.Reason, "token is not permitted")
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
		_, err := NewClient(&api.Config{Address: address})
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
	client, err := NewClient(&api.Config{Address: server.URL, TLSConfig: api.TLSConfig{InsecureSkipVerify: true}})
	must.NoError(t, err)
	_, err = client.Status().Leader()
	must.NoError(t, err)
	must.Eq(t, "HTTP/1.1", <-proto)
}
