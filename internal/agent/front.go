package agent

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"strings"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/agent/httpserver"
	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/credentials"
)

// front is where callers reach the API.
type front struct {
	listeners []net.Listener   // in the order of the configuration
	secure    *credentials.TLS // nil: without TLS
}

// listen listens on all addresses. It warns of those where others can read the requests.
func listen(ctx context.Context, c config.Config, log hclog.Logger) (front, error) {
	secure, settings, err := newTLS(c)
	if err != nil {
		return front{}, err
	}
	socket := httpserver.Socket{Mode: c.UnixSockets.FileMode(), User: c.UnixSockets.User, Group: c.UnixSockets.Group}
	listeners, err := httpserver.Listen(ctx, c.HTTPAddrs, socket, settings)
	if err != nil {
		return front{}, fmt.Errorf("agent: http_addr: %w", err)
	}
	for _, listener := range listeners {
		if addr, ok := listener.Addr().(*net.TCPAddr); ok && secure == nil && !addr.IP.IsLoopback() {
			log.Warn("http_without_tls", "http_addr", addr,
				"detail", "tokens and sessions cross the network in clear text; set a tls block")
		}
	}
	return front{listeners, secure}, nil
}

// newTLS returns nil if TLS is not configured.
func newTLS(c config.Config) (*credentials.TLS, *tls.Config, error) {
	if c.TLS.CertFile == "" {
		return nil, nil, nil
	}
	secure, err := credentials.LoadTLS(credentials.Files{
		CA: c.TLS.ClientCAFile, Certificate: c.TLS.CertFile, Key: c.TLS.KeyFile,
	})
	if err != nil {
		return nil, nil, c.Wrong("tls", err)
	}
	clients := tls.NoClientCert
	if c.TLS.VerifyClient {
		// The API refuses callers without a certificate, except for probes.
		clients = tls.VerifyClientCertIfGiven
	}
	server := secure.Server(c.TLS.Version(), clients)
	return secure, server, nil
}

// addresses returns where it listens, in the order of the configuration.
func (f front) addresses() []string {
	var all []string
	for _, listener := range f.listeners {
		address := listener.Addr().String()
		if listener.Addr().Network() == "unix" {
			address = httpserver.UnixScheme + address
		}
		all = append(all, address)
	}
	return all
}

// url returns the URL of its first address, which is not a unix socket.
func (f front) url() string {
	if f.secure != nil {
		return "https://" + f.addresses()[0]
	}
	return "http://" + f.addresses()[0]
}

// hosts returns the names under which the API may be called, in lower case and without
// those of loopback.
func hosts(c config.Config) []string {
	var all []string
	for _, name := range c.HostNames {
		all = append(all, strings.ToLower(strings.TrimSuffix(name, ".")))
	}
	for _, address := range c.HTTPAddrs {
		if strings.HasPrefix(address, httpserver.UnixScheme) {
			continue
		}
		if host, _, err := net.SplitHostPort(address); err == nil && host != "" {
			all = append(all, strings.ToLower(host))
		}
	}
	return all
}
