package httpserver

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
)

// UnixScheme begins the address of a unix socket.
const UnixScheme = "unix://"

// Listen listens on all addresses, or on none if it returns an error. An address is
// HOST:PORT or unix:///PATH. If secure is not nil, connections to HOST:PORT use TLS; those
// to a unix socket never do. The handshake of a server from New is bounded as headers are.
func Listen(ctx context.Context, addresses []string, socket Socket, secure *tls.Config) ([]net.Listener, error) {
	var all []net.Listener
	for _, address := range addresses {
		listener, err := listen(ctx, address, socket, secure)
		if err != nil {
			return nil, errors.Join(err, Close(all))
		}
		all = append(all, listener)
	}
	return all, nil
}

func listen(ctx context.Context, address string, socket Socket, secure *tls.Config) (net.Listener, error) {
	if path, ok := strings.CutPrefix(address, UnixScheme); ok {
		return listenUnix(ctx, path, socket)
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	if secure != nil {
		listener = tls.NewListener(listener, secure)
	}
	return listener, nil
}

// Close closes listeners that a server may have closed already.
func Close(listeners []net.Listener) error {
	var errs []error
	for _, listener := range listeners {
		if err := listener.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
