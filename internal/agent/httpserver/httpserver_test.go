package httpserver_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/agent/httpserver"
)

func TestConnectionsAreBounded(t *testing.T) {
	// Given as many connections as there may be: one with a known caller's request in
	// progress, one with a stranger's, and the others idle.
	inside, release := make(chan struct{}), make(chan struct{})
	handler := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/slow":
			httpserver.Keep(r.Context())
			inside <- struct{}{}
			<-release
		case "/stranger":
			inside <- struct{}{}
			<-r.Context().Done()
		}
	})
	server := httpserver.New(handler, 4, hclog.NewNullLogger())
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must.NoError(t, err)
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listener) })
	t.Cleanup(func() {
		must.NoError(t, server.Close())
		serving.Wait()
	})
	dial := func() net.Conn {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", listener.Addr().String())
		must.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	ask := func(conn net.Conn, path string) {
		_, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n", path)
		must.NoError(t, err)
	}
	isAnswered := func(conn net.Conn) {
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		must.NoError(t, err)
		must.NoError(t, res.Body.Close())
		must.Eq(t, http.StatusOK, res.StatusCode)
	}
	busy := dial()
	ask(busy, "/slow")
	<-inside
	stranger := dial()
	ask(stranger, "/stranger")
	<-inside
	oldest := dial()
	dial()

	// When more come, then they are served, and the oldest are closed that are not kept.
	for range 3 {
		conn := dial()
		ask(conn, "/")
		isAnswered(conn)
	}
	for _, closed := range []net.Conn{stranger, oldest} {
		_, err = closed.Read(make([]byte, 1))
		must.ErrorIs(t, err, io.EOF)
	}
	close(release)
	isAnswered(busy)
}
