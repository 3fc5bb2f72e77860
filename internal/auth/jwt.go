package auth

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/bivouac/bivouac/scheduler"
)

// maxName is the maximum length of a caller's name and of a token's ID, in bytes.
const maxName = 256

// Algorithms returns the signature algorithms that a [JWT] may list. None of them is
// symmetric, because a symmetric key that verifies tokens can also sign them.
func Algorithms() []string {
	return []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
}

// JWT describes which tokens of an issuer are accepted, and what their bearers may do.
type JWT struct {
	Name   string
	Keys   *Keys
	Issuer string // what the claim iss must be; empty: anything
	// Audiences are the accepted audiences. A token needs one of them.
	Audiences []string
	// BoundClaims has patterns for claims. Each of these claims must match one of its
	// patterns: if it is a string, the string; if it is a list, one of the list's strings.
	// A "*" in a pattern stands for any text, or none.
	BoundClaims map[string][]string
	Algorithms  []string // some of [Algorithms]
	// Leeway is how far the clocks of the issuer and this server may differ.
	Leeway    time.Duration
	NameClaim string // the claim with the caller's name
	Policies  []*scheduler.Policy
}

// jwts verifies signed tokens in compact form (JWT, RFC 7519).
type jwts struct {
	all   []JWT
	cache cache
}

func newJWTs(all []JWT) *jwts {
	return &jwts{all: all, cache: cache{entries: map[[sha256.Size]byte]verified{}}}
}

// has reports whether there are issuers, and a credential looks like a signed token: it has
// three parts. An encrypted one has five.
func (j *jwts) has(credential string) bool {
	return len(j.all) > 0 && strings.Count(credential, ".") == 2
}

func (j *jwts) health(ctx context.Context) error {
	var errs []error
	for i := range j.all {
		if err := j.all[i].Keys.Health(ctx); err != nil {
			errs = append(errs, fmt.Errorf("jwt %q: %w", j.all[i].Name, err))
		}
	}
	return errors.Join(errs...)
}

// errUnknownKey is returned for a token whose key ID is not among the issuer's keys.
var errUnknownKey = errors.New("its key is unknown")

// authenticate returns who sent a token. If the token may be from several issuers, the
// first one that accepts it decides. A token that was accepted is not verified again until
// it expires or its issuer's keys change.
//
// If the token's key is unknown, authenticate waits up to 5 s for the issuer's keys. The
// error says why the token is refused, and contains nothing of the token.
func (j *jwts) authenticate(ctx context.Context, text string) (scheduler.Caller, error) {
	if len(text) > maxToken {
		return scheduler.Caller{}, fmt.Errorf("it is longer than %d bytes", maxToken)
	}
	digest := sha256.Sum256([]byte(text))
	if caller, ok := j.cache.get(digest); ok {
		return caller, nil
	}
	t, err := parseToken(text)
	if err != nil {
		return scheduler.Caller{}, err
	}
	v, err := j.verify(ctx, t)
	if err != nil {
		return scheduler.Caller{}, err
	}
	j.cache.put(digest, v)
	return v.caller, nil
}

// verify first tries the keys that are known. So a token with a known key never waits.
func (j *jwts) verify(ctx context.Context, t *token) (verified, error) {
	type lookup struct {
		jwt  *JWT
		seen *keySet
	}
	var unknown []lookup
	var errs []error
	for i := range j.all {
		jwt := &j.all[i]
		if jwt.Issuer != "" && jwt.Issuer != t.claims["iss"] {
			continue
		}
		v, err := jwt.verify(t)
		switch {
		case err == nil:
			return v, nil
		case errors.Is(err, errUnknownKey):
			unknown = append(unknown, lookup{jwt, v.set})
		default:
			errs = append(errs, fmt.Errorf("jwt %q: %w", jwt.Name, err))
		}
	}
	ctx, cancel := context.WithTimeout(ctx, readLimit)
	defer cancel()
	for _, u := range unknown {
		err := u.jwt.Keys.refresh(ctx, u.seen)
		if err == nil {
			var v verified
			if v, err = u.jwt.verify(t); err == nil {
				return v, nil
			}
		} else {
			err = fmt.Errorf("%w: %w", errUnknownKey, err)
		}
		errs = append(errs, fmt.Errorf("jwt %q: %w", u.jwt.Name, err))
	}
	if len(errs) == 0 {
		return verified{}, errors.New("its issuer is not configured")
	}
	err := errs[0]
	for _, next := range errs[1:] {
		err = fmt.Errorf("%w; %w", err, next)
	}
	return verified{}, err
}

// verify returns who sent the token, if j accepts it. The result has j's key set even if
// it does not.
func (j *JWT) verify(t *token) (v verified, err error) {
	v.keys, v.set = j.Keys, j.Keys.current.Load()
	if !slices.Contains(j.Algorithms, string(t.algorithm)) {
		return v, fmt.Errorf("its algorithm must be one of %s", strings.Join(j.Algorithms, ", "))
	}
	keys, known := v.set.find(t.keyID, t.algorithm)
	switch {
	case !known && t.keyID == "" && v.set.len() > 1:
		return v, errors.New("it must name its key, because the issuer has several")
	case !known:
		return v, errUnknownKey
	case !slices.ContainsFunc(keys, t.signedWith):
		return v, errors.New("its signature is wrong")
	}
	until, err := j.checkTimes(t.claims, time.Now())
	if err != nil {
		return v, err
	}
	if !slices.ContainsFunc(j.Audiences, func(audience string) bool { return contains(t.claims["aud"], audience) }) {
		return v, fmt.Errorf("its audience must be one of %s", strings.Join(j.Audiences, ", "))
	}
	for _, name := range slices.Sorted(maps.Keys(j.BoundClaims)) {
		if !slices.ContainsFunc(j.BoundClaims[name], func(pattern string) bool { return matches(t.claims[name], pattern) }) {
			return v, fmt.Errorf("its claim %s does not match", name)
		}
	}
	v.caller, err = j.caller(t.claims)
	v.caller.Expires = until
	return v, err
}

// checkTimes returns when the token expires.
func (j *JWT) checkTimes(claims map[string]any, now time.Time) (until time.Time, err error) {
	expires, ok := claims["exp"]
	if !ok {
		return time.Time{}, errors.New("it has no claim exp; only tokens that expire are accepted")
	}
	end, err := timeOf("exp", expires)
	if err != nil {
		return time.Time{}, err
	}
	if until = end.Add(j.Leeway); !now.Before(until) {
		return time.Time{}, errors.New("it has expired")
	}
	if begins, ok := claims["nbf"]; ok {
		begin, err := timeOf("nbf", begins)
		if err != nil {
			return time.Time{}, err
		}
		if now.Add(j.Leeway).Before(begin) {
			return time.Time{}, errors.New("it is not valid yet")
		}
	}
	return until, nil
}

// timeOf returns a claim as a time. It refuses what is not a number of seconds until the
// year 9999.
func timeOf(name string, claim any) (time.Time, error) {
	const last = 253402300799
	seconds, ok := claim.(float64)
	if !ok || seconds < 0 || seconds > last {
		return time.Time{}, fmt.Errorf("its claim %s must be a time in seconds", name)
	}
	return time.Unix(int64(seconds), 0), nil
}

func (j *JWT) caller(claims map[string]any) (scheduler.Caller, error) {
	name, ok := claims[j.NameClaim].(string)
	if scheduler.IsReservedName(name) {
		return scheduler.Caller{}, fmt.Errorf("its claim %s is a reserved name", j.NameClaim)
	}
	if !ok || !isName(name) {
		return scheduler.Caller{}, fmt.Errorf("its claim %s must be 1 to %d bytes of printable text, because it is the caller's name", j.NameClaim, maxName)
	}
	id, ok := claims["jti"].(string)
	if _, has := claims["jti"]; has && (!ok || !isName(id)) {
		return scheduler.Caller{}, fmt.Errorf("its claim jti must be 1 to %d bytes of printable text", maxName)
	}
	policies := append([]*scheduler.Policy{}, j.Policies...) // not nil, which would allow everything
	return scheduler.Caller{Name: name, Method: "jwt/" + j.Name, Accessor: id, Policies: policies}, nil
}

// isName refuses what cannot be told apart in a log, such as control characters. A name
// that is too long is not cut, because two names could become one.
func isName(text string) bool {
	return text != "" && len(text) <= maxName && !strings.ContainsFunc(text, func(r rune) bool {
		return r == utf8.RuneError || !unicode.IsPrint(r)
	})
}

// contains reports whether a claim is a text, or a list with that text.
func contains(claim any, text string) bool {
	return anyOf(claim, func(s string) bool { return s == text })
}

// matches reports whether a claim is a text that matches the pattern, or a list with such a
// text.
func matches(claim any, pattern string) bool {
	return anyOf(claim, func(s string) bool { return matchesText(s, pattern) })
}

func anyOf(claim any, accept func(string) bool) bool {
	list, ok := claim.([]any)
	if !ok {
		list = []any{claim}
	}
	return slices.ContainsFunc(list, func(element any) bool {
		text, ok := element.(string)
		return ok && accept(text)
	})
}

// matchesText reports whether the whole text matches the pattern.
func matchesText(text, pattern string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return text == pattern
	}
	text, ok := strings.CutPrefix(text, parts[0])
	for _, part := range parts[1 : len(parts)-1] {
		var found bool
		_, text, found = strings.Cut(text, part)
		ok = ok && found
	}
	return ok && strings.HasSuffix(text, parts[len(parts)-1])
}
