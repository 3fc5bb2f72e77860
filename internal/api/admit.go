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
	errMethodNotAllowed = &apiError{status: http.StatusMethodNotAllowed, code: wire.CodeMethodNotAllowed, message: "the path has no such method; see the Allow header"}
	errForbiddenHost    = &apiError{status: http.StatusForbidden, code: wire.CodeForbiddenHost, message: "the Host header names no loopback address; use localhost, 127.0.0.1 or [::1]"}
	errForbiddenOrigin  = &apiError{status: http.StatusForbidden, code: wire.CodeForbiddenOrigin, message: "a web page of another origin may not change anything"}
)

// admit refuses what must not reach a handler. As long as callers need no
// token, a web page in a browser on this machine is the one caller that is not
// its user's doing: it can send requests from its own origin, and after DNS
// rebinding under a name of its own.
func (a *API) admit(r *http.Request) error {
	if !loopbackHost(r.Host) {
		return errForbiddenHost
	}
	if err := a.csrf.Check(r); err != nil {
		return errForbiddenOrigin
	}
	if p := r.URL.EscapedPath(); !strings.HasPrefix(p, "/") || path.Clean(p) != p {
		return errUnknownPath // the mux would answer it without JSON
	}
	return nil
}

// loopbackHost says whether a Host header is one that a request over loopback
// has. An empty one is HTTP/1.0's, which no browser speaks.
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
