package agent

import (
	"maps"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/test/certs"
)

func TestCertificates(t *testing.T) {
	ca := certs.NewCA(t)
	issued := func(life time.Duration) *credentials.TLS {
		caFile, certFile, keyFile := certs.Write(t, t.TempDir(), ca, ca.IssueFor(t, life, "a"))
		loaded, err := credentials.LoadTLS(credentials.Files{CA: caFile, Certificate: certFile, Key: keyFile})
		must.NoError(t, err)
		return loaded
	}
	none, err := credentials.LoadTLS(credentials.Files{})
	must.NoError(t, err)
	all := certificates{
		"consul_token": credentials.NewToken("a"), "consul_tls": none, "http_tls": issued(time.Hour),
	}
	must.Eq(t, map[string]time.Time{"http_tls": all["http_tls"].(*credentials.TLS).Expires()}, maps.Collect(all.all()))
	must.NoError(t, all.health(t.Context()))

	all["nomad_tls"] = issued(-time.Minute)
	must.ErrorContains(t, all.health(t.Context()), "the certificate nomad_tls expired at ")
}
