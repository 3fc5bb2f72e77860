package agent

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/store/consul"
)

func TestConsulToken(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		must.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	configured, environment, empty := file("a", "of-file\n"), file("b", "of-environment-file\n"), file("c", "")
	seen := make(chan string, 100)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen <- r.Header.Get("X-Consul-Token")
		w.WriteHeader(http.StatusTeapot)
	}))
	t.Cleanup(server.Close)
	for name, tc := range map[string]struct {
		consul   config.Consul
		env, own string // CONSUL_HTTP_TOKEN and CONSUL_HTTP_TOKEN_FILE
		want     string
		reloads  bool
		told     string // an error
	}{
		"none":                                   {},
		"configured":                             {consul: config.Consul{Token: "own"}, want: "own"},
		"configured, beside the environment":     {consul: config.Consul{Token: "own"}, env: "env", own: environment, want: "own"},
		"in a configured file":                   {consul: config.Consul{TokenFile: configured}, env: "env", own: environment, want: "of-file", reloads: true},
		"of the environment":                     {env: "env", want: "env"},
		"in a file of the environment":           {env: "env", own: environment, want: "of-environment-file", reloads: true},
		"in a configured file that is empty":     {consul: config.Consul{TokenFile: empty}, told: "consul.token_file: credentials: token file: " + empty + " is empty"},
		"in an empty file of the environment":    {own: empty, told: "CONSUL_HTTP_TOKEN_FILE: credentials: token file: " + empty + " is empty"},
		"in a configured file that is not there": {consul: config.Consul{TokenFile: filepath.Join(dir, "x")}, told: "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("CONSUL_HTTP_TOKEN", tc.env)
			t.Setenv("CONSUL_HTTP_TOKEN_FILE", tc.own)
			c := config.Default()
			c.Consul = tc.consul
			c.Consul.Address = server.URL
			used, err := newConsul(c, consul.Config{}, hclog.NewNullLogger())
			if tc.told != "" {
				must.ErrorContains(t, err, tc.told)
				return
			}
			must.NoError(t, err)
			_, reloads := used.credentials["consul_token"]
			must.Eq(t, tc.reloads, reloads)
			must.Error(t, used.store.Health(t.Context()))
			must.Eq(t, tc.want, <-seen)
		})
	}
}
