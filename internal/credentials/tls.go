package credentials

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxFile bounds a PEM file, in bytes. The CAs of a whole operating system fit.
	maxFile = 1 << 20
	// dialLimit bounds a connection that Dial makes, with its handshake. A context may
	// end it earlier.
	dialLimit = 30 * time.Second
	// keepAlive is the interval of TCP's keep-alive probes.
	keepAlive = 30 * time.Second
)

// Files are the paths of PEM files. An empty path means that there is no such file.
// Certificate and Key need each other.
type Files struct {
	CA          string // certificates of the CAs to trust; empty: on the client side those of the system
	Certificate string // with the intermediate certificates after it
	Key         string
}

// TLS is a certificate with its key, and CAs to trust, all read from files. Reload reads
// the files again. Connections that are made after it use what it read; those that exist
// go on. TLS is safe for concurrent use.
type TLS struct {
	files   Files
	reload  sync.Mutex // held while the files are read
	current atomic.Pointer[material]
}

// material is what the files contain.
type material struct {
	certificate *tls.Certificate // nil without a file
	cas         *x509.CertPool   // nil without a file
	expires     time.Time        // of the certificate; zero without one
	sums        [3][sha256.Size]byte
}

// LoadTLS reads the files. It returns an error that names the file if one cannot be used.
func LoadTLS(files Files) (*TLS, error) {
	if (files.Certificate == "") != (files.Key == "") {
		return nil, errors.New("a certificate needs a key, and a key needs a certificate")
	}
	loaded, err := load(files)
	if err != nil {
		return nil, err
	}
	t := &TLS{files: files}
	t.current.Store(loaded)
	return t, nil
}

// Reload reads the files again and reports whether they changed. If one of them cannot be
// used, for example because it is being written, Reload keeps what it had and returns an
// error.
func (t *TLS) Reload() (changed bool, err error) {
	t.reload.Lock()
	defer t.reload.Unlock()
	loaded, err := load(t.files)
	if err != nil || loaded.sums == t.current.Load().sums {
		return false, err
	}
	<-time.After(settle)
	again, err := load(t.files)
	if err != nil {
		return false, err
	}
	if again.sums != loaded.sums {
		return false, errors.New("credentials: the files of a certificate are being written")
	}
	t.current.Store(loaded)
	return true, nil
}

// Expires returns when the certificate, or the first of its intermediate certificates,
// expires. It returns the zero time if there is no certificate.
func (t *TLS) Expires() time.Time { return t.current.Load().expires }

// Server returns the configuration of a server that speaks HTTP/1.1. Each handshake uses
// the current files. Clients with a certificate of one of the CAs are the only ones that
// clientAuth can accept: without a CA file there is none.
func (t *TLS) Server(minVersion uint16, clientAuth tls.ClientAuthType) *tls.Config {
	config := &tls.Config{
		MinVersion: minVersion,
		ClientAuth: clientAuth,
		NextProtos: []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if current := t.current.Load(); current.certificate != nil {
				return current.certificate, nil
			}
			return nil, errors.New("there is no certificate")
		},
	}
	perConnection := config.Clone()
	config.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		own := perConnection.Clone()
		own.ClientCAs = t.current.Load().cas
		if own.ClientCAs == nil {
			own.ClientCAs = x509.NewCertPool() // nil would be the CAs of the system
		}
		return own, nil
	}
	return config
}

// Client returns the configuration of a client that speaks HTTP/1.1. It trusts the CAs
// that are current now, and presents the certificate that is current at each handshake.
// Use it for one connection, or where Dial cannot be used. serverName is the name that the
// server's certificate must have; empty: whoever uses the configuration must set one.
func (t *TLS) Client(serverName string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		ServerName: serverName,
		RootCAs:    t.current.Load().cas,
		NextProtos: []string{"http/1.1"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if current := t.current.Load(); current.certificate != nil {
				return current.certificate, nil
			}
			return &tls.Certificate{}, nil // which presents none
		},
	}
}

// Dial returns a function for the DialTLSContext of an http.Transport. Each connection
// uses the current files, so that new files need no new transport. serverName is the name
// that the server's certificate must have; empty: the host that is dialled. A connection
// and its handshake together may take 30 seconds.
//
// http.Transport does not call DialTLSContext for connections through a proxy. For these,
// give it the configuration that Client returns, too.
func (t *TLS) Dial(serverName string) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		name := serverName
		if name == "" {
			host, _, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, fmt.Errorf("credentials: %w", err)
			}
			name = host
		}
		dialer := tls.Dialer{
			NetDialer: &net.Dialer{Timeout: dialLimit, KeepAlive: keepAlive},
			Config:    t.Client(name),
		}
		return dialer.DialContext(ctx, network, addr)
	}
}

func load(files Files) (*material, error) {
	var m material
	if files.CA != "" {
		text, err := read(files.CA)
		if err != nil {
			return nil, err
		}
		cas, err := certificates(text)
		if err != nil {
			return nil, fmt.Errorf("credentials: CA file %s: %w", files.CA, err)
		}
		m.sums[0], m.cas = sha256.Sum256(text), x509.NewCertPool()
		for _, ca := range cas {
			m.cas.AddCert(ca)
		}
	}
	if files.Certificate == "" {
		return &m, nil
	}
	text, err := read(files.Certificate)
	if err != nil {
		return nil, err
	}
	chain, err := certificates(text)
	if err != nil {
		return nil, fmt.Errorf("credentials: certificate file %s: %w", files.Certificate, err)
	}
	key, err := read(files.Key)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(text, key)
	if err != nil {
		return nil, fmt.Errorf("credentials: certificate file %s and key file %s: %w", files.Certificate, files.Key, err)
	}
	m.certificate = &pair
	m.sums[1], m.sums[2] = sha256.Sum256(text), sha256.Sum256(key)
	m.expires = chain[0].NotAfter
	for _, certificate := range chain[1:] {
		if certificate.NotAfter.Before(m.expires) {
			m.expires = certificate.NotAfter
		}
	}
	return &m, nil
}

func read(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("credentials: %w", err)
	}
	defer func() { _ = file.Close() }() // only read
	text, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("credentials: %w", err)
	}
	if len(text) > maxFile {
		return nil, fmt.Errorf("credentials: %s is larger than %d bytes", path, maxFile)
	}
	return text, nil
}

// certificates returns all certificates in a PEM file, at least one. Unlike package x509
// it refuses a file that ends within a certificate, because that is still being written.
func certificates(text []byte) ([]*x509.Certificate, error) {
	var all []*x509.Certificate
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			break
		}
		text = rest
		if block.Type != "CERTIFICATE" {
			continue
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		all = append(all, certificate)
	}
	if strings.Contains(string(text), "-----BEGIN") {
		return nil, errors.New("the last certificate is incomplete")
	}
	if all == nil {
		return nil, errors.New("it contains no certificate in PEM")
	}
	return all, nil
}
