// Package auth finds out who calls. [Authenticator.Authenticate] takes the credential of
// a request and returns the caller, with the policies that say what it may do.
//
// A static token is known by its SHA-256 alone, so the configuration contains no secret.
// A [JWT] is verified with its issuer's public keys, which [Keys] reads again and again.
// Failed tries are limited for each address.
//
// Package go-jose verifies signatures and parses keys. It has no dependencies, lets the
// caller list the algorithms, and refuses duplicate names in JSON. Fetching keys is left to
// its user: here the keys come through Nomad's own client, and no number of bad tokens
// causes more than a few fetches.
//
// The package does not decide what a caller may do; package scheduler does.
package auth

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"

	"github.com/bivouac/bivouac/scheduler"
)

// Token is a static token.
type Token struct {
	Name     string
	SHA256   [sha256.Size]byte // of the secret
	Policies []*scheduler.Policy
}

// NewSecret returns a new secret for a static token, and its SHA-256. The secret has 32
// random bytes.
func NewSecret() (secret string, sum [sha256.Size]byte) {
	var random [32]byte
	_, _ = rand.Read(random[:]) // never fails
	secret = "bvk_" + base64.RawURLEncoding.EncodeToString(random[:])
	return secret, sha256.Sum256([]byte(secret))
}

// Authenticator knows all callers. It is safe for concurrent use.
type Authenticator struct {
	tokens   []Token
	jwts     *jwts
	failures *failures
}

// New returns an Authenticator for static tokens and JWTs.
func New(tokens []Token, jwts []JWT) *Authenticator {
	return &Authenticator{tokens: tokens, jwts: newJWTs(jwts), failures: newFailures()}
}

// Authenticate returns the caller with this credential. address is where the request
// came from, as HOST:PORT. The error wraps [scheduler.ErrUnauthenticated], or is a
// *scheduler.LimitError if too many tries from this address have failed. A valid credential
// is accepted even then.
func (a *Authenticator) Authenticate(ctx context.Context, credential, address string) (scheduler.Caller, error) {
	if credential == "" {
		return scheduler.Caller{}, fmt.Errorf("%w: send a token in the header X-Bivouac-Token, or as Authorization: Bearer", scheduler.ErrUnauthenticated)
	}
	if token := a.token(credential); token != nil {
		return scheduler.Caller{Name: token.Name, Method: "token", Address: address, Policies: token.Policies}, nil
	}
	why := errors.New("unknown token")
	if a.jwts.has(credential) {
		caller, err := a.jwts.authenticate(ctx, credential)
		if err == nil {
			caller.Address = address
			return caller, nil
		}
		if limit, ok := errors.AsType[*scheduler.LimitError](err); ok {
			return scheduler.Caller{}, limit // the token was not looked at
		}
		why = fmt.Errorf("the token is refused: %w", err)
	}
	if err := a.failures.note(address); err != nil {
		return scheduler.Caller{}, err
	}
	return scheduler.Caller{}, fmt.Errorf("%w: %w", scheduler.ErrUnauthenticated, why)
}

// Health returns an error if the keys of a JWT's issuer are unknown.
func (a *Authenticator) Health(ctx context.Context) error { return a.jwts.health(ctx) }

// token returns the token with this secret, or nil. It compares all of them, so that its
// time does not show which one is nearly right.
func (a *Authenticator) token(secret string) *Token {
	sum := sha256.Sum256([]byte(secret))
	var found *Token
	for i := range a.tokens {
		if subtle.ConstantTimeCompare(sum[:], a.tokens[i].SHA256[:]) == 1 {
			found = &a.tokens[i]
		}
	}
	return found
}
