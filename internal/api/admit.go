package api

import (
	"net"
	"net/http"
	"net/netip"
	"path"
	"strings"

	"github.com/bivouac/bivouac/internal/api/wire"
)

var (
	errUnknownPath      = &apiError{status: http.StatusNotFound, code: wire.CodeUnknownPath, message: "the API has no such path; see /v1/openapi.json"}
	errMethodNotAllowed = &apiError{status: http.StatusMethodNotAllowed, code: wire.CodeMethodNotAllowed, message: "the path does not support this method; see the Allow header"}
	errForbiddenHost    = &apiError{status: http.StatusForbidden, code: wire.CodeForbiddenHost, message: "the Host header is not a loopback address; use localhost, 127.0.0.1 or [::1]"}
	errForbiddenOrigin  = &apiError{status: http.StatusForbidden, code: wire.CodeForbiddenOrigin, message: "a web page of another origin must not change anything"}
)

// admit refuses requests that must not reach a handler. Callers need no token, so a web
// page in a browser on this machine could call the API without its user's intent: from
// its own origin, or under its own host name after DNS rebinding.
func (a *API) admit(r *http.Request) error {
	if !loopbackHost(r.Host) {
		return errForbiddenHost
	}
	if err := a.csrf.Check(r); err != nil {
		return errForbiddenOrigin
	}
	if p := r.URL.EscapedPath(); !strings.HasPrefix(p, "/") || path.Clean(p) != p {
		return errUnknownPath // the mux would answer without JSON
	}
	return nil
}

// loopbackHost reports whether a Host header is a loopback address. An empty one comes
// from HTTP/1.0, which no browser uses.
func loopbackHost(hostport string) bool {
	if hostport == "" {
		return true
	}
	host, _, err := net.SplitHostPort(hostport)
	if err != nil { // no port
		host = strings.TrimSuffix(strings.TrimPrefix(hostport, "["), "]")
	}
	if strings.EqualFold(strings.TrimSuffix(host, "."), "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback()
}
