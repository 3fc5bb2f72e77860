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
	"sync/atomic"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/test/certs"
	"github.com/bivouac/bivouac/runtime"
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
		} {
			t.Run(name, func(t *testing.T) {
				c := config.Default()
				c.Nomad = nomad
				_, err := newNomad(c, nil, hclog.NewNullLogger())
				must.ErrorIs(t, err, os.ErrNotExist)
			})
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
