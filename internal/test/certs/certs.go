// Package certs makes certificate authorities and certificates for tests.
//
// [NewCA] makes a CA, which is valid for a day. [CA.Issue] makes a certificate of it, which
// is valid for two, for servers and for clients.
//
// It makes no intermediate CAs and revokes nothing.
package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/shoenig/test/must"
)

// CA is a certificate authority.
type CA struct {
	PEM []byte // its certificate

	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// Pair is a certificate with its key, in PEM.
type Pair struct {
	Certificate []byte
	Key         []byte
}

// NewCA returns a new CA.
func NewCA(t must.T) *CA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must.NoError(t, err)
	template := newTemplate("Test CA", 24*time.Hour)
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must.NoError(t, err)
	certificate, err := x509.ParseCertificate(der)
	must.NoError(t, err)
	return &CA{PEM: encode("CERTIFICATE", der), certificate: certificate, key: key}
}

// With returns ca with the certificate of another one in its PEM, as during a change from
// one CA to the next.
func (ca *CA) With(other *CA) *CA {
	both := *ca
	both.PEM = slices.Concat(ca.PEM, other.PEM)
	return &both
}

// Issue returns a certificate for names, which are DNS names or IP addresses. The first
// one is also its common name.
func (ca *CA) Issue(t must.T, names ...string) Pair {
	t.Helper()
	return ca.IssueFor(t, 48*time.Hour, names...)
}

// IssueFor is like Issue, for a certificate that is valid for a given time from now. If that
// is negative, it has expired.
func (ca *CA) IssueFor(t must.T, life time.Duration, names ...string) Pair {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must.NoError(t, err)
	template := newTemplate(names[0], life)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.certificate, key.Public(), ca.key)
	must.NoError(t, err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	must.NoError(t, err)
	return Pair{Certificate: encode("CERTIFICATE", der), Key: encode("PRIVATE KEY", private)}
}

// Write writes the files ca.pem, cert.pem and key.pem in dir. Each is replaced at once by
// a rename.
func Write(t must.T, dir string, ca *CA, pair Pair) (caFile, certFile, keyFile string) {
	t.Helper()
	replace := func(name string, text []byte) string {
		path := filepath.Join(dir, name)
		must.NoError(t, os.WriteFile(path+".new", text, 0o600))
		must.NoError(t, os.Rename(path+".new", path))
		return path
	}
	return replace("ca.pem", ca.PEM), replace("cert.pem", pair.Certificate), replace("key.pem", pair.Key)
}

func newTemplate(name string, valid time.Duration) *x509.Certificate {
	return &x509.Certificate{
		Subject:   pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour),
		NotAfter:  time.Now().Add(valid),
	}
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}
