package e2e

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"
	nomad "github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// bearer adds a token to each request.
type bearer struct {
	token string
	next  http.RoundTripper
}

func (b bearer) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.Header.Set("Authorization", "Bearer "+b.token)
	return b.next.RoundTrip(req)
}

// as returns the replica as a caller with a token sees it.
func (r *replica) as(token string) *replica {
	caller := *r
	caller.api = &http.Client{Transport: bearer{token, r.api.Transport}, Timeout: r.api.Timeout}
	return &caller
}

func TestWorkloadIdentity(t *testing.T) {
	// Given a replica that lets the jobs of support bots manage the sessions of support.
	w := newWorld(t, "raw_exec")
	support, sales := "support-"+uuid.NewString(), "sales-"+uuid.NewString()
	file := filepath.Join(t.TempDir(), "callers.hcl")
	must.NoError(t, os.WriteFile(file, fmt.Appendf(nil, `
policy "support" {
  agent_prefix "support-" {
    capabilities = ["read", "write"]
  }
}
jwt "nomad" {
  nomad        = true
  audiences    = ["bivouac.io"]
  bound_claims = { nomad_namespace = ["default"], nomad_job_id = ["support-*"] }
  policies     = ["support"]
}
`), 0o600))
	w.flags = append(w.flags, "-config="+file)
	r := w.start()
	chat := uuid.NewString()
	body := w.body()
	body.AgentID = "support-1"

	// When a support bot creates a session, then it owns it.
	bot := r.as(stack.WorkloadToken(t, w.nomad, support, "bivouac.io"))
	created := bot.create(chat, body, http.StatusCreated)
	must.Eq(t, "global:default:"+support+":bot:bot:bivouac", created.Session.Owner)

	// It may not create one for the AI agents of others.
	body.AgentID = "sales-1"
	_ = call[wire.ErrorAnswer](bot, http.MethodPut, sessionPath(uuid.NewString()), body, http.StatusForbidden)

	// Other jobs, and tasks with tokens for something else, are nobody.
	for name, token := range map[string]string{
		"a job of sales":          stack.WorkloadToken(t, w.nomad, sales, "bivouac.io"),
		"a token for Nomad":       stack.WorkloadToken(t, w.nomad, support+"-2", "nomadproject.io"),
		"a token that is altered": stack.WorkloadToken(t, w.nomad, support+"-3", "bivouac.io") + "AAAA",
	} {
		answer := call[wire.ErrorAnswer](r.as(token), http.MethodGet, sessionPath(chat), nil, http.StatusUnauthorized)
		must.Eq(t, wire.CodeUnauthenticated, answer.Error.Code, must.Sprint(name))
	}

	// When Nomad's key is rotated, then the next token is accepted by the same server, and
	// the first one still is.
	_, _, err := w.nomad.Keyring().Rotate(&nomad.KeyringRotateOptions{Full: true}, nil)
	must.NoError(t, err)
	next := r.as(stack.WorkloadToken(t, w.nomad, support+"-4", "bivouac.io"))
	must.Eq(t, created.Session.SessionID, next.get(chat).SessionID)
	must.Eq(t, created.Session.SessionID, bot.get(chat).SessionID)
	must.Eq(t, created.Session.SessionID, bot.delete(chat).SessionID)
}
