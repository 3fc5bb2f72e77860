package config

import (
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"

	"github.com/bivouac/bivouac/internal/auth"
)

const (
	maxJWTs   = 32          // jwt blocks
	maxLeeway = time.Minute // of a jwt block
)

// JWT is a block jwt: callers with tokens of one issuer. Exactly one of Nomad, JWKSURL and
// PublicKeysFile is set.
type JWT struct {
	Name           string
	Nomad          bool
	JWKSURL        string
	JWKSCAFile     string
	PublicKeysFile string
	Issuer         string
	Audiences      []string
	BoundClaims    map[string][]string
	Algorithms     []string
	Leeway         time.Duration
	NameClaim      string
	Policies       []string
}

// defaultJWT returns a block that sets nothing.
func defaultJWT() JWT {
	return JWT{Algorithms: []string{"RS256"}, Leeway: 10 * time.Second, NameClaim: "sub"}
}

func jwtKeys(j *JWT) []key {
	return []key{
		{name: "nomad", target: &j.Nomad, usage: "The tokens are workload identities, signed by the Nomad of the nomad block. Exactly one of nomad, jwks_url and public_keys_file must be set."},
		{name: "jwks_url", target: &j.JWKSURL, usage: "`URL` of the issuer's public keys, as a JSON Web Key Set. Must be https, or http on a loopback address. Read every 5 minutes, and for an unknown key ID."},
		{name: "jwks_ca_file", target: &j.JWKSCAFile, usage: "PEM `FILE` with the certificate authorities of jwks_url. (default those of the system)"},
		{name: "public_keys_file", target: &j.PublicKeysFile, usage: "PEM `FILE` with the issuer's public keys or certificates. Read again when it changes."},
		{name: "issuer", target: &j.Issuer, usage: "The tokens' iss claim. Required, except with nomad: without it iss is not checked, because Nomad sets none by default."},
		{name: "audiences", target: &j.Audiences, usage: "Accepted audiences; a token needs one of them in its aud claim. Required."},
		{name: "bound_claims", target: &j.BoundClaims, usage: "Patterns for claims, such as { nomad_namespace = [\"chat\"], nomad_job_id = [\"support-*\"] }. Each claim must match one of its patterns, as a whole; a * stands for any text. Must have nomad_namespace with nomad."},
		{name: "algorithms", target: &j.Algorithms, usage: "Accepted signature algorithms, of " + strings.Join(auth.Algorithms(), ", ") + ". (default `RS256`)"},
		{name: "leeway", target: &j.Leeway, usage: "`DURATION` by which the clocks of issuer and server may differ, at most 1m."},
		{name: "name_claim", target: &j.NameClaim, usage: "The claim with the caller's name, which owns its sessions."},
		{name: "policies", target: &j.Policies, usage: "`NAMES` of the policies that the callers have."},
	}
}

func (c *Config) decodeJWT(block *hcl.Block) hcl.Diagnostics {
	j := defaultJWT()
	j.Name = block.Labels[0]
	diags := c.decodeKeys(block.Body, hcl.BodySchema{}, "jwt."+j.Name+".", jwtKeys(&j), nil)
	c.JWTs = append(c.JWTs, j)
	return diags
}

func (c *Config) checkJWTs(refuse func(name, format string, args ...any)) {
	if len(c.JWTs) > maxJWTs {
		refuse("jwt."+c.JWTs[maxJWTs].Name, "there are more than %d jwt blocks", maxJWTs)
	}
	for _, j := range c.JWTs {
		name := "jwt." + j.Name
		j.check(func(key, format string, args ...any) {
			if c.origins[name+"."+key] != "" {
				refuse(name+"."+key, format, args...)
			} else {
				refuse(name, format, args...)
			}
		})
		c.checkPolicies(j.Policies, name+".policies", refuse)
	}
}

// check refuses what is wrong in the block. key is the key to blame.
func (j JWT) check(refuse func(key, format string, args ...any)) {
	if err := CheckCallerName(j.Name); err != nil {
		refuse("", "%w", err)
	}
	j.checkKeys(refuse)
	switch {
	case len(j.Audiences) == 0 || slices.Contains(j.Audiences, ""):
		refuse("audiences", "audiences must have at least one name, and no empty one")
	case j.Nomad && slices.Contains(j.Audiences, "nomadproject.io"):
		refuse("audiences", "every task in Nomad has a token for the audience nomadproject.io, which does not expire; use another audience, and an identity block for it in the jobs of your callers")
	}
	j.checkBoundClaims(refuse)
	if len(j.Algorithms) == 0 {
		refuse("algorithms", "algorithms must not be empty")
	}
	for _, algorithm := range j.Algorithms {
		if !slices.Contains(auth.Algorithms(), algorithm) {
			refuse("algorithms", "algorithm %q is not allowed (available: %s)", algorithm, strings.Join(auth.Algorithms(), ", "))
		}
	}
	if j.Leeway < 0 || j.Leeway > maxLeeway {
		refuse("leeway", "%s is not between 0s and %s", j.Leeway, maxLeeway)
	}
	if j.NameClaim == "" {
		refuse("name_claim", "name_claim must not be empty")
	}
}

func (j JWT) checkKeys(refuse func(key, format string, args ...any)) {
	sources := 0
	for _, set := range []bool{j.Nomad, j.JWKSURL != "", j.PublicKeysFile != ""} {
		if set {
			sources++
		}
	}
	if sources != 1 {
		refuse("", "exactly one of nomad = true, jwks_url and public_keys_file must be set")
	}
	if j.JWKSURL != "" && !isKeyURL(j.JWKSURL) {
		refuse("jwks_url", "%q is not an https URL, nor an http URL on a loopback address", withoutPassword(j.JWKSURL))
	}
	if j.JWKSCAFile != "" && j.JWKSURL == "" {
		refuse("jwks_ca_file", "jwks_ca_file requires jwks_url")
	}
	if j.Issuer == "" && !j.Nomad {
		refuse("issuer", "issuer is required")
	}
}

func (j JWT) checkBoundClaims(refuse func(key, format string, args ...any)) {
	if j.Nomad && j.BoundClaims["nomad_namespace"] == nil {
		refuse("bound_claims", "bound_claims must have nomad_namespace: anyone who may submit a job to any namespace chooses the audience of its tokens, so the audience alone proves nothing")
	}
	for _, name := range slices.Sorted(maps.Keys(j.BoundClaims)) {
		if patterns := j.BoundClaims[name]; len(patterns) == 0 || slices.Contains(patterns, "") {
			refuse("bound_claims", "claim %q must have at least one pattern, and no empty one", name)
		}
	}
}

// isKeyURL refuses URLs whose answer somebody on the network could have changed.
func isKeyURL(text string) bool {
	u, err := url.Parse(text)
	if err != nil || u.Hostname() == "" || u.Fragment != "" {
		return false
	}
	if u.Scheme == "https" {
		return true
	}
	host := u.Hostname()
	ip, err := netip.ParseAddr(host)
	return u.Scheme == "http" && (host == "localhost" || err == nil && ip.IsLoopback())
}

// publicJWTs returns the blocks. They contain no secrets, but a URL could.
func (c *Config) publicJWTs() map[string]any {
	public := map[string]any{}
	for _, j := range c.JWTs {
		j.JWKSURL = withoutPassword(j.JWKSURL)
		public[j.Name] = shownAll(jwtKeys(&j))
	}
	return public
}
