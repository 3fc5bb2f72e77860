package stack

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	consulapi "github.com/hashicorp/consul/api"
	nomadapi "github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/certs"
)

// strictClient returns an HTTP client that trusts only the authorities in the files, and
// that has their certificate unless anonymous.
func strictClient(t *testing.T, files TLSFiles, anonymous bool) *http.Client {
	t.Helper()
	bundle, err := os.ReadFile(files.CA)
	must.NoError(t, err)
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()}
	must.True(t, config.RootCAs.AppendCertsFromPEM(bundle))
	if !anonymous {
		certificate, err := tls.LoadX509KeyPair(files.Certificate, files.Key)
		must.NoError(t, err)
		config.Certificates = []tls.Certificate{certificate}
	}
	transport := &http.Transport{TLSClientConfig: config}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: askLimit}
}

// fetch returns what a server answers with status 200.
func fetch(client *http.Client, url string) (string, error) {
	res, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", res.Status, text)
	}
	return string(text), err
}

func TestServersWithTLSAndACLs(t *testing.T) {
	NeedServers(t)
	ctx := limited(t)
	old := certs.NewCA(t)
	write := func(dir string, trusted, issuer *certs.CA, names ...string) TLSFiles {
		ca, certificate, key := certs.Write(t, dir, trusted, issuer.Issue(t, names...))
		return TLSFiles{CA: ca, Certificate: certificate, Key: key}
	}
	theirDir, myDir := t.TempDir(), t.TempDir()
	theirs := write(theirDir, old, old, AgentNames()...)
	mine := write(myDir, old, old, "bivouac")
	n, err := StartNomad(ctx, NomadConfig{Servers: 1, Clients: 1, Drivers: []string{"raw_exec"}, ManagementToken: uuid.NewString(), TLS: &theirs})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, n.Stop()) })
	c, err := StartConsul(ctx, ConsulConfig{Servers: 3, ManagementToken: uuid.NewString(), TLS: &theirs})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, c.Stop()) })

	// A client with a certificate reaches both, and one without reaches neither.
	urls := []string{"https://" + n.Addr() + "/.well-known/jwks.json", "https://" + c.Addr() + "/v1/status/leader"}
	for _, url := range urls {
		_, err := fetch(strictClient(t, mine, false), url)
		must.NoError(t, err)
		_, err = fetch(strictClient(t, mine, true), url)
		must.ErrorContains(t, err, "tls:")
	}
	keys, err := fetch(strictClient(t, mine, false), urls[0])
	must.NoError(t, err)
	must.StrContains(t, keys, `"kid"`)

	// A token may do what its rules say, until it is deleted.
	inNomad, err := n.NewToken(ctx, `namespace "default" { capabilities = ["list-jobs"] }`)
	must.NoError(t, err)
	nomad, err := n.Client()
	must.NoError(t, err)
	listJobs := func() error {
		_, _, err := nomad.Jobs().List(&nomadapi.QueryOptions{AuthToken: inNomad.Secret})
		return err
	}
	must.NoError(t, listJobs())
	_, _, err = nomad.Nodes().List(&nomadapi.QueryOptions{AuthToken: inNomad.Secret})
	must.ErrorContains(t, err, "Permission denied")
	must.NoError(t, n.DeleteToken(ctx, inNomad))
	must.Error(t, listJobs())

	inConsul, err := c.NewToken(ctx, `key_prefix "mine/" { policy = "write" }`)
	must.NoError(t, err)
	consul, err := c.Client()
	must.NoError(t, err)
	put := func(key string) error {
		_, err := consul.KV().Put(&consulapi.KVPair{Key: key}, &consulapi.WriteOptions{Token: inConsul.Secret})
		return err
	}
	must.NoError(t, put("mine/a"))
	must.ErrorContains(t, put("other/a"), "Permission denied")
	must.NoError(t, c.DeleteToken(ctx, inConsul))
	must.ErrorContains(t, put("mine/a"), "ACL not found")

	// When the servers get a certificate of another CA, a client that trusts only the old
	// one refuses it, and one that trusts the other one does not.
	next := certs.NewCA(t)
	both := &certs.CA{PEM: slices.Concat(old.PEM, next.PEM)}
	write(theirDir, both, next, AgentNames()...)
	must.NoError(t, n.Reload())
	must.NoError(t, c.Reload())
	for _, url := range urls {
		eventually(t, url+" has the new certificate", func() error {
			_, err := fetch(strictClient(t, mine, false), url)
			if !strings.Contains(fmt.Sprint(err), "unknown authority") {
				return errors.Join(errors.New("not yet"), err)
			}
			return nil
		})
	}
	write(myDir, next, next, "bivouac")
	for _, url := range urls {
		_, err := fetch(strictClient(t, mine, false), url)
		must.NoError(t, err)
	}
}
