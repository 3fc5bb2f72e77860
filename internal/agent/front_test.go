package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/agent/httpserver"
	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/test/certs"
)

// listenAt listens as a server with this configuration does.
func listenAt(t *testing.T, c config.Config) (front, string) {
	t.Helper()
	var log bytes.Buffer
	f, err := listen(t.Context(), c, hclog.New(&hclog.LoggerOptions{Output: &log}))
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, httpserver.Close(f.listeners)) })
	return f, log.String()
}

func secureConfig(t *testing.T) config.Config {
	t.Helper()
	ca := certs.NewCA(t)
	caFile, certFile, keyFile := certs.Write(t, t.TempDir(), ca, ca.Issue(t, "127.0.0.1"))
	c := config.Default()
	c.TLS.CertFile, c.TLS.KeyFile, c.TLS.ClientCAFile = certFile, keyFile, caFile
	return c
}

func TestListen(t *testing.T) {
	t.Run("warns of addresses where others can read the requests", func(t *testing.T) {
		open, secure := config.Default(), secureConfig(t)
		open.HTTPAddrs = []string{"127.0.0.1:0", "0.0.0.0:0"}
		secure.HTTPAddrs = open.HTTPAddrs
		f, log := listenAt(t, open)
		must.StrContains(t, log, "http_without_tls: http_addr="+f.addresses()[1])
		must.StrNotContains(t, log, f.addresses()[0])
		must.StrHasPrefix(t, "http://127.0.0.1:", f.url())

		f, log = listenAt(t, secure)
		must.Eq(t, "", log)
		must.StrHasPrefix(t, "https://127.0.0.1:", f.url())
	})
	t.Run("names the addresses of sockets", func(t *testing.T) {
		c := config.Default()
		dir, err := os.MkdirTemp("", "bivouac") //nolint:usetesting // the path of t.TempDir is too long
		must.NoError(t, err)
		t.Cleanup(func() { must.NoError(t, os.RemoveAll(dir)) })
		c.HTTPAddrs = []string{"unix://" + filepath.Join(dir, "api.sock")}
		f, _ := listenAt(t, c)
		must.Eq(t, c.HTTPAddrs, f.addresses())
	})
	t.Run("refuses a certificate that it cannot use, and so does config validate", func(t *testing.T) {
		c := secureConfig(t)
		c.TLS.KeyFile = c.TLS.CertFile
		_, err := listen(t.Context(), c, hclog.NewNullLogger())
		must.ErrorContains(t, err, "tls: credentials: certificate file "+c.TLS.CertFile)
		must.ErrorContains(t, Validate(t.Context(), c), "tls: credentials: certificate file "+c.TLS.CertFile)
	})
}

func TestHostsOfTheConfiguration(t *testing.T) {
	c := config.Default()
	c.HTTPAddrs = []string{"Bivouac.Internal:4747", ":4748", "unix:///run/api.sock"}
	c.HostNames = []string{"Bivouac.example."}
	must.Eq(t, []string{"bivouac.example", "bivouac.internal"}, hosts(c))
}
