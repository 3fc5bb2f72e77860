package agent

import (
	"crypto/tls"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/store/consul"
	"github.com/bivouac/bivouac/internal/test/certs"
	"github.com/bivouac/bivouac/scheduler"
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

// TestConsulTLS connects to a server that requires a client certificate, and answers every
// request with status 418.
func TestConsulTLS(t *testing.T) {
	ca, other := certs.NewCA(t), certs.NewCA(t)
	files := func(dir string, trusted *certs.CA, pair certs.Pair) credentials.Files {
		caFile, certFile, keyFile := certs.Write(t, dir, trusted, pair)
		return credentials.Files{CA: caFile, Certificate: certFile, Key: keyFile}
	}
	serve := func(t *testing.T, own credentials.Files) (string, *credentials.TLS) {
		loaded, err := credentials.LoadTLS(own)
		must.NoError(t, err)
		server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }))
		server.Config.ErrorLog = hclog.NewNullLogger().StandardLogger(nil)
		server.Listener = tls.NewListener(server.Listener, loaded.Server(tls.VersionTLS12, tls.RequireAndVerifyClientCert))
		server.Start()
		t.Cleanup(server.Close)
		return "https://" + server.Listener.Addr().String(), loaded
	}
	connect := func(t *testing.T, address string, own credentials.Files) consulParts {
		c := config.Default()
		c.Consul = config.Consul{
			Address: address, TLSServerName: "server.dc1.consul",
			CAFile: own.CA, CertFile: own.Certificate, KeyFile: own.Key,
		}
		used, err := newConsul(c, consul.Config{}, hclog.NewNullLogger())
		must.NoError(t, err)
		return used
	}
	theirs := ca.Issue(t, "server.dc1.consul")
	for name, tc := range map[string]struct {
		server certs.Pair
		mine   credentials.Files
		told   string
		denied bool
	}{
		"certificates of a trusted CA":   {theirs, files(t.TempDir(), ca, ca.Issue(t, "bivouac")), "418", false},
		"an unknown CA of the server":    {other.Issue(t, "server.dc1.consul"), files(t.TempDir(), ca, ca.Issue(t, "bivouac")), "certificate signed by unknown authority", false},
		"another name of the server":     {ca.Issue(t, "client.dc1.consul"), files(t.TempDir(), ca, ca.Issue(t, "bivouac")), "not server.dc1.consul", false},
		"an expired server certificate":  {ca.IssueFor(t, -time.Minute, "server.dc1.consul"), files(t.TempDir(), ca, ca.Issue(t, "bivouac")), "certificate has expired", false},
		"an unknown CA of the client":    {theirs, files(t.TempDir(), ca, other.Issue(t, "bivouac")), "remote error: tls: ", true},
		"an expired client certificate":  {theirs, files(t.TempDir(), ca, ca.IssueFor(t, -time.Minute, "bivouac")), "remote error: tls: ", true},
		"a client without a certificate": {theirs, credentials.Files{CA: files(t.TempDir(), ca, certs.Pair{}).CA}, "remote error: tls: certificate required", true},
	} {
		t.Run(name, func(t *testing.T) {
			address, _ := serve(t, files(t.TempDir(), ca, tc.server))
			err := connect(t, address, tc.mine).store.Health(t.Context())
			must.ErrorContains(t, err, tc.told)
			must.ErrorIs(t, err, scheduler.ErrUnavailable)
			must.Eq(t, tc.denied, errors.Is(err, scheduler.ErrServerDenied))
			t.Log(err)
		})
	}
	t.Run("files that turn", func(t *testing.T) {
		dir, ownDir := t.TempDir(), t.TempDir()
		address, server := serve(t, files(dir, ca, theirs))
		used := connect(t, address, files(ownDir, ca, ca.Issue(t, "bivouac")))
		must.ErrorContains(t, used.store.Health(t.Context()), "418")

		// The server gets another CA. Its old connections stay, so none may be used again.
		files(dir, other, other.Issue(t, "server.dc1.consul"))
		_, err := server.Reload()
		must.NoError(t, err)
		used = connect(t, address, files(ownDir, ca, ca.Issue(t, "bivouac")))
		must.ErrorContains(t, used.store.Health(t.Context()), "unknown authority")

		// So does the replica.
		files(ownDir, other, other.Issue(t, "bivouac"))
		_, err = used.credentials["consul_tls"].Reload()
		must.NoError(t, err)
		must.ErrorContains(t, used.store.Health(t.Context()), "418")
	})
	t.Run("files without https are refused", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "a.hcl")
		must.NoError(t, os.WriteFile(path, []byte(`consul { ca_file = "/ca.pem" }`), 0o600))
		c := config.Default()
		must.NoError(t, c.Read(path))
		_, err := newConsul(c, consul.Config{}, hclog.NewNullLogger())
		must.ErrorContains(t, err, "TLS needs an address that begins with https://")
	})
}
