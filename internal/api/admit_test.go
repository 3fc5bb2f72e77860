package api_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
)

func TestHosts(t *testing.T) {
	const token = "reader"
	for name, test := range map[string]struct {
		authenticates bool
		token         string
		local         net.Addr
		served        []string
		refused       []string
	}{
		"loopback and the configured names are served": {
			local: &net.TCPAddr{},
			served: []string{
				"localhost", "localhost:4747", "LOCALHOST:1", "localhost.:80", "bivouac.example", "Bivouac.Example.:4747",
				"127.0.0.1", "127.0.0.1:4747", "127.8.8.8:1", "[::1]", "[::1]:4747", "[::ffff:127.0.0.1]:1",
			},
			refused: []string{
				"evil.example", "evil.example:4747", "localhost.evil.example", "127.0.0.1.evil.example", "xbivouac.example",
				"10.0.0.1:4747", "0.0.0.0:4747", "[::]:4747", "[fe80::1]:4747",
			},
		},
		"with authentication every address of the machine is served, too": {
			authenticates: true,
			served:        []string{"localhost", "bivouac.example", "127.0.0.1", "10.0.0.1:4747", "[fe80::1]:4747"},
			refused:       []string{"evil.example", "10.0.0.1.evil.example"},
		},
		"with a token every name is served": {
			authenticates: true, token: token,
			served: []string{"localhost", "10.0.0.1:4747", "anything.example"},
		},
		"without authentication a token changes nothing": {
			token:   token,
			refused: []string{"evil.example", "10.0.0.1:4747"},
		},
		"on a unix socket every name is served": {
			local:  &net.UnixAddr{Name: "/run/bivouac/api.sock", Net: "unix"},
			served: []string{"localhost", "anything.example", "10.0.0.1"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			config := testConfig(&fake{}, io.Discard)
			config.Hosts = []string{"bivouac.example"}
			if test.authenticates {
				authenticates(&config)
			}
			handler := api.New(config)
			try := func(host string) int {
				ctx := context.WithValue(t.Context(), http.LocalAddrContextKey, test.local)
				r := httptest.NewRequestWithContext(ctx, http.MethodGet, health.path, http.NoBody)
				r.Host = host
				if test.token != "" {
					r.Header.Set(wire.HeaderToken, test.token)
				}
				w := httptest.NewRecorder()
				handler.ServeHTTP(w, r)
				return w.Code
			}
			for _, host := range test.served {
				must.Eq(t, 200, try(host), must.Sprint(host))
			}
			for _, host := range test.refused {
				must.Eq(t, 403, try(host), must.Sprint(host))
			}
		})
	}
}

func TestRefusedHostNamesTheKeyToSet(t *testing.T) {
	r := get
	r.host = "bivouac.test:4747"
	status, refusal := start(t, &fake{}).refused(r)
	must.Eq(t, 403, status)
	must.Eq(t, wire.CodeForbiddenHost, refusal.Code)
	must.Eq(t, `the Host header "bivouac.test:4747" is not a name of this server; use localhost, or add the name to host_names in its configuration`, refusal.Message)
}

func TestClientCertificates(t *testing.T) {
	f := &fake{}
	handler := api.New(func() api.Config {
		c := testConfig(f, io.Discard)
		c.ClientCertificates = true
		return c
	}())
	try := func(r request, state *tls.ConnectionState) (int, string) {
		in := httptest.NewRequestWithContext(t.Context(), r.method, "http://localhost"+r.path, http.NoBody)
		in.TLS = state
		out := httptest.NewRecorder()
		handler.ServeHTTP(out, in)
		return out.Code, out.Body.String()
	}
	verified := &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{{}}}}
	unknown := &tls.ConnectionState{PeerCertificates: []*x509.Certificate{{}}}
	for _, r := range []request{get, create, remove, list, cleanup, self, metrics, {method: "GET", path: "/v1/nothing"}} {
		for _, state := range []*tls.ConnectionState{{}, unknown} {
			status, body := try(r, state)
			must.Eq(t, 403, status)
			must.StrContains(t, body, string(wire.CodeClientCertificateRequired))
		}
	}
	must.Eq(t, 0, f.calls)
	for _, r := range []request{live, health, openAPI} {
		status, _ := try(r, &tls.ConnectionState{})
		must.Eq(t, 200, status)
	}
	status, _ := try(get, verified)
	must.Eq(t, 200, status)
	status, _ = try(get, nil) // on a unix socket
	must.Eq(t, 200, status)
}

// TestAmbiguousRequests sends what programs understand in different ways. A proxy and the
// server could otherwise see different requests.
func TestAmbiguousRequests(t *testing.T) {
	f := &fake{}
	address := strings.TrimPrefix(start(t, f).url, "http://")
	const chunked = "1\r\n{\r\n0\r\n\r\n"
	for name, test := range map[string]struct {
		request string
		status  int
	}{
		"two lengths":                  {"PUT /v1/sessions/1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}}", 400},
		"a list of lengths":            {"PUT /v1/sessions/1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2, 3\r\n\r\n{}}", 400},
		"a signed length":              {"PUT /v1/sessions/1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: +2\r\n\r\n{}", 400},
		"an unknown encoding":          {"PUT /v1/sessions/1 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n" + chunked, 501},
		"two encodings":                {"PUT /v1/sessions/1 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + chunked, 501},
		"a list of encodings":          {"PUT /v1/sessions/1 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n" + chunked, 501},
		"a wrong size of a chunk":      {"PUT /v1/sessions/1 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\n{\r\n0\r\n\r\n", 400},
		"a chunk that ends with LF":    {"PUT /v1/sessions/1 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\n{\r\n0\r\n\r\n", 400},
		"a space before the colon":     {"GET /v1/agent/health HTTP/1.1\r\nHost: localhost\r\nX-Bivouac-Token : a\r\n\r\n", 400},
		"a folded first header":        {"GET /v1/agent/health HTTP/1.1\r\n Host: localhost\r\n\r\n", 400},
		"a folded host":                {"GET /v1/agent/health HTTP/1.1\r\nHost: localhost\r\n evil.example\r\n\r\n", 400},
		"two hosts":                    {"GET /v1/agent/health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400},
		"no host":                      {"GET /v1/agent/health HTTP/1.1\r\n\r\n", 400},
		"a host that is none":          {"GET /v1/agent/health HTTP/1.1\r\nHost: local host\r\n\r\n", 400},
		"a host with a user":           {"GET /v1/agent/health HTTP/1.1\r\nHost: localhost@evil.example\r\n\r\n", 400},
		"another host in the target":   {"GET http://evil.example/v1/agent/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 403},
		"a NUL in a header":            {"GET /v1/agent/health HTTP/1.1\r\nHost: localhost\r\nX-A: a\x00b\r\n\r\n", 400},
		"a CR in a header":             {"GET /v1/agent/health HTTP/1.1\r\nHost: localhost\r\nX-A: a\rHost: b\r\n\r\n", 400},
		"an encoded slash in the path": {"GET /v1%2fagent/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 404},
		"a path that leads upwards":    {"GET /v1/metrics/../agent/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 404},
		"a tunnel":                     {"CONNECT evil.example:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 403},
		"HTTP/2 without TLS":           {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", address)
			must.NoError(t, err)
			t.Cleanup(func() { _ = conn.Close() })
			_, err = fmt.Fprint(conn, test.request)
			must.NoError(t, err)
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			must.NoError(t, err)
			must.NoError(t, res.Body.Close())
			must.Eq(t, test.status, res.StatusCode)
		})
	}
	must.Eq(t, 0, f.calls)
}
