// Package httpserver makes the HTTP server of a replica, and what it listens on. It
// bounds what slow and idle callers can hold: handshakes, headers, idle connections, and
// the number of connections.
//
// It does not bound how long an answer takes to begin, because a create or a
// blocking read takes as long as it takes. It does not know what is served.
package httpserver

import (
	"net/http"
	"time"

	"github.com/hashicorp/go-hclog"
)

const (
	headerLimit = 10 * time.Second // to read a request's headers, and before that for the TLS handshake
	idleLimit   = 2 * time.Minute
	maxHeader   = 32 << 10 // bytes
)

// New returns a server for handler, which the caller starts. It keeps at most
// maxConnections connections open, or any number if that is 0. To make room for
// another one, it closes the one that has been without a request, or with one that the
// handler did not [Keep], for longest.
func New(handler http.Handler, maxConnections int, log hclog.Logger) *http.Server {
	connections := newConnections(maxConnections)
	return &http.Server{
		Handler:           handler,
		ConnState:         connections.changed,
		ConnContext:       connections.context,
		ReadHeaderTimeout: headerLimit,
		IdleTimeout:       idleLimit,
		MaxHeaderBytes:    maxHeader,

		DisableGeneralOptionsHandler: true, // the handler answers "OPTIONS *", too

		ErrorLog: log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
	}
}
