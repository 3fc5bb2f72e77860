package faultproxy_test

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/faultproxy"
)

// echo is a server that answers with the request's body. got has the bodies that
// reached it.
func echo(t *testing.T) (addr string, got chan string) {
	got = make(chan string, 10)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		must.NoError(t, err)
		got <- string(body)
		_, err = w.Write(body)
		must.NoError(t, err)
	}))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://"), got
}

func send(t *testing.T, handle faultproxy.Handler, servers ...string) (string, error) {
	p, err := faultproxy.Start("127.0.0.1:0", handle, servers...)
	must.NoError(t, err)
	defer p.Close()
	res, err := http.Post("http://"+p.Addr(), "text/plain", strings.NewReader("hello"))
	if err != nil {
		return "", err
	}
	defer func() { must.NoError(t, res.Body.Close()) }()
	body, err := io.ReadAll(res.Body)
	must.NoError(t, err)
	return string(body), nil
}

func TestProxy(t *testing.T) {
	server, got := echo(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must.NoError(t, err)
	must.NoError(t, listener.Close())
	dead := listener.Addr().String()

	t.Run("passes requests on", func(t *testing.T) {
		answer, err := send(t, faultproxy.Pass, server)
		must.NoError(t, err)
		must.Eq(t, "hello", answer)
		must.Eq(t, "hello", <-got)
	})
	t.Run("uses the first server that accepts a connection", func(t *testing.T) {
		answer, err := send(t, faultproxy.Pass, dead, server)
		must.NoError(t, err)
		must.Eq(t, "hello", answer)
		must.Eq(t, "hello", <-got)
	})
	t.Run("cuts the connection if no server accepts one", func(t *testing.T) {
		_, err := send(t, faultproxy.Pass, dead)
		must.ErrorIs(t, err, io.EOF)
	})
	t.Run("shows the handler the body and passes it on", func(t *testing.T) {
		var seen string
		answer, err := send(t, func(w http.ResponseWriter, r *http.Request, server http.Handler) {
			seen = string(faultproxy.Body(r))
			server.ServeHTTP(w, r)
		}, server)
		must.NoError(t, err)
		must.Eq(t, "hello", seen)
		must.Eq(t, "hello", answer)
		must.Eq(t, "hello", <-got)
	})
	t.Run("drops a request before the server has it", func(t *testing.T) {
		_, err := send(t, faultproxy.Drop, server)
		must.ErrorIs(t, err, io.EOF)
		must.Eq(t, 0, len(got))
	})
	t.Run("loses a reply after the server has the request", func(t *testing.T) {
		_, err := send(t, faultproxy.LoseReply, server)
		must.ErrorIs(t, err, io.EOF)
		must.Eq(t, "hello", <-got)
	})
}
