// Package faultproxy is an HTTP proxy between a replica and a server, such as a Consul
// or Nomad agent. A test or a benchmark sees each request, and decides whether it
// reaches the server and whether its answer comes back.
//
//	p, err := faultproxy.Start("127.0.0.1:0", handle, server)
//
// Faults that depend on what a request means are up to the caller: the package does not
// know the servers' APIs.
package faultproxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"
	"time"
)

// Handler decides what becomes of a request. server passes it on. See [Body] for the
// request's body.
type Handler func(w http.ResponseWriter, r *http.Request, server http.Handler)

// Proxy is a running proxy. Make one with [Start].
type Proxy struct {
	addr    string
	server  *http.Server
	toBack  *http.Transport
	serving sync.WaitGroup
}

// Start starts a proxy that listens on addr and passes requests to the first of servers
// that accepts a connection. addr and servers are "IP:PORT". handle gets all requests.
func Start(addr string, handle Handler, servers ...string) (*Proxy, error) {
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	p := &Proxy{addr: listener.Addr().String(), toBack: &http.Transport{MaxIdleConnsPerHost: 100, DialContext: dialFirst(servers)}}
	forward := &httputil.ReverseProxy{
		// The host is a placeholder: the transport chooses the server.
		Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: servers[0]}) },
		Transport:     p.toBack,
		FlushInterval: -1, // at once, for event streams
		ErrorHandler:  func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	p.server = &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handle(w, r, forward)
	})}
	p.serving.Go(func() { _ = p.server.Serve(listener) }) // it serves until Close
	return p, nil
}

// dialFirst connects to the first of servers that accepts a connection.
func dialFirst(servers []string) func(context.Context, string, string) (net.Conn, error) {
	dialer := &net.Dialer{Timeout: 2 * time.Second}
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		var refused []error
		for _, server := range servers {
			conn, err := dialer.DialContext(ctx, network, server)
			if err == nil {
				return conn, nil
			}
			refused = append(refused, err)
		}
		return nil, errors.Join(refused...)
	}
}

// Addr returns the proxy's address, "IP:PORT".
func (p *Proxy) Addr() string { return p.addr }

// Close cuts all connections. It does not wait for handlers that still run.
func (p *Proxy) Close() {
	_ = p.server.Close()
	p.serving.Wait()
	p.toBack.CloseIdleConnections()
}

// Body returns the request's body, which can still be passed on.
func Body(r *http.Request) []byte {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler) // the sender has given up
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	return body
}

// Pass is a [Handler] that passes the request on.
func Pass(w http.ResponseWriter, r *http.Request, server http.Handler) { server.ServeHTTP(w, r) }

// Drop is a [Handler] that cuts the connection before the server has the request.
func Drop(http.ResponseWriter, *http.Request, http.Handler) { panic(http.ErrAbortHandler) }

// LoseReply is a [Handler] that passes the request on and then cuts the connection
// instead of answering.
func LoseReply(_ http.ResponseWriter, r *http.Request, server http.Handler) {
	server.ServeHTTP(&Discard{}, r)
	panic(http.ErrAbortHandler)
}

// Discard takes an answer that nobody gets.
type Discard struct{ header http.Header }

// Header implements [http.ResponseWriter].
func (d *Discard) Header() http.Header {
	if d.header == nil {
		d.header = make(http.Header)
	}
	return d.header
}

// Write implements [http.ResponseWriter].
func (d *Discard) Write(text []byte) (int, error) { return len(text), nil }

// WriteHeader implements [http.ResponseWriter].
func (d *Discard) WriteHeader(int) {}
