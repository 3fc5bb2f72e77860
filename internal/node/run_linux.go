package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/bivouac/bivouac/internal/agent/httpserver"
	"github.com/bivouac/bivouac/internal/credentials"
)

// stopLimit is how long the orders that are being carried out may take when the helper
// stops. It is longer than orderLimit.
const stopLimit = 12 * time.Second

// Run runs the helper until ctx ends, and then finishes the orders that it has begun. It
// logs to out, and sets the umask of the process. On each hangup it reads its certificate, key and CAs again. It returns an
// error at once if the process is not root, if the configuration is invalid, or if a file
// cannot be read.
func Run(ctx context.Context, c Config, out io.Writer, hangups <-chan os.Signal) error {
	if err := c.Validate(); err != nil {
		return fmt.Errorf("node: %w", err)
	}
	if os.Geteuid() != 0 {
		return errors.New("node: the node helper must run as root, because it mounts volumes in sandboxes")
	}
	log := hclog.New(&hclog.LoggerOptions{
		Name: "bivouac-node", Level: hclog.LevelFromString(c.LogLevel), JSONFormat: c.LogJSON, Output: out,
	})
	secure, err := credentials.LoadTLS(c.TLS)
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	unix.Umask(0o022) // sandboxes of all users enter the folders that it makes
	all, err := newBinder(c.VolumeRoots, log)
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	defer all.close() //nolint:errcheck // the process ends
	listener, err := listen(ctx, c.HTTPAddr, secure)
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	log.Info("node_helper_started", "http_addr", listener.Addr().String(), "volume_roots", c.VolumeRoots)

	watcher := &credentials.Watcher{Items: map[string]credentials.Reloader{"tls": secure}, Logger: log, Failed: func(string) {}}
	ctx, cancel := context.WithCancel(ctx)
	var background sync.WaitGroup
	background.Go(func() { watcher.Run(ctx) })
	background.Go(func() { all.run(ctx) })
	background.Go(func() {
		for {
			select {
			case <-hangups:
				watcher.Reload()
			case <-ctx.Done():
				return
			}
		}
	})
	err = serveOrders(ctx, listener, all, c.ClientName, log)
	cancel()
	background.Wait()
	return err
}

// listen listens for connections with TLS. A client certificate of another CA does not
// pass the handshake. A client without one does, because a health check has none; the
// server refuses its orders.
func listen(ctx context.Context, address string, secure *credentials.TLS) (net.Listener, error) {
	all, err := httpserver.Listen(ctx, []string{address}, httpserver.Socket{}, secure.Server(tls.VersionTLS13, tls.VerifyClientCertIfGiven))
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

// serveOrders serves until ctx ends, and then waits for the orders that were begun.
func serveOrders(ctx context.Context, listener net.Listener, all sandboxes, clientName string, log hclog.Logger) error {
	handler := newServer(ctx, all, clientName, log)
	server := httpserver.New(handler, maxConnections, log)
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		return fmt.Errorf("node: %w", err)
	case <-ctx.Done():
	}
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopLimit)
	defer cancel()
	err := server.Shutdown(limited)
	if served := <-failed; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	if err != nil {
		return fmt.Errorf("node: the orders that were begun did not end: %w", errors.Join(err, server.Close()))
	}
	return nil
}
