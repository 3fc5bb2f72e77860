package config

import (
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

const sum = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

const callers = `
policy "support" {
  agent_prefix "support-" {
    capabilities = ["read", "write", "logs", "exec"]
    volume_roots = ["/srv/chats/support"]
    max_sessions = 100
    max_ttl      = "2h"
  }
  agent_prefix "support-secret-" { capabilities = [] }
  operator = "read"
}
policy "scrape" { metrics = "read" }
token "ci" {
  sha256   = "` + sum + `"
  policies = ["support", "scrape"]
}
`

func TestCallers(t *testing.T) {
	c, err := load(t, "-config", write(t, "a.hcl", callers), "-max-sessions=7")
	must.NoError(t, err)
	must.True(t, c.Authenticates())
	must.Eq(t, 7, c.MaxSessions)
	tokens, err := c.Callers()
	must.NoError(t, err)
	must.Len(t, 1, tokens)
	must.Eq(t, "ci", tokens[0].Name)
	must.Eq(t, []*scheduler.Policy{
		{
			Name: "support",
			Agents: []scheduler.AgentRule{
				{
					Prefix: "support-", Capabilities: scheduler.CapRead | scheduler.CapWrite | scheduler.CapLogs | scheduler.CapExec,
					VolumeRoots: []string{"/srv/chats/support"}, MaxSessions: 100, MaxTTL: 2 * time.Hour,
				},
				{Prefix: "support-secret-"},
			},
			Operator: scheduler.LevelRead,
		},
		{Name: "scrape", Metrics: true},
	}, tokens[0].Policies)
}

func TestATokenWithoutPoliciesMayDoNothing(t *testing.T) {
	c, err := load(t, "-config", write(t, "a.hcl", `token "ci" { sha256_file = "`+write(t, "sum", sum+"\n")+`" }`))
	must.NoError(t, err)
	tokens, err := c.Callers()
	must.NoError(t, err)
	must.NotNil(t, tokens[0].Policies)
	must.False(t, scheduler.Caller{Policies: tokens[0].Policies}.May(scheduler.CapRead, ""))
}

func TestWrongCallers(t *testing.T) {
	const token = `token "ci" { sha256 = "` + sum + `" }` + "\n"
	rule := func(text string) string { return "policy \"a\" {\n" + text + "\n}" }
	for name, tc := range map[string]struct{ text, want string }{
		"a secret in place of its checksum": {`token "ci" { sha256 = "bvk_abc" }`, "sha256 must be 64 hexadecimal digits"},
		"no checksum":                       {`token "ci" { policies = [] }`, "needs either sha256 or sha256_file"},
		"a policy that is not there":        {"token \"ci\" {\n" + `sha256 = "` + sum + "\"\n" + `policies = ["x"]` + "\n}", `unknown policy "x"`},
		"a name with a space":               {`token "c i" { sha256 = "` + sum + `" }`, "the name must be 1 to 128 letters"},
		"a reserved name":                   {`token "bivouac" { sha256 = "` + sum + `" }`, `the name "bivouac" is reserved`},
		"two tokens with one name":          {token + token, `token "ci" is already defined at`},
		"policies without callers":          {`policy "a" { metrics = "read" }`, "policies need callers"},
		"an unknown capability":             {token + rule(`agent_prefix "" { capabilities = ["delete"] }`), `unknown capability "delete" (available: exec, logs, read, write)`},
		"an unknown level":                  {token + `policy "a" { operator = "all" }`, `operator must be "read" or "write"`},
		"one prefix twice":                  {token + `policy "a" {` + "\n" + `agent_prefix "x" {}` + "\n" + `agent_prefix "x" {}` + "\n}", `duplicate agent_prefix "x"`},
		"a relative volume root":            {token + rule(`agent_prefix "" { volume_roots = ["srv"] }`), "is not an absolute, clean path"},
		"a volume root outside the server's": {"volume_roots = [\"/srv/a\"]\n" + token + rule(`agent_prefix "" { volume_roots = ["/srv/b"] }`),
			"is not in the server's volume_roots"},
		"a TTL that is too short": {token + rule(`agent_prefix "" { max_ttl = "1s" }`), "max_ttl must be 5s or longer"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(t, "-config", write(t, "a.hcl", tc.text))
			must.ErrorContains(t, err, tc.want)
		})
	}
}
