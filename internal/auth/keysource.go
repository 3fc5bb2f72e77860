package auth

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/credentials"
)

const (
	maxDocument = 1 << 20 // bytes of a document with keys
	maxKeys     = 64      // keys in it
	// minRSA is the least length of an RSA key in bits (RFC 7518, section 3.3), and
	// maxRSA the greatest: the longer a key is, the longer each check takes.
	minRSA, maxRSA = 2048, 8192

	// pollWait is how long Nomad may hold a poll until the keys change.
	pollWait = time.Minute
	// pollPause is the pause between two polls.
	pollPause = time.Second
	// urlEvery is how often a URL is read. It bounds how long a key is accepted that its
	// issuer has withdrawn.
	urlEvery = 5 * time.Minute
)

// NomadKeys returns the keys with which Nomad signs workload identities. They are polled
// through the client, so a rotation is seen at once. token returns the token of each
// request; "" leaves it to the client.
func NomadKeys(client *api.Client, token func() string, log hclog.Logger) *Keys {
	k := newKeys("Nomad", pollPause, log)
	k.parse = parseJWKS
	var index uint64 // of the last answer
	k.read = func(ctx context.Context, wait bool) ([]byte, error) {
		opts := api.QueryOptions{AuthToken: token()}
		limit := readLimit
		if wait && index > 0 {
			opts.WaitIndex, opts.WaitTime = index, pollWait
			limit += pollWait + pollWait/16 // Nomad adds up to a sixteenth
		}
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		var document json.RawMessage
		meta, err := client.Raw().Query("/.well-known/jwks.json", &document, opts.WithContext(ctx))
		if err != nil {
			index = 0
			return nil, fmt.Errorf("read the keys: %w", err)
		}
		if index = meta.LastIndex; len(document) > maxDocument {
			return nil, fmt.Errorf("the answer is longer than %d bytes", maxDocument)
		}
		return document, nil
	}
	return k
}

// URLKeys returns the keys of a JSON Web Key Set at a URL. caFile is a PEM file with the
// certificate authorities of its server, empty for those of the system. It is read each
// time.
func URLKeys(from, caFile string, log hclog.Logger) (*Keys, error) {
	u, err := url.Parse(from)
	if err != nil {
		return nil, err
	}
	if _, err := credentials.LoadTLS(credentials.Files{CA: caFile}); err != nil {
		return nil, err
	}
	k := newKeys(u.Redacted(), urlEvery, log)
	k.parse = parseJWKS
	k.read = func(ctx context.Context, _ bool) ([]byte, error) { return download(ctx, from, caFile) }
	return k, nil
}

// FileKeys returns the keys in a PEM file: public keys and certificates, of which only the
// public key counts. It fails if there are none. Call [Keys.Reload] to read the file again.
func FileKeys(path string, log hclog.Logger) (*Keys, error) {
	k := newKeys(path, 0, log)
	k.parse = parsePEM
	k.read = func(context.Context, bool) ([]byte, error) { return credentials.ReadFile(path) }
	if _, err := k.Reload(); err != nil {
		return nil, err
	}
	return k, nil
}

// download opens a new connection each time, because it is seldom called, and a
// certificate authority may have changed. It follows no redirects.
func download(ctx context.Context, from, caFile string) ([]byte, error) {
	authorities, err := credentials.LoadTLS(credentials.Files{CA: caFile})
	if err != nil {
		return nil, err
	}
	client := &http.Client{
		Transport: &http.Transport{
			Proxy:             http.ProxyFromEnvironment,
			TLSClientConfig:   authorities.Client(""),
			DisableKeepAlives: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	ctx, cancel := context.WithTimeout(ctx, readLimit)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, from, http.NoBody)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the server answered %s", response.Status)
	}
	document, err := io.ReadAll(io.LimitReader(response.Body, maxDocument+1))
	if err == nil && len(document) > maxDocument {
		err = fmt.Errorf("it is longer than %d bytes", maxDocument)
	}
	return document, err
}

// parseJWKS returns the keys of a JSON Web Key Set that may have signed a token. Others are
// left out, as RFC 7517 asks. An issuer that has withdrawn all keys has an empty set.
func parseJWKS(document []byte) ([]jose.JSONWebKey, error) {
	var set struct {
		Keys *[]json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(document, &set); err != nil {
		return nil, fmt.Errorf("it is not a JSON Web Key Set: %w", err)
	}
	if set.Keys == nil {
		return nil, errors.New("it is not a JSON Web Key Set: it has no keys")
	}
	if len(*set.Keys) > maxKeys {
		return nil, fmt.Errorf("it has %d keys, more than %d", len(*set.Keys), maxKeys)
	}
	var keys []jose.JSONWebKey
	var problems []error
	for _, text := range *set.Keys {
		var key jose.JSONWebKey
		err := key.UnmarshalJSON(text)
		if err == nil {
			err = check(key)
		}
		if err != nil {
			problems = append(problems, err)
			continue
		}
		keys = append(keys, key)
	}
	if len(keys) == 0 && len(problems) > 0 {
		return nil, fmt.Errorf("none of its keys can be used: %w", problems[0])
	}
	return keys, nil
}

// parsePEM returns the public keys in a PEM file.
func parsePEM(document []byte) ([]jose.JSONWebKey, error) {
	var keys []jose.JSONWebKey
	for {
		var block *pem.Block
		if block, document = pem.Decode(document); block == nil {
			break
		}
		public, err := parsePublicKey(block)
		if err != nil {
			return nil, err
		}
		key := jose.JSONWebKey{Key: public}
		if err := check(key); err != nil {
			return nil, err
		}
		if keys = append(keys, key); len(keys) > maxKeys {
			return nil, fmt.Errorf("it has more than %d keys", maxKeys)
		}
	}
	if bytes.Contains(document, []byte("-----BEGIN")) {
		return nil, errors.New("it ends within a block")
	}
	if len(keys) == 0 {
		return nil, errors.New("it has no public key in PEM format")
	}
	return keys, nil
}

func parsePublicKey(block *pem.Block) (any, error) {
	switch block.Type {
	case "PUBLIC KEY":
		return x509.ParsePKIXPublicKey(block.Bytes)
	case "RSA PUBLIC KEY":
		return x509.ParsePKCS1PublicKey(block.Bytes)
	case "CERTIFICATE":
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		return certificate.PublicKey, nil
	default:
		return nil, fmt.Errorf("it has a block %q; only PUBLIC KEY, RSA PUBLIC KEY and CERTIFICATE are allowed", block.Type)
	}
}

// check refuses keys that no token may be signed with.
func check(key jose.JSONWebKey) error {
	if key.Use != "" && key.Use != "sig" {
		return fmt.Errorf("a key is for use %q, not for signatures", key.Use)
	}
	switch public := key.Key.(type) {
	case *rsa.PublicKey:
		if bits := public.N.BitLen(); bits < minRSA || bits > maxRSA {
			return fmt.Errorf("an RSA key has %d bits; it must have %d to %d", bits, minRSA, maxRSA)
		}
	case *ecdsa.PublicKey, ed25519.PublicKey:
	default:
		return fmt.Errorf("a key is no public key of type RSA, ECDSA or Ed25519, but %T", public)
	}
	return nil
}

// fits reports whether a key is for this algorithm. That an ECDSA key has the algorithm's
// curve is checked with the signature.
func fits(key jose.JSONWebKey, algorithm jose.SignatureAlgorithm) bool {
	if key.Algorithm != "" && key.Algorithm != string(algorithm) {
		return false
	}
	switch key.Key.(type) {
	case *rsa.PublicKey:
		return strings.HasPrefix(string(algorithm), "RS") || strings.HasPrefix(string(algorithm), "PS")
	case *ecdsa.PublicKey:
		return strings.HasPrefix(string(algorithm), "ES")
	case ed25519.PublicKey:
		return algorithm == jose.EdDSA
	default:
		return false
	}
}
