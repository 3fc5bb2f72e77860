package auth

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
)

// testKey is a private key of an issuer.
type testKey struct {
	id, algorithm string
	private       crypto.Signer
}

func rsaKey(t testing.TB, id string) testKey {
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	must.NoError(t, err)
	return testKey{id, "RS256", private}
}

func ecKey(t testing.TB, id string) testKey {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must.NoError(t, err)
	return testKey{id, "ES256", private}
}

func edKey(t testing.TB, id string) testKey {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	must.NoError(t, err)
	return testKey{id, "EdDSA", private}
}

func (k testKey) header() string {
	return fmt.Sprintf(`{"alg":%q,"kid":%q,"typ":"JWT"}`, k.algorithm, k.id)
}

// sign returns a token. Its header and payload need not be right.
func (k testKey) sign(t testing.TB, header, payload string) string {
	input := encode(header) + "." + encode(payload)
	digest := sha256.Sum256([]byte(input))
	var signature []byte
	var err error
	switch private := k.private.(type) {
	case *rsa.PrivateKey:
		signature, err = rsa.SignPKCS1v15(nil, private, crypto.SHA256, digest[:])
	case *ecdsa.PrivateKey:
		r, s, signErr := ecdsa.Sign(rand.Reader, private, digest[:])
		must.NoError(t, signErr)
		signature = make([]byte, 64)
		r.FillBytes(signature[:32])
		s.FillBytes(signature[32:])
	case ed25519.PrivateKey:
		signature = ed25519.Sign(private, []byte(input))
	}
	must.NoError(t, err)
	return input + "." + encode(string(signature))
}

// token returns a correct token with these claims.
func (k testKey) token(t testing.TB, claims map[string]any) string {
	payload, err := json.Marshal(claims)
	must.NoError(t, err)
	return k.sign(t, k.header(), string(payload))
}

func encode(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }

// hs256 returns a token that is signed with a shared secret.
func hs256(secret []byte, header, payload string) string {
	input := encode(header) + "." + encode(payload)
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(input))
	return input + "." + encode(string(mac.Sum(nil)))
}

// workload returns the claims of a workload identity of Nomad that is accepted.
func workload() map[string]any {
	now := time.Now().Unix()
	return map[string]any{
		"aud": "bivouac.io", "exp": now + 3600, "iat": now, "nbf": now, "jti": "token-1",
		"sub":             "global:chat:support-bot:bot:bot:bivouac",
		"nomad_namespace": "chat", "nomad_job_id": "support-bot", "nomad_task": "bot",
	}
}

// with returns the claims with one changed. A nil value removes it.
func with(claims map[string]any, name string, value any) map[string]any {
	claims = maps.Clone(claims)
	if claims[name] = value; value == nil {
		delete(claims, name)
	}
	return claims
}

// issuer has keys that a test can change, and counts how often they are read.
type issuer struct {
	keys    *Keys
	answer  atomic.Pointer[[]byte] // nil: it cannot be reached
	reads   atomic.Int64
	changed chan struct{} // a poll waits for it
}

// newIssuer returns an issuer whose keys are read once Run is called.
func newIssuer(t testing.TB, keys ...testKey) *issuer {
	i := &issuer{changed: make(chan struct{}, 1)}
	i.keys = newKeys("the issuer", time.Second, hclog.NewNullLogger())
	i.keys.parse = parseJWKS
	polled := false
	i.keys.read = func(ctx context.Context, wait bool) ([]byte, error) {
		if wait && polled {
			select {
			case <-i.changed:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		i.reads.Add(1)
		answer := i.answer.Load()
		if polled = answer != nil; !polled {
			return nil, errors.New("connection refused")
		}
		return *answer, nil
	}
	i.set(t, keys...)
	return i
}

// set changes the keys, and tells nobody.
func (i *issuer) set(t testing.TB, keys ...testKey) {
	document := jwks(t, keys...)
	i.answer.Store(&document)
}

func jwks(t testing.TB, keys ...testKey) []byte {
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, k := range keys {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: k.private.Public(), KeyID: k.id, Algorithm: k.algorithm, Use: "sig"})
	}
	document, err := json.Marshal(set)
	must.NoError(t, err)
	return document
}

// fixed returns keys that were read once.
func fixed(t testing.TB, keys ...testKey) *Keys {
	i := newIssuer(t, keys...)
	must.NoError(t, i.keys.reread(t.Context(), false))
	i.keys.lastExtra = time.Now().Add(time.Hour) // nobody waits for Run
	return i.keys
}

// change replaces the first old in a token's part by its new text.
func change(t testing.TB, token string, part int, old, text string) string {
	parts := strings.Split(token, ".")
	decoded, err := base64.RawURLEncoding.DecodeString(parts[part])
	must.NoError(t, err)
	must.StrContains(t, string(decoded), old)
	parts[part] = encode(strings.Replace(string(decoded), old, text, 1))
	return strings.Join(parts, ".")
}
