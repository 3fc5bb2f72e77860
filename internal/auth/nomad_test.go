package auth

import (
	"encoding/base64"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/stack"
)

func TestMain(m *testing.M) { os.Exit(stack.Main(m)) }

func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	limit := time.NewTimer(time.Minute)
	defer limit.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-limit.C:
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

func keyID(t *testing.T, token string) string {
	t.Helper()
	first, _, _ := strings.Cut(token, ".")
	text, err := base64.RawURLEncoding.DecodeString(first)
	must.NoError(t, err)
	var header struct{ Kid string }
	must.NoError(t, json.Unmarshal(text, &header))
	return header.Kid
}

func TestNomadKeys(t *testing.T) {
	n := stack.NomadForTest(t)
	client, err := n.Client()
	must.NoError(t, err)
	keys := NomadKeys(client, nil, hclog.NewNullLogger())
	run(t, keys)
	jwts := newJWTs([]JWT{{
		Name: "nomad", Keys: keys, Audiences: []string{"bivouac.io"}, Algorithms: []string{"RS256"}, NameClaim: "sub",
		BoundClaims: map[string][]string{"nomad_namespace": {"default"}, "nomad_job_id": {"support-*"}},
	}})

	// Given a job whose task has an identity for Bivouac, then its token is accepted.
	first := stack.WorkloadToken(t, client, "support-1", "bivouac.io")
	caller, err := jwts.authenticate(t.Context(), first)
	must.NoError(t, err)
	must.Eq(t, "global:default:support-1:bot:bot:bivouac", caller.Name)
	must.Eq(t, "jwt/nomad", caller.Method)
	must.NotEq(t, "", caller.Accessor)
	must.NoError(t, keys.Health(t.Context()))

	// Then that of another job is not, and that for somebody else is not.
	_, err = jwts.authenticate(t.Context(), stack.WorkloadToken(t, client, "sales-1", "bivouac.io"))
	must.EqError(t, err, `jwt "nomad": its claim nomad_job_id does not match`)
	_, err = jwts.authenticate(t.Context(), stack.WorkloadToken(t, client, "support-2", "consul.io"))
	must.EqError(t, err, `jwt "nomad": its audience must be one of bivouac.io`)

	// When Nomad's key is rotated, then new tokens are accepted without a restart, and old
	// ones still are.
	rotated, _, err := client.Keyring().Rotate(&api.KeyringRotateOptions{Full: true}, nil)
	must.NoError(t, err)
	until(t, "the poll saw the new key", func() bool {
		_, known := keys.current.Load().find(rotated.KeyID, jose.RS256)
		return known
	})
	third := stack.WorkloadToken(t, client, "support-3", "bivouac.io")
	must.Eq(t, rotated.KeyID, keyID(t, third))
	must.NotEq(t, keyID(t, first), keyID(t, third))
	caller, err = jwts.authenticate(t.Context(), third)
	must.NoError(t, err)
	must.Eq(t, "global:default:support-3:bot:bot:bivouac", caller.Name)
	_, err = jwts.authenticate(t.Context(), first)
	must.NoError(t, err)
}
