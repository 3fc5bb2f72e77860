package config

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/shoenig/test/must"
)

const jwtPolicies = `
policy "support" {
  agent_prefix "support-" {
    capabilities = ["read"]
  }
}
policy "ops" {
  operator = "read"
}
`

func TestJWT(t *testing.T) {
	for name, text := range map[string]string{
		"a.hcl": jwtPolicies + `
jwt "nomad" {
  nomad        = true
  audiences    = ["bivouac.io"]
  bound_claims = { nomad_namespace = ["chat"], nomad_job_id = ["support-*", "sales"] }
  policies     = ["support"]
}
jwt "sso" {
  jwks_url     = "https://sso.example.org/keys"
  jwks_ca_file = "/etc/ca.pem"
  issuer       = "https://sso.example.org"
  audiences    = ["bivouac"]
  algorithms   = ["ES256", "EdDSA"]
  leeway       = "30s"
  name_claim   = "email"
  policies     = ["ops", "support"]
}
`,
		"a.json": `{"policy": {"support": {"agent_prefix": {"support-": {"capabilities": ["read"]}}}, "ops": {"operator": "read"}}, "jwt": {
  "nomad": {"nomad": true, "audiences": ["bivouac.io"], "policies": ["support"],
            "bound_claims": {"nomad_namespace": ["chat"], "nomad_job_id": ["support-*", "sales"]}},
  "sso":   {"jwks_url": "https://sso.example.org/keys", "jwks_ca_file": "/etc/ca.pem", "issuer": "https://sso.example.org",
            "audiences": ["bivouac"], "algorithms": ["ES256", "EdDSA"], "leeway": "30s", "name_claim": "email", "policies": ["ops", "support"]}}}`,
	} {
		t.Run(name, func(t *testing.T) {
			c, err := load(t, "-config", write(t, name, text))
			must.NoError(t, err)
			must.Eq(t, []JWT{{
				Name: "nomad", Nomad: true, Audiences: []string{"bivouac.io"}, Policies: []string{"support"},
				BoundClaims: map[string][]string{"nomad_namespace": {"chat"}, "nomad_job_id": {"support-*", "sales"}},
				Algorithms:  []string{"RS256"}, Leeway: 10 * time.Second, NameClaim: "sub",
			}, {
				Name: "sso", JWKSURL: "https://sso.example.org/keys", JWKSCAFile: "/etc/ca.pem", Issuer: "https://sso.example.org",
				Audiences: []string{"bivouac"}, Algorithms: []string{"ES256", "EdDSA"}, Leeway: 30 * time.Second, NameClaim: "email",
				Policies: []string{"ops", "support"},
			}}, c.JWTs)
			public, ok := c.Public()["jwt"].(map[string]any)
			must.True(t, ok)
			must.MapContainsKeys(t, public, []string{"nomad", "sso"})
		})
	}
}

func TestJWTThatIsRefused(t *testing.T) {
	const good = `issuer="x"
audiences=["bivouac.io"]
policies=["ops"]
`
	const nomad = `nomad=true
audiences=["bivouac.io"]
bound_claims={nomad_namespace=["chat"]}
policies=["ops"]
`
	without := func(text, key string) string {
		var kept []string
		for line := range strings.Lines(text) {
			if !strings.HasPrefix(line, key+"=") {
				kept = append(kept, line)
			}
		}
		return strings.Join(kept, "")
	}
	for _, c := range []struct{ name, block, says string }{
		{"no keys", good, "exactly one of nomad = true, jwks_url and public_keys_file must be set"},
		{"two kinds of keys", good + `public_keys_file="/k"` + "\n" + `jwks_url="https://x"`, "exactly one of nomad"},
		{"keys over http", good + `jwks_url="http://sso.example.org"`, `"http://sso.example.org" is not an https URL`},
		{"keys at no URL", good + `jwks_url="sso.example.org/keys"`, "is not an https URL"},
		{"a password in the URL", good + `jwks_url="ftp://a:secret@x/"`, `"ftp://a:xxxxx@x/"`},
		{"an authority without a URL", nomad + `jwks_ca_file="/ca"`, "jwks_ca_file requires jwks_url"},
		{"no issuer", without(good, "issuer") + `public_keys_file="/k"`, "issuer is required"},
		{"no audience", without(nomad, "audiences"), "audiences must have at least one name"},
		{"an empty audience", without(nomad, "audiences") + `audiences=[""]`, "no empty one"},
		{"the audience of every task", without(nomad, "audiences") + `audiences=["x","nomadproject.io"]`, "every task in Nomad has a token for the audience nomadproject.io"},
		{"no namespace", without(nomad, "bound_claims"), "must have nomad_namespace: anyone who may submit a job"},
		{"only a job", without(nomad, "bound_claims") + `bound_claims={nomad_job_id=["x"]}`, "must have nomad_namespace"},
		{"no pattern", without(nomad, "bound_claims") + `bound_claims={nomad_namespace=[]}`, `claim "nomad_namespace" must have at least one pattern`},
		{"an empty pattern", without(nomad, "bound_claims") + `bound_claims={nomad_namespace=[""]}`, "no empty one"},
		{"no algorithm", nomad + `algorithms=[]`, "algorithms must not be empty"},
		{"a symmetric algorithm", nomad + `algorithms=["RS256","HS256"]`, `algorithm "HS256" is not allowed`},
		{"no algorithm by name", nomad + `algorithms=["none"]`, `algorithm "none" is not allowed`},
		{"too much leeway", nomad + `leeway="2m"`, "2m0s is not between 0s and 1m0s"},
		{"a negative leeway", nomad + `leeway="-1s"`, "-1s is not between"},
		{"no name", nomad + `name_claim=""`, "name_claim must not be empty"},
		{"an unknown policy", without(nomad, "policies") + `policies=["root"]`, `unknown policy "root"`},
		{"an unknown key", nomad + `audience="x"`, `"audience" is not expected here`},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := load(t, "-config", write(t, "a.hcl", jwtPolicies+"jwt \"x\" {\n"+c.block+"\n}\n"))
			must.ErrorContains(t, err, c.says)
			must.StrContains(t, err.Error(), "a.hcl:")
			must.StrNotContains(t, err.Error(), "secret")
		})
	}
	t.Run("a_name_twice", func(t *testing.T) {
		block := "jwt \"x\" {\n" + nomad + "}\n"
		_, err := load(t, "-config", write(t, "a.hcl", jwtPolicies+block), "-config", write(t, "b.hcl", block))
		must.ErrorContains(t, err, `jwt "x" is already defined at`)
	})
	t.Run("a_name_with_a_slash", func(t *testing.T) {
		_, err := load(t, "-config", write(t, "a.hcl", jwtPolicies+"jwt \"a/b\" {\n"+nomad+"}\n"))
		must.ErrorContains(t, err, `the name must be 1 to 128 letters`)
	})
	t.Run("too_many", func(t *testing.T) {
		text := jwtPolicies
		for n := range maxJWTs + 1 {
			text += fmt.Sprintf("jwt \"x%d\" {\n%s}\n", n, nomad)
		}
		_, err := load(t, "-config", write(t, "a.hcl", text))
		must.ErrorContains(t, err, "more than 32 jwt blocks")
	})
}

func TestKeyURL(t *testing.T) {
	for url, want := range map[string]bool{
		"https://sso.example.org/keys?x=1": true,
		"https://sso.example.org:8443":     true,
		"http://127.0.0.1:8080/keys":       true,
		"http://[::1]/keys":                true,
		"http://localhost/keys":            true,
		"http://localhost.example.org":     false,
		"http://127.0.0.1.example.org":     false,
		"https://":                         false,
		"https:///keys":                    false,
		"file:///etc/keys":                 false,
		"":                                 false,
	} {
		t.Run(url, func(t *testing.T) { must.Eq(t, want, isKeyURL(url)) })
	}
}
