package stack

import (
	"crypto/tls"
	"net/http"
)

// TLSFiles are the PEM files that the agents use for all their connections: the trusted
// authorities, and a certificate of one of these with its key. The caller makes the files,
// for these [AgentNames], and may replace them while the agents run; see Reload.
type TLSFiles struct{ CA, Certificate, Key string }

// AgentNames returns the names that must be in the agents' certificate. Nomad and Consul
// check the first ones when their agents call each other.
func AgentNames() []string {
	return []string{"server.global.nomad", "client.global.nomad", "server.dc1.consul", "localhost", "127.0.0.1"}
}

// transport returns the transport of the stack's own clients. It shows the certificate that
// is in the files at the time. It does not check that of the server, so that it works while
// a test replaces authorities.
func (f TLSFiles) transport() *http.Transport {
	return &http.Transport{TLSClientConfig: &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true, // only the product's clients have to check
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			certificate, err := tls.LoadX509KeyPair(f.Certificate, f.Key)
			return &certificate, err
		},
	}}
}
