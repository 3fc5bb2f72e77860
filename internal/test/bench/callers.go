package main

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/test/stack"
)

const callersPart = "callers"

// callers measures what authentication costs a reuse: without it, with a static token,
// and with a JWT that the server has seen before, in turns.
func (w *world) callers(ctx context.Context, rounds int) (report, error) {
	file := filepath.Join(w.dir, "callers.hcl")
	token, err := stack.WriteCallers(file, "")
	if err != nil {
		return nil, err
	}
	jwt, err := w.writeJWT(file)
	if err != nil {
		return nil, err
	}
	common := replicaConfig{consul: w.consul.Addr(), nomad: w.nomad.Addr(), template: "raw_exec"}
	type side struct {
		what    string
		replica *replica
		chat    uuid.UUID
	}
	sides := []*side{{what: "reuse without authentication"}, {what: "reuse with a token"}, {what: "reuse with a JWT"}}
	for i, credential := range []string{"", token, jwt} {
		config := common
		config.prefix = fmt.Sprintf("callers-%d", i)
		if credential != "" {
			config.flags, config.token = []string{"-config=" + file}, credential
		}
		s := sides[i]
		if s.replica, err = w.startReplica(ctx, config); err != nil {
			return nil, err
		}
		s.chat = uuid.New()
		if err := s.replica.create(ctx, s.chat); err != nil {
			return nil, fmt.Errorf("%s: %w", s.what, err)
		}
	}
	times := stopwatch{}
	const reusesPerRound = 20
	for range rounds {
		for range reusesPerRound {
			for _, s := range sides { // in turns, one by one: the difference is small
				if err := times.time(s.what, func() error { return s.replica.create(ctx, s.chat) }); err != nil {
					return nil, err
				}
			}
		}
	}
	var out report
	for _, s := range sides {
		r := timed(callersPart, s.what, times[s.what])
		if len(out) > 0 {
			r.against(out[0])
			r.Count, r.Unit = r.P50-out[0].P50, "ms more at p50"
		}
		out = append(out, r)
		if err := s.replica.delete(ctx, s.chat); err != nil {
			return nil, err
		}
		if err := s.replica.Stop(); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// writeJWT adds a jwt block to the configuration file, and returns a token that it
// accepts.
func (w *world) writeJWT(file string) (string, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return "", err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return "", err
	}
	keys := filepath.Join(w.dir, "callers.pem")
	if err := os.WriteFile(keys, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600); err != nil {
		return "", err
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	text = fmt.Appendf(text, `
jwt "bench" {
  public_keys_file = %q
  issuer           = "bench"
  audiences        = ["bivouac"]
  policies         = ["caller"]
}
`, keys)
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return "", err
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: key}, nil)
	if err != nil {
		return "", err
	}
	claims, err := json.Marshal(map[string]any{
		"iss": "bench", "aud": "bivouac", "sub": "bench", "exp": time.Now().Add(time.Hour).Unix(),
	})
	if err != nil {
		return "", err
	}
	signed, err := signer.Sign(claims)
	if err != nil {
		return "", err
	}
	return signed.CompactSerialize()
}
