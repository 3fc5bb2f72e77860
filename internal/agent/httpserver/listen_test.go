package httpserver_test

import (
	"context"
	"crypto/tls"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/agent/httpserver"
)

var private = httpserver.Socket{Mode: 0o600}

func listen(t *testing.T, path string, socket httpserver.Socket) net.Listener {
	t.Helper()
	all, err := httpserver.Listen(t.Context(), []string{"unix://" + path}, socket, nil)
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, httpserver.Close(all)) })
	return all[0]
}

func connects(t *testing.T, network, address string) bool {
	t.Helper()
	conn, err := new(net.Dialer).DialContext(t.Context(), network, address)
	if err != nil {
		return false
	}
	must.NoError(t, conn.Close())
	return true
}

func TestUnixSocket(t *testing.T) {
	t.Run("has the mode that is configured, and is all that is left in its folder", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "api.sock")
		listener := listen(t, path, httpserver.Socket{Mode: 0o660})
		must.Eq(t, path, listener.Addr().String())
		info, err := os.Lstat(path)
		must.NoError(t, err)
		must.Eq(t, fs.ModeSocket|0o660, info.Mode())
		entries, err := os.ReadDir(filepath.Dir(path))
		must.NoError(t, err)
		must.Len(t, 1, entries)
		must.True(t, connects(t, "unix", path))
	})
	t.Run("has the owner and group that are configured, by ID", func(t *testing.T) {
		if os.Geteuid() != 0 {
			t.Skip("only root may give a file to somebody else")
		}
		path := filepath.Join(t.TempDir(), "api.sock")
		listen(t, path, httpserver.Socket{Mode: 0o600, User: "65534", Group: "65533"})
		info, err := os.Lstat(path)
		must.NoError(t, err)
		owner := info.Sys().(*syscall.Stat_t)
		must.Eq(t, []uint32{65534, 65533}, []uint32{owner.Uid, owner.Gid})
	})
	t.Run("is not made for an owner who does not exist", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "api.sock")
		for want, socket := range map[string]httpserver.Socket{
			"unknown user no-such-user":   {Mode: 0o600, User: "no-such-user"},
			"unknown group no-such-group": {Mode: 0o600, Group: "no-such-group"},
		} {
			_, err := httpserver.Listen(t.Context(), []string{"unix://" + path}, socket, nil)
			must.ErrorContains(t, err, want)
			entries, err := os.ReadDir(filepath.Dir(path))
			must.NoError(t, err)
			must.SliceEmpty(t, entries)
		}
	})
	t.Run("is removed when it is closed", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "api.sock")
		must.NoError(t, listen(t, path, private).Close())
		_, err := os.Lstat(path)
		must.ErrorIs(t, err, fs.ErrNotExist)
	})
	t.Run("is left alone when another server has replaced it", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "api.sock")
		first := listen(t, path, private)
		must.NoError(t, os.Remove(path))
		listen(t, path, private)
		must.NoError(t, first.Close())
		must.True(t, connects(t, "unix", path))
	})
	t.Run("of a server that is gone is replaced", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "api.sock")
		gone, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
		must.NoError(t, err)
		gone.SetUnlinkOnClose(false)
		must.NoError(t, gone.Close())
		_, err = os.Lstat(path)
		must.NoError(t, err)
		listen(t, path, private)
		must.True(t, connects(t, "unix", path))
	})
	t.Run("of a server that lives is refused", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "api.sock")
		listen(t, path, private)
		_, err := httpserver.Listen(t.Context(), []string{"unix://" + path}, private, nil)
		must.ErrorIs(t, err, syscall.EADDRINUSE)
		must.True(t, connects(t, "unix", path))
	})
	t.Run("does not replace a file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "api.sock")
		must.NoError(t, os.WriteFile(path, []byte("mine"), 0o600))
		_, err := httpserver.Listen(t.Context(), []string{"unix://" + path}, private, nil)
		must.ErrorContains(t, err, path+" exists and is not a socket")
		text, err := os.ReadFile(path)
		must.NoError(t, err)
		must.Eq(t, "mine", string(text))
	})
}

func TestListenOnAllOrNone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api.sock")
	taken, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, taken.Close()) })
	_, err = httpserver.Listen(t.Context(), []string{"unix://" + path, taken.Addr().String()}, private, nil)
	must.ErrorIs(t, err, syscall.EADDRINUSE)
	_, err = os.Lstat(path)
	must.ErrorIs(t, err, fs.ErrNotExist)
}

// oneConn is a listener of one connection in memory, so that time may be a synctest
// bubble's.
type oneConn struct {
	conns  chan net.Conn
	closed context.Context
	close  context.CancelFunc
}

func (l *oneConn) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed.Done():
		return nil, net.ErrClosed
	}
}
func (l *oneConn) Close() error   { l.close(); return nil }
func (l *oneConn) Addr() net.Addr { return &net.TCPAddr{} }

func TestHandshakeIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		caller, served := net.Pipe()
		listener := &oneConn{conns: make(chan net.Conn, 1)}
		listener.closed, listener.close = context.WithCancel(t.Context())
		listener.conns <- tls.Server(served, &tls.Config{MinVersion: tls.VersionTLS12})
		server := httpserver.New(http.NotFoundHandler(), 0, hclog.NewNullLogger())
		var serving sync.WaitGroup
		serving.Go(func() { _ = server.Serve(listener) })

		began := time.Now()
		_, err := caller.Read(make([]byte, 1)) // and say nothing
		must.Error(t, err)
		must.Eq(t, 10*time.Second, time.Since(began))
		must.NoError(t, server.Close())
		serving.Wait()
	})
}
