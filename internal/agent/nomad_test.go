package agent

import (
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/internal/test/certs"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// deniedBy is a Nomad that denies every request, and notes the token of the last one.
func deniedBy(t *testing.T, listener net.Listener) *atomic.Pointer[string] {
	t.Helper()
	var token atomic.Pointer[string]
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token.Store(new(r.Header.Get("X-Nomad-Token")))
		w.Header().Set("Connection", "close") // so that each request needs a handshake
		http.Error(w, "Permission denied", http.StatusForbidden)
	}))
	server.Listener = listener
	server.Start()
	t.Cleanup(server.Close)
	return &token
}

// listError returns the error of a list of the sandboxes.
func listError(t *testing.T, parts nomadParts) error {
	t.Helper()
	for _, err := range parts.driver.List(t.Context()) {
		return err
	}
	return nil
}

func configured(t *testing.T, nomad config.Nomad) nomadParts {
	t.Helper()
	c := config.Default()
	c.JobTemplate, c.Nomad = "raw_exec", nomad
	parts, err := newNomad(c, nil, hclog.NewNullLogger())
	must.NoError(t, err)
	return parts
}

func TestNomad(t *testing.T) {
	t.Run("is reached through a unix socket, with the token that is in the file", func(t *testing.T) {
		dir := t.TempDir()
		socket, file := filepath.Join(dir, "api.sock"), filepath.Join(dir, "token")
		listener, err := net.Listen("unix", socket)
		must.NoError(t, err)
		token := deniedBy(t, listener)
		must.NoError(t, os.WriteFile(file, []byte("first\n"), 0o600))
		parts := configured(t, config.Nomad{Address: "unix://" + socket, TokenFile: file})
		must.ErrorIs(t, listError(t, parts), runtime.ErrPermission)
		must.Eq(t, "first", *token.Load())

		// A new token is used when Nomad denies the old one. The file is read again for that
		// at most once a second.
		must.NoError(t, os.WriteFile(file, []byte("second\n"), 0o600))
		must.Wait(t, wait.InitialSuccess(wait.BoolFunc(func() bool {
			return errors.Is(listError(t, parts), runtime.ErrPermission) && *token.Load() == "second"
		})))
	})

	t.Run("is reached with the TLS files that are current", func(t *testing.T) {
		theirs, mine := t.TempDir(), t.TempDir()
		ca, next := certs.NewCA(t), certs.NewCA(t)
		own := func(dir string, trusted, issuer *certs.CA, names ...string) credentials.Files {
			caFile, certFile, keyFile := certs.Write(t, dir, trusted, issuer.Issue(t, names...))
			return credentials.Files{CA: caFile, Certificate: certFile, Key: keyFile}
		}
		server, err := credentials.LoadTLS(own(theirs, ca, ca, "server.global.nomad"))
		must.NoError(t, err)
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		must.NoError(t, err)
		deniedBy(t, tls.NewListener(listener, server.Server(tls.VersionTLS12, tls.RequireAndVerifyClientCert)))
		files := own(mine, ca, ca, "bivouac")
		parts := configured(t, config.Nomad{
			Address: "https://" + listener.Addr().String(), TLSServerName: "server.global.nomad",
			CAFile: files.CA, CertFile: files.Certificate, KeyFile: files.Key,
		})
		must.ErrorIs(t, listError(t, parts), runtime.ErrPermission)

		// The server gets another CA.
		own(theirs, next, next, "server.global.nomad")
		_, err = server.Reload()
		must.NoError(t, err)
		err = listError(t, parts)
		must.ErrorIs(t, err, runtime.ErrUnavailable)
		must.ErrorContains(t, err, "unknown authority")

		// With new files it is reached again.
		own(mine, &certs.CA{PEM: slices.Concat(ca.PEM, next.PEM)}, next, "bivouac")
		_, err = parts.credentials["nomad_tls"].Reload()
		must.NoError(t, err)
		must.ErrorIs(t, listError(t, parts), runtime.ErrPermission)
	})

	t.Run("files that cannot be used are refused at the start", func(t *testing.T) {
		for name, nomad := range map[string]config.Nomad{
			"token": {TokenFile: "/no/token"},
			"CA":    {Address: "https://127.0.0.1:1", CAFile: "/no/ca.pem"},

			"CA of the node helpers": {HelperCAFile: "/no/ca.pem"},
		} {
			t.Run(name, func(t *testing.T) {
				c := config.Default()
				c.Nomad = nomad
				_, err := newNomad(c, nil, hclog.NewNullLogger())
				must.ErrorIs(t, err, os.ErrNotExist)
			})
		}
	})

	t.Run("node helpers are reached with the certificate for them, and by their name", func(t *testing.T) {
		ca, dir := certs.NewCA(t), t.TempDir()
		helper := func(name string) (address string) {
			caFile, certFile, keyFile := certs.Write(t, t.TempDir(), ca, ca.Issue(t, name))
			files, err := credentials.LoadTLS(credentials.Files{CA: caFile, Certificate: certFile, Key: keyFile})
			must.NoError(t, err)
			server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				must.Eq(t, []string{nodeapi.ClientName}, r.TLS.PeerCertificates[0].DNSNames)
				w.WriteHeader(http.StatusNoContent)
			}))
			server.Listener = tls.NewListener(server.Listener, files.Server(tls.VersionTLS12, tls.RequireAndVerifyClientCert))
			server.Config.ErrorLog = hclog.NewNullLogger().StandardLogger(nil)
			server.Start()
			t.Cleanup(server.Close)
			return server.Listener.Addr().String()
		}
		c := config.Default()
		c.Nomad.HelperCAFile, c.Nomad.HelperCertFile, c.Nomad.HelperKeyFile = certs.Write(t, dir, ca, ca.Issue(t, nodeapi.ClientName))
		parts, err := newNomad(c, nil, hclog.NewNullLogger())
		must.NoError(t, err)
		must.MapContainsKey(t, parts.credentials, "helper_tls")
		info, err := parts.driver.Info(t.Context())
		must.NoError(t, err)
		must.NotEq(t, "", info.Variant)

		helpers, err := parts.connectHelpers(c)
		must.NoError(t, err)
		must.NoError(t, helpers.Look(t.Context(), helper(nodeapi.ServerName), nodeapi.Order{}))
		err = helpers.Look(t.Context(), helper("other.node"), nodeapi.Order{})
		must.ErrorIs(t, err, runtime.ErrUnavailable)
		must.ErrorContains(t, err, "not node.bivouac")
	})

	t.Run("a pool needs node helpers, and a template that can make spares", func(t *testing.T) {
		old := filepath.Join(t.TempDir(), "old.hcl")
		text, err := os.ReadFile("../../jobs/templates/docker.hcl")
		must.NoError(t, err)
		before := strings.Replace(string(text), "session.spare ? null : session.volume_host_path", "session.volume_host_path", 1)
		must.NoError(t, os.WriteFile(old, []byte(before), 0o600))
		for _, test := range []struct{ template, runtime, want string }{
			{"docker", nomadName, "pool.small: spares of nomad need node helpers (bivouac node): set helper_ca_file"},
			{old, nomadName, "Write session.spare ? WHAT_A_SPARE_HAS : WHAT_IS_HERE_NOW"},
			{old, "other", ""},
		} {
			c := config.Default()
			c.JobTemplate, c.Pools = test.template, []scheduler.Pool{{Name: "small", Runtime: test.runtime, Size: 1}}
			_, err := newNomad(c, nil, hclog.NewNullLogger())
			if test.want == "" {
				must.NoError(t, err)
			} else {
				must.ErrorContains(t, err, test.want)
			}
		}
	})

	t.Run("TLS without https is refused", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "a.hcl")
		must.NoError(t, os.WriteFile(file, []byte("nomad {\n address = \"http://127.0.0.1:1\"\n ca_file = \"/etc/ca.pem\"\n}\n"), 0o600))
		c := config.Default()
		must.NoError(t, c.Read(file))
		_, err := newNomad(c, nil, hclog.NewNullLogger())
		must.ErrorContains(t, err, "TLS needs an address that begins with https://")
	})
}
