package api

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"path"
	"slices"
	"strings"

	"github.com/bivouac/bivouac/internal/api/wire"
)

var (
	errUnknownPath      = &apiError{status: http.StatusNotFound, code: wire.CodeUnknownPath, message: "the API has no such path; see /v1/openapi.json"}
	errMethodNotAllowed = &apiError{status: http.StatusMethodNotAllowed, code: wire.CodeMethodNotAllowed, message: "the path does not support this method; see the Allow header"}
	errForbiddenOrigin  = &apiError{status: http.StatusForbidden, code: wire.CodeForbiddenOrigin, message: "a web page of another origin must not change anything"}
)

// admit refuses requests that must not reach a handler. A web page in a browser could
// otherwise call the API without its user's intent: from its own origin, or under its own
// host name after DNS rebinding.
func (a *API) admit(r *http.Request) error {
	if !a.isOwnHost(r) {
		return &apiError{status: http.StatusForbidden, code: wire.CodeForbiddenHost, message: fmt.Sprintf(
			"the Host header %q is not a name of this server; use localhost, or add the name to host_names in its configuration", clip(r.Host, 200))}
	}
	if err := a.csrf.Check(r); err != nil {
		return errForbiddenOrigin
	}
	if p := r.URL.EscapedPath(); !strings.HasPrefix(p, "/") || path.Clean(p) != p && p != uiPath {
		return errUnknownPath // the mux would answer without JSON
	}
	return nil
}

// isOwnHost reports whether the Host header cannot be the name of somebody else's web
// page. An empty one comes from HTTP/1.0, which no browser uses, and no browser connects to
// a unix socket.
func (a *API) isOwnHost(r *http.Request) bool {
	local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if r.Host == "" || (local != nil && local.Network() == "unix") {
		return true
	}
	if a.config.Authenticate != nil && hasCredential(r.Header) { // no web page knows one
		return true
	}
	host := r.Host
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.ToLower(strings.TrimSuffix(strings.Trim(host, "[]"), "."))
	if addr, err := netip.ParseAddr(host); err == nil {
		// With authentication, checks may use any address of the machine. No web page is
		// at such an address, except one of that machine.
		return addr.Unmap().IsLoopback() || a.config.Authenticate != nil || slices.Contains(a.config.Hosts, host)
	}
	return host == "localhost" || slices.Contains(a.config.Hosts, host)
}

func hasCredential(header http.Header) bool {
	return header.Get(wire.HeaderToken) != "" || header.Get("Authorization") != ""
}
