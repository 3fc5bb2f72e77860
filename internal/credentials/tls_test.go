package credentials_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/test/certs"
)

// load writes the files of a side, and loads them.
func load(t *testing.T, ca *certs.CA, pair certs.Pair) (*credentials.TLS, string) {
	t.Helper()
	dir := t.TempDir()
	caFile, certFile, keyFile := certs.Write(t, dir, ca, pair)
	loaded, err := credentials.LoadTLS(credentials.Files{CA: caFile, Certificate: certFile, Key: keyFile})
	must.NoError(t, err)
	return loaded, dir
}

// serve returns the address of a server that answers with the common name of its caller's
// certificate, and with the protocol.
func serve(t *testing.T, config *tls.Config) string {
	t.Helper()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller := "nobody"
		if len(r.TLS.VerifiedChains) > 0 {
			caller = r.TLS.PeerCertificates[0].Subject.CommonName
		}
		_, _ = io.WriteString(w, caller+" by "+r.Proto)
	}))
	server.Config.ErrorLog = nil
	server.Listener = tls.NewListener(server.Listener, config)
	server.Start()
	t.Cleanup(server.Close)
	return server.Listener.Addr().String()
}

// client returns a client that makes a new connection for each request.
func client(dial func(ctx context.Context, network, addr string) (net.Conn, error)) *http.Client {
	return &http.Client{Transport: &http.Transport{DialTLSContext: dial, DisableKeepAlives: true}}
}

func get(t *testing.T, client *http.Client, url string) (string, error) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	must.NoError(t, err)
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	body, err := io.ReadAll(response.Body)
	must.NoError(t, err)
	must.NoError(t, response.Body.Close())
	return string(body), nil
}

func TestBothSidesOfAConnection(t *testing.T) {
	ca, other := certs.NewCA(t), certs.NewCA(t)
	server, _ := load(t, ca, ca.Issue(t, "bivouac.test", "127.0.0.1"))
	addr := serve(t, server.Server(tls.VersionTLS12, tls.VerifyClientCertIfGiven))
	known, _ := load(t, ca, ca.Issue(t, "caller"))
	foreign, _ := load(t, ca, other.Issue(t, "stranger"))
	distrustful, _ := load(t, other, ca.Issue(t, "caller"))
	caFile, _, _ := certs.Write(t, t.TempDir(), ca, certs.Pair{})
	silent, err := credentials.LoadTLS(credentials.Files{CA: caFile})
	must.NoError(t, err)
	system, err := credentials.LoadTLS(credentials.Files{})
	must.NoError(t, err)

	for _, test := range []struct {
		name   string
		client *credentials.TLS
		server string // its name, as the client expects it
		want   string
		err    string
	}{
		{"the certificate of a caller is verified", known, "", "caller by HTTP/1.1", ""},
		{"a caller needs no certificate", silent, "", "nobody by HTTP/1.1", ""},
		{"a certificate of another CA is refused", foreign, "", "", "tls: "},
		{"the server's certificate must have the host that is dialled", silent, "", "nobody by HTTP/1.1", ""},
		{"or the name that is configured", silent, "bivouac.test", "nobody by HTTP/1.1", ""},
		{"and no other", silent, "other.test", "", "certificate is valid for bivouac.test, not other.test"},
		{"the server's certificate must be of a CA that the client trusts", distrustful, "", "", "unknown authority"},
		{"without a CA file those of the system are trusted", system, "", "", "unknown authority"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := get(t, client(test.client.Dial(test.server)), "https://"+addr)
			must.Eq(t, test.want, got)
			if test.err == "" {
				must.NoError(t, err)
			} else {
				must.ErrorContains(t, err, test.err)
			}
		})
	}
}

func TestServerWithoutACAAcceptsNoCertificate(t *testing.T) {
	ca := certs.NewCA(t)
	_, certFile, keyFile := certs.Write(t, t.TempDir(), ca, ca.Issue(t, "127.0.0.1"))
	server, err := credentials.LoadTLS(credentials.Files{Certificate: certFile, Key: keyFile})
	must.NoError(t, err)
	addr := serve(t, server.Server(tls.VersionTLS12, tls.VerifyClientCertIfGiven))
	caller, _ := load(t, ca, ca.Issue(t, "caller"))
	_, err = get(t, client(caller.Dial("")), "https://"+addr)
	must.ErrorContains(t, err, "tls: ")
}

func TestMinimumVersion(t *testing.T) {
	ca := certs.NewCA(t)
	server, _ := load(t, ca, ca.Issue(t, "127.0.0.1"))
	addr := serve(t, server.Server(tls.VersionTLS13, tls.NoClientCert))
	config := server.Client("127.0.0.1")
	config.MaxVersion = tls.VersionTLS12
	dialer := tls.Dialer{Config: config}
	_, err := dialer.DialContext(t.Context(), "tcp", addr)
	must.ErrorContains(t, err, "protocol version not supported")
}

func TestReload(t *testing.T) {
	ca := certs.NewCA(t)

	t.Run("new certificates and CAs need no new client and no new server", func(t *testing.T) {
		server, serverDir := load(t, ca, ca.Issue(t, "127.0.0.1"))
		caller, callerDir := load(t, ca, ca.Issue(t, "before"))
		addr := serve(t, server.Server(tls.VersionTLS12, tls.RequireAndVerifyClientCert))
		client := client(caller.Dial(""))
		got, err := get(t, client, "https://"+addr)
		must.NoError(t, err)
		must.Eq(t, "before by HTTP/1.1", got)

		next := certs.NewCA(t)
		certs.Write(t, serverDir, next, next.Issue(t, "127.0.0.1"))
		changed, err := server.Reload()
		must.NoError(t, err)
		must.True(t, changed)
		_, err = get(t, client, "https://"+addr)
		must.ErrorContains(t, err, "unknown authority")

		certs.Write(t, callerDir, next, next.Issue(t, "after"))
		changed, err = caller.Reload()
		must.NoError(t, err)
		must.True(t, changed)
		got, err = get(t, client, "https://"+addr)
		must.NoError(t, err)
		must.Eq(t, "after by HTTP/1.1", got)
	})

	t.Run("a client of a CA that is no longer trusted cannot resume its session", func(t *testing.T) {
		server, serverDir := load(t, ca, ca.Issue(t, "127.0.0.1"))
		addr := serve(t, server.Server(tls.VersionTLS12, tls.RequireAndVerifyClientCert))
		caller, _ := load(t, ca, ca.Issue(t, "caller"))
		config := caller.Client("127.0.0.1")
		config.ClientSessionCache = tls.NewLRUClientSessionCache(1)
		resumed := false
		config.VerifyConnection = func(state tls.ConnectionState) error { resumed = state.DidResume; return nil }
		client := client((&tls.Dialer{Config: config}).DialContext)
		for range 2 {
			_, err := get(t, client, "https://"+addr)
			must.NoError(t, err)
		}
		must.True(t, resumed)

		next := certs.NewCA(t)
		must.NoError(t, os.WriteFile(filepath.Join(serverDir, "ca.pem"), next.PEM, 0o600))
		_, err := server.Reload()
		must.NoError(t, err)
		_, err = get(t, client, "https://"+addr)
		must.ErrorContains(t, err, "tls: ")
	})

	t.Run("the same files are no change", func(t *testing.T) {
		server, _ := load(t, ca, ca.Issue(t, "127.0.0.1"))
		changed, err := server.Reload()
		must.NoError(t, err)
		must.False(t, changed)
	})

	t.Run("a file that is being written is not used", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			loaded, dir := load(t, ca, ca.Issue(t, "127.0.0.1"))
			next := ca.With(certs.NewCA(t))
			write := func(text []byte) {
				must.NoError(t, os.WriteFile(filepath.Join(dir, "ca.pem"), text, 0o600))
			}
			write(certs.NewCA(t).PEM) // a whole certificate, but not all of them
			result := make(chan error, 1)
			go func() {
				_, err := loaded.Reload()
				result <- err
			}()
			synctest.Wait()
			write(next.PEM)
			must.ErrorContains(t, <-result, "are being written")
			changed, err := loaded.Reload()
			must.NoError(t, err)
			must.True(t, changed)
		})
	})

	t.Run("files that cannot be used leave what there was", func(t *testing.T) {
		first, second := ca.Issue(t, "first", "127.0.0.1"), ca.Issue(t, "second", "127.0.0.1")
		for name, files := range map[string]map[string][]byte{
			"another key":              {"key.pem": second.Key},
			"another certificate":      {"cert.pem": second.Certificate},
			"half a key":               {"key.pem": first.Key[:len(first.Key)/2]},
			"half a certificate":       {"cert.pem": first.Certificate[:len(first.Certificate)/2]},
			"half an intermediate":     {"cert.pem": append(bytes.Clone(first.Certificate), ca.PEM[:len(ca.PEM)/2]...)},
			"an empty key":             {"key.pem": nil},
			"an empty CA file":         {"ca.pem": nil},
			"half of the second CA":    {"ca.pem": append(bytes.Clone(ca.PEM), certs.NewCA(t).PEM[:200]...)},
			"no PEM":                   {"ca.pem": []byte("nothing")},
			"PEM without certificates": {"ca.pem": first.Key},
			"a file without end":       {"ca.pem": bytes.Repeat([]byte("x"), 1<<20+1)},
		} {
			t.Run(name, func(t *testing.T) {
				loaded, dir := load(t, ca, first)
				addr := serve(t, loaded.Server(tls.VersionTLS12, tls.RequireAndVerifyClientCert))
				for file, text := range files {
					must.NoError(t, os.WriteFile(filepath.Join(dir, file), text, 0o600))
					changed, err := loaded.Reload()
					must.ErrorContains(t, err, filepath.Join(dir, file))
					must.StrNotContains(t, err.Error(), string(first.Key[40:60]))
					must.False(t, changed)
				}
				got, err := get(t, client(loaded.Dial("")), "https://"+addr)
				must.NoError(t, err)
				must.Eq(t, "first by HTTP/1.1", got)
			})
		}
	})
}

func TestLoad(t *testing.T) {
	ca := certs.NewCA(t)
	caFile, certFile, keyFile := certs.Write(t, t.TempDir(), ca, ca.Issue(t, "a"))
	for name, test := range map[string]struct {
		files credentials.Files
		err   string
	}{
		"a certificate needs a key":            {credentials.Files{Certificate: certFile}, "a certificate needs a key"},
		"a key needs a certificate":            {credentials.Files{Key: keyFile}, "a key needs a certificate"},
		"a file that is missing is named":      {credentials.Files{CA: "/no/ca.pem"}, "/no/ca.pem: no such file"},
		"a file that cannot be used is named":  {credentials.Files{CA: keyFile}, keyFile + ": it contains no certificate in PEM"},
		"both files of a wrong pair are named": {credentials.Files{Certificate: caFile, Key: keyFile}, "certificate file " + caFile + " and key file " + keyFile + ": tls: private key does not match public key"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := credentials.LoadTLS(test.files)
			must.ErrorContains(t, err, test.err)
		})
	}
}

func TestExpires(t *testing.T) {
	ca := certs.NewCA(t)
	pair := ca.Issue(t, "a")
	notAfter := func(text []byte) time.Time {
		block, _ := pem.Decode(text)
		certificate, err := x509.ParseCertificate(block.Bytes)
		must.NoError(t, err)
		return certificate.NotAfter
	}
	loaded, dir := load(t, ca, pair)
	must.Eq(t, notAfter(pair.Certificate), loaded.Expires())

	// given a chain whose second certificate expires first
	certs.Write(t, dir, ca, certs.Pair{Certificate: append(bytes.Clone(pair.Certificate), ca.PEM...), Key: pair.Key})
	_, err := loaded.Reload()
	must.NoError(t, err)
	must.Eq(t, notAfter(ca.PEM), loaded.Expires())

	none, err := credentials.LoadTLS(credentials.Files{})
	must.NoError(t, err)
	must.True(t, none.Expires().IsZero())
}
