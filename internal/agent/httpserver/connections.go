package httpserver

import (
	"container/list"
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
)

// connections bounds the connections of a server. Its method changed is the
// server's ConnState, and its method context the server's ConnContext.
//
// A connection without a request costs its owner nothing, and so does one with a request
// that is never finished. So all connections make room for others, the oldest first,
// except while they have a request for which [Keep] was called. Only if all of them have
// one is a new one refused.
type connections struct {
	most int // 0: any number

	mu      sync.Mutex
	open    map[net.Conn]*list.Element // nil while it is kept
	waiting *list.List                 // of net.Conn, not kept, the oldest first
}

type keepKey struct{}

// Keep keeps the connection of a request until the request ends: it no longer makes room
// for others. ctx is the request's context. Call it once the caller is known, because
// strangers could otherwise occupy all connections.
func Keep(ctx context.Context) {
	if keep, ok := ctx.Value(keepKey{}).(func()); ok {
		keep()
	}
}

func (c *connections) context(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, keepKey{}, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if element := c.open[conn]; element != nil {
			c.waiting.Remove(element)
			c.open[conn] = nil
		}
	})
}

func newConnections(most int) *connections {
	return &connections{most: most, open: make(map[net.Conn]*list.Element), waiting: list.New()}
}

func (c *connections) changed(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch state {
	case http.StateNew, http.StateIdle:
		c.forget(conn)
		c.open[conn] = c.waiting.PushBack(conn)
	case http.StateActive:
	case http.StateClosed, http.StateHijacked:
		c.forget(conn)
	}
	for c.most > 0 && len(c.open) > c.most && c.waiting.Len() > 0 {
		oldest, _ := c.waiting.Front().Value.(net.Conn)
		c.forget(oldest)
		if secure, ok := oldest.(*tls.Conn); ok {
			oldest = secure.NetConn() // to close a tls.Conn may block, because it writes
		}
		_ = oldest.Close() // its owner sees it, and there is nothing else to do about it
	}
}

// forget drops a connection. A closed one that comes again, as closed, is as
// unknown as one that never was.
func (c *connections) forget(conn net.Conn) {
	if element := c.open[conn]; element != nil {
		c.waiting.Remove(element)
	}
	delete(c.open, conn)
}
