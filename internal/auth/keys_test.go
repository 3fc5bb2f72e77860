package auth

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
)

// run runs the issuer's keys until the test ends, and waits for the first read.
func (i *issuer) run(t *testing.T) {
	run(t, i.keys)
	synctest.Wait()
}

// pollAnswers lets the poll see what the issuer answers now.
func (i *issuer) pollAnswers() {
	i.changed <- struct{}{}
	time.Sleep(i.keys.every)
	synctest.Wait()
}

func run(t *testing.T, keys *Keys) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- keys.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		must.ErrorIs(t, <-done, context.Canceled)
	})
}

func (i *issuer) jwts() *jwts {
	return newJWTs([]JWT{{
		Name: "x", Keys: i.keys, Audiences: []string{"bivouac.io"}, Algorithms: []string{"EdDSA"}, NameClaim: "sub",
	}})
}

func TestKeys(t *testing.T) {
	first, second := edKey(t, "first"), edKey(t, "second")
	test := func(name string, f func(t *testing.T)) {
		t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
	}
	test("are_new_at_once_if_the_poll_sees_them", func(t *testing.T) {
		i := newIssuer(t, first)
		i.run(t)
		i.set(t, first, second)
		i.pollAnswers()
		reads := i.reads.Load()
		_, err := i.jwts().authenticate(t.Context(), second.token(t, workload()))
		must.NoError(t, err)
		_, err = i.jwts().authenticate(t.Context(), first.token(t, workload()))
		must.NoError(t, err)
		must.Eq(t, reads, i.reads.Load())
	})
	test("are_read_for_an_unknown_key_ID", func(t *testing.T) {
		i := newIssuer(t, first)
		i.run(t)
		i.set(t, second) // and the poll does not see it
		_, err := i.jwts().authenticate(t.Context(), second.token(t, workload()))
		must.NoError(t, err)
		must.Eq(t, 2, i.reads.Load())
		_, err = i.jwts().authenticate(t.Context(), first.token(t, workload()))
		must.ErrorIs(t, err, errUnknownKey)
	})
	test("are_waited_for_at_the_start", func(t *testing.T) {
		i := newIssuer(t, first)
		token := first.token(t, workload())
		done := make(chan error)
		go func() {
			_, err := i.jwts().authenticate(t.Context(), token)
			done <- err
		}()
		synctest.Wait()
		i.run(t)
		must.NoError(t, <-done)
	})
	test("are_not_waited_for_without_end", func(t *testing.T) {
		i := newIssuer(t, first) // that nobody runs
		began := time.Now()
		_, err := i.jwts().authenticate(t.Context(), first.token(t, workload()))
		must.ErrorIs(t, err, errUnknownKey)
		must.ErrorIs(t, err, context.DeadlineExceeded)
		must.Eq(t, readLimit, time.Since(began))
	})
	test("stay_during_an_outage", func(t *testing.T) {
		i := newIssuer(t, first)
		i.run(t)
		i.answer.Store(nil)
		i.pollAnswers()
		time.Sleep(30 * time.Minute)
		must.Greater(t, 20, i.reads.Load())
		must.Less(t, 200, i.reads.Load())
		_, err := i.jwts().authenticate(t.Context(), first.token(t, workload()))
		must.NoError(t, err)
		must.NoError(t, i.keys.Health(t.Context()))

		// When it is over, then new keys are known.
		i.set(t, second)
		time.Sleep(maxReread)
		_, err = i.jwts().authenticate(t.Context(), second.token(t, workload()))
		must.NoError(t, err)
	})
	test("that_were_never_read_are_a_problem", func(t *testing.T) {
		i := newIssuer(t)
		i.answer.Store(nil)
		must.EqError(t, i.keys.Health(t.Context()), "no keys from the issuer")
		i.run(t)
		must.EqError(t, i.keys.Health(t.Context()), "no keys from the issuer: connection refused")
		_, err := i.jwts().authenticate(t.Context(), first.token(t, workload()))
		must.ErrorIs(t, err, errUnknownKey)
		i.set(t, first)
		time.Sleep(lookEvery)
		_, err = i.jwts().authenticate(t.Context(), first.token(t, workload()))
		must.NoError(t, err)
		must.NoError(t, i.keys.Health(t.Context()))
	})
	test("that_were_all_withdrawn_are_not_accepted", func(t *testing.T) {
		i := newIssuer(t, first)
		i.run(t)
		i.set(t)
		i.pollAnswers()
		_, err := i.jwts().authenticate(t.Context(), first.token(t, workload()))
		must.ErrorIs(t, err, errUnknownKey)
		must.EqError(t, i.keys.Health(t.Context()), "no keys from the issuer")
	})
}

// TestUnknownKeysCauseFewReads sends 10,000 tokens a second, each with a key ID of its own,
// and good ones between them.
func TestUnknownKeysCauseFewReads(t *testing.T) {
	key, stranger := edKey(t, "good"), edKey(t, "")
	synctest.Test(t, func(t *testing.T) {
		const ticks, perSecond, senders = 51, 10_000, 100
		i := newIssuer(t, key)
		i.run(t)
		jwts := i.jwts()
		must.Eq(t, 1, i.reads.Load())
		_, payload, _ := strings.Cut(stranger.token(t, workload()), ".") // the signature is never looked at
		payload = "." + payload
		for n := range ticks {
			var all sync.WaitGroup
			for sender := range senders {
				all.Go(func() {
					for m := range perSecond / 10 / senders {
						header := encode(fmt.Sprintf(`{"alg":"EdDSA","kid":"%d-%d-%d"}`, n, sender, m))
						_, err := jwts.authenticate(t.Context(), header+payload)
						must.ErrorIs(t, err, errUnknownKey)
					}
				})
			}
			began := time.Now()
			_, err := jwts.authenticate(t.Context(), key.token(t, with(workload(), "jti", fmt.Sprint(n))))
			must.NoError(t, err)
			must.Eq(t, began, time.Now()) // it waited for nothing
			all.Wait()
			time.Sleep(time.Second / 10)
		}
		must.Eq(t, 1+2, i.reads.Load()) // at 0 s and 5 s
		must.MapLen(t, ticks, jwts.cache.entries)

		// When the key changes in the middle of it, and the poll does not see it, then it is
		// known after one of these reads.
		next := edKey(t, "next")
		i.set(t, next)
		time.Sleep(lookEvery)
		_, err := jwts.authenticate(t.Context(), next.token(t, workload()))
		must.NoError(t, err)
	})
}

func TestWaitingForKeysIsBounded(t *testing.T) {
	key := edKey(t, "a")
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, key) // that nobody runs, so all wait for 5 s
		jwts := i.jwts()
		token := key.token(t, workload())
		began := time.Now()
		var mu sync.Mutex
		took := map[time.Duration]int{}
		var all sync.WaitGroup
		for range 3 * maxWaiting {
			all.Go(func() {
				_, err := jwts.authenticate(t.Context(), token)
				must.ErrorIs(t, err, errUnknownKey)
				mu.Lock()
				defer mu.Unlock()
				took[time.Since(began)]++
			})
		}
		all.Wait()
		must.Eq(t, map[time.Duration]int{0: 2 * maxWaiting, readLimit: maxWaiting}, took)
	})
}

func publicPEM(t testing.TB, keys ...testKey) []byte {
	var out []byte
	for _, k := range keys {
		der, err := x509.MarshalPKIXPublicKey(k.private.Public())
		must.NoError(t, err)
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})...)
	}
	return out
}

func TestFileKeys(t *testing.T) {
	first, second := edKey(t, "ignored"), ecKey(t, "")
	path := filepath.Join(t.TempDir(), "keys.pem")
	must.NoError(t, os.WriteFile(path, publicPEM(t, first), 0o600))
	keys, err := FileKeys(path, hclog.NewNullLogger())
	must.NoError(t, err)
	jwts := newJWTs([]JWT{{
		Name: "x", Keys: keys, Audiences: []string{"bivouac.io"}, Algorithms: []string{"EdDSA", "ES256"}, NameClaim: "sub",
	}})
	accepted := func() (accepted []string) {
		for _, k := range []testKey{first, second} {
			if _, err := jwts.authenticate(t.Context(), k.token(t, workload())); err == nil {
				accepted = append(accepted, k.algorithm)
			}
		}
		return accepted
	}
	must.Eq(t, []string{"EdDSA"}, accepted())
	changed, err := keys.Reload()
	must.NoError(t, err)
	must.False(t, changed)

	// While a new version is being written, or there is no file, the old keys stay.
	both := publicPEM(t, first, second)
	for _, half := range [][]byte{{}, both[:len(both)-40]} {
		must.NoError(t, os.WriteFile(path, half, 0o600))
		_, err := keys.Reload()
		must.Error(t, err)
		must.Eq(t, []string{"EdDSA"}, accepted())
	}
	must.NoError(t, os.Remove(path))
	_, err = keys.Reload()
	must.ErrorIs(t, err, os.ErrNotExist)
	must.Eq(t, []string{"EdDSA"}, accepted())

	// Then both keys are accepted, and in the end only the new one.
	for _, version := range []struct {
		keys []testKey
		want []string
	}{
		{[]testKey{first, second}, []string{"EdDSA", "ES256"}},
		{[]testKey{second}, []string{"ES256"}},
	} {
		must.NoError(t, os.WriteFile(path, publicPEM(t, version.keys...), 0o600))
		changed, err := keys.Reload()
		must.NoError(t, err)
		must.True(t, changed)
		must.Eq(t, version.want, accepted())
	}
}

func TestURLKeys(t *testing.T) {
	key := edKey(t, "a")
	answer := func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(jwks(t, key)) }
	authority := func(server *httptest.Server) string {
		path := filepath.Join(t.TempDir(), "ca.pem")
		block := &pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}
		must.NoError(t, os.WriteFile(path, pem.EncodeToMemory(block), 0o600))
		return path
	}
	t.Run("are_read_over_TLS", func(t *testing.T) {
		server := httptest.NewTLSServer(http.HandlerFunc(answer))
		defer server.Close()
		keys, err := URLKeys(server.URL, authority(server), hclog.NewNullLogger())
		must.NoError(t, err)
		run(t, keys)
		jwts := newJWTs([]JWT{{
			Name: "x", Keys: keys, Audiences: []string{"bivouac.io"}, Algorithms: []string{"EdDSA"}, NameClaim: "sub",
		}})
		_, err = jwts.authenticate(t.Context(), key.token(t, workload()))
		must.NoError(t, err)
	})
	t.Run("are_not_read_from_a_server_that_the_authority_does_not_know", func(t *testing.T) {
		server := httptest.NewUnstartedServer(http.HandlerFunc(answer))
		server.Config.ErrorLog = hclog.NewNullLogger().StandardLogger(nil)
		server.StartTLS()
		defer server.Close()
		_, err := download(t.Context(), server.URL, "")
		must.ErrorContains(t, err, "certificate signed by unknown authority")
	})
	for _, c := range []struct {
		name   string
		answer http.HandlerFunc
		says   string
	}{
		{"with_another_status", http.NotFound, "404 Not Found"},
		{"from_a_redirect", func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/" {
				http.Redirect(w, r, "/moved", http.StatusFound)
				return
			}
			answer(w, r)
		}, "302 Found"},
		{"without_end", func(w http.ResponseWriter, _ *http.Request) {
			for chunk := bytes.Repeat([]byte(" "), 1<<16); ; {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		}, "longer than 1048576 bytes"},
	} {
		t.Run("are_not_read_"+c.name, func(t *testing.T) {
			server := httptest.NewServer(c.answer)
			defer server.Close()
			_, err := download(t.Context(), server.URL, "")
			must.ErrorContains(t, err, c.says)
		})
	}
	t.Run("tell_nobody_the_password_in_their_URL", func(t *testing.T) {
		server := httptest.NewServer(http.NotFoundHandler())
		address := strings.Replace(server.URL, "http://", "http://user:s3cret@", 1)
		keys, err := URLKeys(address, "", hclog.NewNullLogger())
		must.NoError(t, err)
		for range 2 { // it answers 404, and then it is gone
			_, err = keys.Reload()
			must.Error(t, err)
			must.StrNotContains(t, err.Error(), "s3cret")
			must.StrNotContains(t, keys.Health(t.Context()).Error(), "s3cret")
			server.Close()
		}
	})
	t.Run("need_an_authority_that_can_be_read", func(t *testing.T) {
		_, err := URLKeys("https://127.0.0.1", "missing.pem", hclog.NewNullLogger())
		must.ErrorIs(t, err, os.ErrNotExist)
	})
}

func TestParseJWKS(t *testing.T) {
	const ed = `{"kty":"OKP","crv":"Ed25519","kid":"ed","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"`
	for _, c := range []struct {
		name, document string
		keys           int
		says           string
	}{
		{"a key", `{"keys":[` + ed + `}]}`, 1, ""},
		{"no key", `{"keys":[]}`, 0, ""},
		{"a key and what cannot be used", `{"keys":[` + ed + `},{"kty":"new"},{"kty":"oct","k":"AAAA"},` + ed + `,"use":"enc"}]}`, 1, ""},
		{"a shared secret", `{"keys":[{"kty":"oct","k":"AAAA"}]}`, 0, "no public key of type RSA, ECDSA or Ed25519"},
		{"a private key", `{"keys":[` + ed + `,"d":"nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A"}]}`, 0, "no public key of type RSA, ECDSA or Ed25519"},
		{"a key for encryption", `{"keys":[` + ed + `,"use":"enc"}]}`, 0, `for use "enc"`},
		{"a key of which everybody can make signatures", `{"keys":[{"kty":"OKP","crv":"Ed25519","x":"` + encode(string(make([]byte, 32))) + `"}]}`, 0, "low-order point"},
		{"an RSA key that is too short", `{"keys":[{"kty":"RSA","e":"AQAB","n":"` + encode(strings.Repeat("\xff", 128)) + `"}]}`, 0, "an RSA key has 1024 bits"},
		{"an RSA key that is too long", `{"keys":[{"kty":"RSA","e":"AQAB","n":"` + encode(strings.Repeat("\xff", 2048)) + `"}]}`, 0, "unsupported"},
		{"too many keys", `{"keys":[` + strings.Repeat("1,", 64) + `1]}`, 0, "it has 65 keys, more than 64"},
		{"no JSON", `<html>`, 0, "not a JSON Web Key Set"},
		{"other JSON", `{"error":"x"}`, 0, "it has no keys"},
	} {
		t.Run(c.name, func(t *testing.T) {
			keys, err := parseJWKS([]byte(c.document))
			if c.says != "" {
				must.ErrorContains(t, err, c.says)
				return
			}
			must.NoError(t, err)
			must.Len(t, c.keys, keys)
		})
	}
}

func TestParsePEM(t *testing.T) {
	key := ecKey(t, "")
	private, err := x509.MarshalPKCS8PrivateKey(key.private)
	must.NoError(t, err)
	asPEM := func(kind string, der []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	}
	for _, c := range []struct {
		name     string
		document []byte
		keys     int
		says     string
	}{
		{"two keys", publicPEM(t, key, edKey(t, "")), 2, ""},
		{"a key with text around it", append([]byte("text\n"), publicPEM(t, key)...), 1, ""},
		{"nothing", nil, 0, "no public key"},
		{"a private key", asPEM("PRIVATE KEY", private), 0, `a block "PRIVATE KEY"`},
		{"half a key", publicPEM(t, key)[:100], 0, "ends within a block"},
		{"a damaged key", asPEM("PUBLIC KEY", []byte("x")), 0, "asn1"},
		{"too many keys", bytes.Repeat(publicPEM(t, key), 65), 0, "more than 64 keys"},
	} {
		t.Run(c.name, func(t *testing.T) {
			keys, err := parsePEM(c.document)
			if c.says != "" {
				must.ErrorContains(t, err, c.says)
				return
			}
			must.NoError(t, err)
			must.Len(t, c.keys, keys)
		})
	}
}

func BenchmarkAuthenticateJWT(b *testing.B) {
	rsa, ec := rsaKey(b, "rsa"), ecKey(b, "ec")
	a := New(make([]Token, 10), []JWT{{
		Name: "nomad", Keys: fixed(b, rsa, ec), Audiences: []string{"bivouac.io"}, Algorithms: []string{"RS256", "ES256"}, NameClaim: "sub",
		BoundClaims: map[string][]string{"nomad_namespace": {"chat"}, "nomad_job_id": {"support-*"}},
	}})
	good := rsa.token(b, workload())
	for _, c := range []struct {
		name, token string
		forget      bool
		ok          bool
	}{
		{"again", good, false, true},
		{"first_RS256", good, true, true},
		{"first_ES256", ec.token(b, workload()), true, true},
		{"wrong_signature", change(b, good, 1, "support-bot", "support-bat"), false, false},
		{"unknown_key", change(b, good, 0, `"rsa"`, `"x"`), false, false},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if c.forget {
					clear(a.jwts.cache.entries)
				}
				if _, err := a.Authenticate(b.Context(), c.token, "192.0.2.1:1"); (err == nil) != c.ok {
					b.Fatal(err)
				}
			}
		})
	}
}
