package httpserver

import (
	"container/list"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
)

// connections bounds the connections of a server. Its method changed is the
// server's ConnState.
//
// A connection without a request costs its owner nothing, so those make room for
// others, the oldest first. Only if all of them have a request under way is a new
// one refused.
type connections struct {
	most int // 0: any number

	mu      sync.Mutex
	open    map[net.Conn]*list.Element // nil while a request is under way
	waiting *list.List                 // of net.Conn, without a request, the oldest first
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
		c.forget(conn)
		c.open[conn] = nil
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
