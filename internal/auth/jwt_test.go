package auth

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

// TestJWT says which tokens are accepted. There are two issuers: Nomad, whose tokens have
// no claim iss, and another one.
func TestJWT(t *testing.T) {
	key, second, third := rsaKey(t, "rsa"), ecKey(t, "ec"), edKey(t, "ed")
	otherKey, stranger := rsaKey(t, "other"), rsaKey(t, "rsa")
	nomad := JWT{
		Name: "nomad", Keys: fixed(t, key, second, third), Audiences: []string{"bivouac.io", "bivouac.example"},
		BoundClaims: map[string][]string{"nomad_namespace": {"chat", "chat-*"}, "nomad_job_id": {"support-*"}},
		Algorithms:  []string{"RS256", "ES256", "EdDSA"}, NameClaim: "sub", Leeway: 10 * time.Second,
		Policies: []*scheduler.Policy{{Name: "support"}},
	}
	other := JWT{
		Name: "other", Keys: fixed(t, otherKey), Issuer: "https://other.example", Audiences: []string{"bivouac.io"},
		Algorithms: []string{"RS256"}, NameClaim: "email", Policies: []*scheduler.Policy{{Name: "other"}},
	}
	jwts := newJWTs([]JWT{nomad, other})

	claims := workload()
	text := func(claims map[string]any) string {
		payload, err := json.Marshal(claims)
		must.NoError(t, err)
		return string(payload)
	}
	good := key.token(t, claims)
	now := time.Now().Unix()
	as := func(name string, value any) string { return key.token(t, with(claims, name, value)) }
	headed := func(header string) string { return key.sign(t, header, text(claims)) }
	// raw adds text to the payload.
	raw := func(more string) string {
		return key.sign(t, key.header(), strings.TrimSuffix(text(claims), "}")+","+more+"}")
	}
	public, err := x509.MarshalPKIXPublicKey(key.private.Public())
	must.NoError(t, err)
	asPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})
	embedded, err := json.Marshal(jose.JSONWebKey{Key: stranger.private.Public(), KeyID: "rsa", Algorithm: "RS256"})
	must.NoError(t, err)
	cut := func(token string, bytes int) string {
		parts := strings.Split(token, ".")
		signature, err := base64.RawURLEncoding.DecodeString(parts[2])
		must.NoError(t, err)
		return parts[0] + "." + parts[1] + "." + encode(string(signature[:len(signature)-bytes]))
	}
	otherClaims := map[string]any{"iss": "https://other.example", "aud": "bivouac.io", "exp": now + 60, "email": "a@other.example"}

	const (
		wrongSignature = "signature is wrong"
		unknownKey     = "key is unknown"
		algorithm      = "not signed with an allowed algorithm"
		notCompact     = "not a signed token in compact form"
		notObject      = "is not a JSON object with distinct names"
		notBase64      = "is not base64url"
		wrongAudience  = "audience must be one of"
		wrongTime      = "must be a time in seconds"
		wrongNamespace = "claim nomad_namespace does not match"
		wrongJob       = "claim nomad_job_id does not match"
		wrongName      = "because it is the caller's name"
	)
	for _, c := range []struct{ name, token, refused string }{
		// Accepted.
		{"a workload identity", good, ""},
		{"signed with ECDSA", second.token(t, claims), ""},
		{"signed with Ed25519", third.token(t, claims), ""},
		{"the audience in a list", as("aud", []string{"x", "bivouac.example"}), ""},
		{"expired within the leeway", as("exp", now-5), ""},
		{"begins within the leeway", as("nbf", now+5), ""},
		{"without nbf, iat and jti", key.token(t, with(with(with(claims, "nbf", nil), "iat", nil), "jti", nil)), ""},
		{"a bound claim that is a list", as("nomad_namespace", []any{1, "chat"}), ""},
		{"a bound claim that matches a pattern", as("nomad_namespace", "chat-test"), ""},
		{"claims that nobody asked for", raw(`"SUB":"x","a":{"b":[null,true]}`), ""},
		{"the other issuer's", otherKey.token(t, otherClaims), ""},
		{"a key ID that is missing, where there is one key", otherKey.sign(t, `{"alg":"RS256"}`, text(otherClaims)), ""},

		// The algorithm.
		{"alg none", encode(`{"alg":"none","kid":"rsa"}`) + "." + encode(text(claims)) + ".", algorithm},
		{"alg None", encode(`{"alg":"None","kid":"rsa"}`) + "." + encode(text(claims)) + ".", algorithm},
		{"alg NONE with the old signature", change(t, good, 0, "RS256", "NONE"), algorithm},
		{"alg nOnE", change(t, good, 0, "RS256", "nOnE"), algorithm},
		{"alg empty", change(t, good, 0, "RS256", ""), algorithm},
		{"alg in other case", headed(`{"alg":"rs256","kid":"rsa"}`), algorithm},
		{"alg missing", headed(`{"kid":"rsa"}`), algorithm},
		{"alg null", headed(`{"alg":null,"kid":"rsa"}`), algorithm},
		{"alg a list", headed(`{"alg":["RS256"],"kid":"rsa"}`), algorithm},
		{"alg under another name", headed(`{"ALG":"RS256","kid":"rsa"}`), algorithm},
		{"HS256 with the public key in PEM as the secret", hs256(asPEM, `{"alg":"HS256","kid":"rsa"}`, text(claims)), algorithm},
		{"HS256 with the public key in DER as the secret", hs256(public, `{"alg":"HS256","kid":"rsa"}`, text(claims)), algorithm},
		{"RS256 said of an HMAC", hs256(asPEM, key.header(), text(claims)), wrongSignature},
		{"an algorithm that is not configured", headed(`{"alg":"PS256","kid":"rsa"}`), "algorithm must be one of RS256, ES256, EdDSA"},
		{"ES256 for an RSA key", headed(`{"alg":"ES256","kid":"rsa"}`), wrongSignature},
		{"RS256 for an Ed25519 key", third.sign(t, `{"alg":"RS256","kid":"ed"}`, text(claims)), wrongSignature},

		// The key.
		{"a foreign key ID", key.sign(t, `{"alg":"RS256","kid":"foreign"}`, text(claims)), unknownKey},
		{"a foreign key under a known ID", stranger.token(t, claims), wrongSignature},
		{"the other issuer's key", otherKey.token(t, claims), unknownKey},
		{"the other issuer's key under a known ID", otherKey.sign(t, key.header(), text(claims)), wrongSignature},
		{"Nomad's key with the other's claims", key.token(t, otherClaims), unknownKey},
		{"a key ID in other case", headed(`{"alg":"RS256","kid":"RSA"}`), unknownKey},
		{"a key ID that only looks alike", headed(`{"alg":"RS256","kid":"rѕa"}`), unknownKey},
		{"a key ID that is missing, where there are several", headed(`{"alg":"RS256"}`), "must name its key"},
		{"a key ID that is a number", headed(`{"alg":"RS256","kid":1}`), "kid that is not a string"},
		{"a key ID that is null", headed(`{"alg":"RS256","kid":null}`), "kid that is not a string"},
		{"a key in the header", stranger.sign(t, `{"alg":"RS256","kid":"rsa","jwk":`+string(embedded)+`}`, text(claims)), "must not have jwk"},
		{"a key at a URL", headed(`{"alg":"RS256","kid":"rsa","jku":"https://evil.example"}`), "must not have jku"},
		{"a certificate at a URL", headed(`{"alg":"RS256","kid":"rsa","x5u":"https://evil.example"}`), "must not have x5u"},
		{"a certificate in the header", headed(`{"alg":"RS256","kid":"rsa","x5c":[]}`), "must not have x5c"},
		{"a critical header", headed(`{"alg":"RS256","kid":"rsa","crit":["exp"],"exp":1}`), "must not have crit"},
		{"a payload that is not encoded", headed(`{"alg":"RS256","kid":"rsa","b64":false}`), "must not have b64"},

		// The signature.
		{"no signature", strings.TrimSuffix(good, good[strings.LastIndex(good, ".")+1:]), wrongSignature},
		{"the signature of other claims", change(t, good, 1, "support-bot", "support-bat"), wrongSignature},
		{"the signature of another header", change(t, good, 0, `"typ":"JWT"`, `"typ":"JWS"`), wrongSignature},
		{"an ECDSA signature that is too short", cut(second.token(t, claims), 1), wrongSignature},
		{"an ECDSA signature that is too long", second.token(t, claims) + "AAAA", wrongSignature},
		{"an ECDSA signature of zeros", cutSignature(second.token(t, claims)) + encode(string(make([]byte, 64))), wrongSignature},
		{"an ECDSA signature in DER", cutSignature(second.token(t, claims)) + encode("\x30\x06\x02\x01\x01\x02\x01\x01"), wrongSignature},
		{"an RSA signature plus the modulus", longer(t, good, key), wrongSignature},

		// The audience.
		{"another audience", as("aud", "nomadproject.io"), wrongAudience},
		{"other audiences", as("aud", []string{"nomadproject.io", "consul.io"}), wrongAudience},
		{"no audience", as("aud", nil), wrongAudience},
		{"no audience in the list", as("aud", []string{}), wrongAudience},
		{"an empty audience", as("aud", ""), wrongAudience},
		{"an audience in a list in a list", as("aud", []any{[]any{"bivouac.io"}}), wrongAudience},
		{"an audience in an object", as("aud", map[string]any{"bivouac.io": "bivouac.io"}), wrongAudience},
		{"an audience with more text", as("aud", "bivouac.io.evil.example"), wrongAudience},
		{"two audiences in a string", as("aud", "bivouac.io evil.example"), wrongAudience},
		{"an audience in other case", as("aud", "Bivouac.io"), wrongAudience},
		{"an audience that only looks alike", as("aud", "bivоuac.io"), wrongAudience},

		// The time.
		{"expired", as("exp", now-60), "has expired"},
		{"expired in 1970", as("exp", 0), "has expired"},
		{"without exp", as("exp", nil), "no claim exp"},
		{"exp null", as("exp", json.RawMessage("null")), wrongTime},
		{"exp a string", as("exp", fmt.Sprint(now+3600)), wrongTime},
		{"exp a list", as("exp", []any{now + 3600}), wrongTime},
		{"exp huge", as("exp", 1e18), wrongTime},
		{"exp negative", as("exp", -1), wrongTime},
		{"exp no finite number", key.sign(t, key.header(), strings.Replace(text(claims), `"exp":`, `"exp":1e999,"x":`, 1)), notObject},
		{"nbf in the future", as("nbf", now+60), "not valid yet"},
		{"nbf a string", as("nbf", "0"), wrongTime},

		// What the job's author cannot choose.
		{"another namespace", as("nomad_namespace", "default"), wrongNamespace},
		{"no namespace", as("nomad_namespace", nil), wrongNamespace},
		{"a namespace in other case", as("nomad_namespace", "Chat"), wrongNamespace},
		{"a namespace that only looks alike", as("nomad_namespace", "сhat"), wrongNamespace},
		{"a namespace with a space", as("nomad_namespace", "chat "), wrongNamespace},
		{"a namespace that contains the right one", as("nomad_namespace", "xchat-1"), wrongNamespace},
		{"a namespace that is true", as("nomad_namespace", true), wrongNamespace},
		{"a namespace in an object", as("nomad_namespace", map[string]any{"chat": "chat"}), wrongNamespace},
		{"a claim whose name has other case", key.token(t, with(with(claims, "nomad_namespace", nil), "Nomad_Namespace", "chat")), wrongNamespace},
		{"a claim whose name only looks alike", key.token(t, with(with(claims, "nomad_namespace", nil), "nomad_namespacе", "chat")), wrongNamespace},
		{"another job", as("nomad_job_id", "sales-bot"), wrongJob},
		{"a job whose ID is a number", as("nomad_job_id", 1), wrongJob},
		{"a job whose ID has the pattern inside", as("nomad_job_id", "x-support-bot"), wrongJob},

		// The name.
		{"no subject", as("sub", nil), wrongName},
		{"an empty subject", as("sub", ""), wrongName},
		{"a subject that is a number", as("sub", 1), wrongName},
		{"a subject that is too long", as("sub", strings.Repeat("a", 257)), wrongName},
		{"a subject with a line end", as("sub", "a\nb"), wrongName},
		{"a subject written from right to left", as("sub", "a\u202eb"), wrongName},
		{"a subject that is not Unicode", key.sign(t, key.header(), strings.Replace(text(claims), `"sub":"`, `"sub":"\ud800`, 1)), wrongName},
		{"a subject that is the server's own name", as("sub", "bivouac"), "reserved name"},
		{"a subject that is the name of nobody", as("sub", "anonymous"), "reserved name"},
		{"an ID that is a number", as("jti", 1), "claim jti must be"},

		// The form.
		{"a claim twice", raw(`"nomad_namespace":"chat"`), notObject},
		{"a claim twice, once escaped", raw(`"nomad\u005fnamespace":"chat"`), notObject},
		{"a name twice in an object in a claim", raw(`"a":{"b":1,"b":2}`), notObject},
		{"a header field twice", headed(`{"alg":"RS256","alg":"none","kid":"rsa"}`), notObject},
		{"a payload that is a list", key.sign(t, key.header(), `[]`), notObject},
		{"a payload that is null", key.sign(t, key.header(), `null`), notObject},
		{"a payload that is empty", key.sign(t, key.header(), ``), notObject},
		{"two payloads", key.sign(t, key.header(), text(claims)+text(claims)), notObject},
		{"a payload that is not UTF-8", raw(`"x":"` + "\xff" + `"`), notObject},
		{"a payload of many brackets", key.sign(t, key.header(), strings.Repeat("[", 4000)), notObject},
		{"a header that is not JSON", key.sign(t, `alg=RS256`, text(claims)), notObject},
		{"with padding", good + "==", notBase64},
		{"with a line end", good + "\n", notBase64},
		{"with a line end inside", good[:10] + "\r\n" + good[10:], notBase64},
		{"in the other base64", strings.Replace(good, ".", "+.", 1), notBase64},
		{"with unused bits", lastBit(good), notBase64},
		{"with a space before", " " + good, notBase64},
		{"a fourth part", good + ".", notCompact},
		{"two parts", good[:strings.LastIndex(good, ".")], notCompact},
		{"no token", "", notCompact},
		{"the JSON form", `{"payload":"` + encode(text(claims)) + `","signatures":[]}`, notCompact},
		{"encrypted", strings.Repeat("e30.", 4) + "e30", notCompact},
		{"encrypted with a password a million times", encode(`{"alg":"PBES2-HS512+A256KW","enc":"A256GCM","p2c":2147483647,"p2s":"AAAA","zip":"DEF"}`) + ".AAAA.AAAA.AAAA.AAAA", notCompact},
		{"too long", as("x", strings.Repeat("a", maxToken)), "longer than 8192 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			caller, err := jwts.authenticate(t.Context(), c.token)
			if c.refused == "" {
				must.NoError(t, err)
				must.NotEq(t, "", caller.Name)
				return
			}
			must.Eq(t, scheduler.Caller{}, caller)
			must.ErrorContains(t, err, c.refused)
			// Once more, in case that a refused token is remembered.
			_, err = jwts.authenticate(t.Context(), c.token)
			must.Error(t, err)
		})
	}
}

// cutSignature returns a token up to its signature.
func cutSignature(token string) string { return token[:strings.LastIndex(token, ".")+1] }

// longer returns a token with the same RSA signature as another number: the modulus is
// added to it.
func longer(t *testing.T, token string, key testKey) string {
	signature, err := base64.RawURLEncoding.DecodeString(token[strings.LastIndex(token, ".")+1:])
	must.NoError(t, err)
	public, ok := key.private.Public().(*rsa.PublicKey)
	must.True(t, ok)
	sum := new(big.Int).Add(new(big.Int).SetBytes(signature), public.N)
	return cutSignature(token) + encode(string(sum.Bytes()))
}

// lastBit returns a token with another last character that has the same bytes.
func lastBit(token string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := strings.IndexByte(alphabet, token[len(token)-1])
	return token[:len(token)-1] + string(alphabet[last^1])
}

func TestJWTCaller(t *testing.T) {
	key := edKey(t, "a")
	policies := []*scheduler.Policy{{Name: "support"}}
	const leeway = 10 * time.Second
	jwts := newJWTs([]JWT{{
		Name: "nomad", Keys: fixed(t, key), Audiences: []string{"bivouac.io"}, Algorithms: []string{"EdDSA"},
		NameClaim: "sub", Policies: policies, Leeway: leeway,
	}})
	claims := workload()
	token := key.token(t, claims)
	for range 2 { // verified, and remembered
		caller, err := jwts.authenticate(t.Context(), token)
		must.NoError(t, err)
		must.Eq(t, scheduler.Caller{
			Name: "global:chat:support-bot:bot:bot:bivouac", Method: "jwt/nomad", Accessor: "token-1", Policies: policies,
			Expires: time.Unix(claims["exp"].(int64), 0).Add(leeway),
		}, caller)
	}
}

func TestAuthenticateJWT(t *testing.T) {
	const address = "192.0.2.1:1234"
	key := edKey(t, "a")
	secret, sum := NewSecret()
	a := New([]Token{{Name: "static", SHA256: sum}}, []JWT{{
		Name: "nomad", Keys: fixed(t, key), Audiences: []string{"bivouac.io"}, Algorithms: []string{"EdDSA"}, NameClaim: "sub",
	}})
	good := key.token(t, workload())
	for range 100 {
		_, err := a.Authenticate(t.Context(), change(t, good, 1, "support-bot", "support-bat"), address)
		_, limited := errors.AsType[*scheduler.LimitError](err)
		must.True(t, limited || errors.Is(err, scheduler.ErrUnauthenticated))
	}
	_, err := a.Authenticate(t.Context(), "e30.e30.", address)
	_, limited := errors.AsType[*scheduler.LimitError](err)
	must.True(t, limited)
	_, err = a.Authenticate(t.Context(), "e30.e30.", "192.0.2.2:1")
	must.EqError(t, err, "no valid credentials: the token is refused: it is not signed with an allowed algorithm")

	// Good ones from the same address are accepted.
	caller, err := a.Authenticate(t.Context(), good, address)
	must.NoError(t, err)
	must.Eq(t, address, caller.Address)
	must.Eq(t, "jwt/nomad", caller.Method)
	caller, err = a.Authenticate(t.Context(), secret, address)
	must.NoError(t, err)
	must.Eq(t, "static", caller.Name)
	must.NoError(t, a.Health(t.Context()))
}

func TestAJWTWithoutPoliciesMayDoNothing(t *testing.T) {
	key := edKey(t, "a")
	jwts := newJWTs([]JWT{{
		Name: "nomad", Keys: fixed(t, key), Audiences: []string{"bivouac.io"}, Algorithms: []string{"EdDSA"}, NameClaim: "sub",
	}})
	caller, err := jwts.authenticate(t.Context(), key.token(t, workload()))
	must.NoError(t, err)
	must.False(t, caller.May(scheduler.CapRead, "support-1"))
}

func TestJWTOfSeveralBlocks(t *testing.T) {
	// Given three blocks for one issuer, of which the first wants another job.
	key := edKey(t, "a")
	keys := fixed(t, key)
	block := func(name, job string) JWT {
		return JWT{
			Name: name, Keys: keys, Audiences: []string{"bivouac.io"}, Algorithms: []string{"EdDSA"}, NameClaim: "sub",
			BoundClaims: map[string][]string{"nomad_job_id": {job}},
		}
	}
	jwts := newJWTs([]JWT{block("sales", "sales-*"), block("support", "support-*"), block("all", "*")})
	for job, want := range map[string]string{"sales-1": "jwt/sales", "support-1": "jwt/support", "x": "jwt/all"} {
		t.Run("the_first_that_accepts_"+job, func(t *testing.T) {
			caller, err := jwts.authenticate(t.Context(), key.token(t, with(workload(), "nomad_job_id", job)))
			must.NoError(t, err)
			must.Eq(t, want, caller.Method)
		})
	}
	t.Run("says_why_each_refuses", func(t *testing.T) {
		_, err := newJWTs([]JWT{block("sales", "sales-*"), block("support", "support-*")}).
			authenticate(t.Context(), key.token(t, with(workload(), "nomad_job_id", "x")))
		must.EqError(t, err, "jwt \"sales\": its claim nomad_job_id does not match; jwt \"support\": its claim nomad_job_id does not match")
	})
	t.Run("says_that_no_block_has_its_issuer", func(t *testing.T) {
		only := block("sales", "*")
		only.Issuer = "https://sales.example"
		_, err := newJWTs([]JWT{only}).authenticate(t.Context(), key.token(t, workload()))
		must.EqError(t, err, "its issuer is not configured")
	})
}

func TestJWTIsRememberedUntil(t *testing.T) {
	first, second := edKey(t, "a"), edKey(t, "b")
	start := func(t *testing.T) (*issuer, *jwts) {
		i := newIssuer(t, first)
		must.NoError(t, i.keys.reread(t.Context(), false))
		return i, newJWTs([]JWT{{
			Name: "x", Keys: i.keys, Audiences: []string{"bivouac.io"}, Algorithms: []string{"EdDSA"}, NameClaim: "sub", Leeway: time.Second,
		}})
	}
	t.Run("it_expires", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, jwts := start(t)
			token := first.token(t, workload())
			_, err := jwts.authenticate(t.Context(), token)
			must.NoError(t, err)
			must.MapLen(t, 1, jwts.cache.entries)
			time.Sleep(time.Hour + time.Second)
			_, err = jwts.authenticate(t.Context(), token)
			must.ErrorContains(t, err, "has expired")
			must.MapEmpty(t, jwts.cache.entries)
		})
	})
	t.Run("its_key_is_withdrawn", func(t *testing.T) {
		i, jwts := start(t)
		token := first.token(t, workload())
		_, err := jwts.authenticate(t.Context(), token)
		must.NoError(t, err)
		i.set(t, second)
		must.NoError(t, i.keys.reread(t.Context(), false))
		i.keys.lastExtra = time.Now().Add(time.Hour) // nobody waits for Run
		_, err = jwts.authenticate(t.Context(), token)
		must.ErrorIs(t, err, errUnknownKey)
	})
	t.Run("many_others_came", func(t *testing.T) {
		_, jwts := start(t)
		for n := range maxVerified + 10 {
			jwts.cache.put([32]byte{byte(n), byte(n >> 8)}, verified{})
		}
		must.MapLen(t, maxVerified, jwts.cache.entries)
	})
}

func TestPattern(t *testing.T) {
	for _, c := range []struct {
		pattern, text string
		want          bool
	}{
		{"chat", "chat", true},
		{"chat", "chats", false},
		{"chat", "Chat", false},
		{"", "", true},
		{"", "a", false},
		{"*", "", true},
		{"*", "anything/at:all", true},
		{"support-*", "support-", true},
		{"support-*", "support-bot", true},
		{"support-*", "xsupport-bot", false},
		{"*-bot", "support-bot", true},
		{"*-bot", "support-bots", false},
		{"a*b*c", "abc", true},
		{"a*b*c", "a-b-b-c", true},
		{"a*b*c", "acb", false},
		{"a*a", "a", false},
		{"a*a", "aa", true},
		{"a**b", "ab", true},
		{"a?c", "abc", false},
		{"a?c", "a?c", true},
		{"[ab]", "a", false},
		{".*", "x", false},
	} {
		t.Run(fmt.Sprintf("%q_and_%q", c.pattern, c.text), func(t *testing.T) {
			must.Eq(t, c.want, matchesText(c.text, c.pattern))
		})
	}
}
