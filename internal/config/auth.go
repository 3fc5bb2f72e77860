package config

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"

	"github.com/bivouac/bivouac/internal/auth"
	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/scheduler"
)

// Policy is a policy block.
type Policy struct {
	Name     string
	Operator string // "", "read" or "write"
	Metrics  string // "" or "read"
	Agents   []AgentRule
}

// AgentRule is an agent_prefix block of a policy.
type AgentRule struct {
	Prefix       string
	Capabilities []string
	VolumeRoots  []string
	MaxSessions  int
	MaxTTL       time.Duration
}

// Token is a token block.
type Token struct {
	Name       string
	SHA256     string // hexadecimal
	SHA256File string // a file that contains it
	Policies   []string
}

func policyKeys(p *Policy) []key {
	return []key{
		{name: "operator", target: &p.Operator, usage: "`read` allows agent/self and health in detail; `write` also allows cleanup and operator commands. (default neither)"},
		{name: "metrics", target: &p.Metrics, usage: "`read` allows reading the metrics. (default no)"},
	}
}

func agentRuleKeys(r *AgentRule) []key {
	return []key{
		{name: "capabilities", target: &r.Capabilities, usage: "What callers may do: read, write (includes read), logs, exec. An empty list allows nothing."},
		{name: "volume_roots", target: &r.VolumeRoots, usage: "Folders whose direct subfolders may be volumes of new sessions. (default any that the server allows)"},
		{name: "max_sessions", target: &r.MaxSessions, usage: "How many sessions all AI agents with the prefix may have together. (default no limit)"},
		{name: "max_ttl", target: &r.MaxTTL, usage: "Longest TTL of their sessions. (default max_ttl of the server)"},
	}
}

func tokenKeys(t *Token) []key {
	return []key{
		{name: "sha256", target: &t.SHA256, usage: "SHA-256 of the secret, in hex."},
		{name: "sha256_file", target: &t.SHA256File, usage: "`FILE` with the SHA-256 of the secret, in hex. Instead of sha256."},
		{name: "policies", target: &t.Policies, usage: "Names of the policies. The caller may do what one of them allows."},
	}
}

func (c *Config) decodePolicy(block *hcl.Block) hcl.Diagnostics {
	p := Policy{Name: block.Labels[0]}
	origin := "policy." + p.Name + "."
	schema := hcl.BodySchema{Blocks: []hcl.BlockHeaderSchema{{Type: "agent_prefix", LabelNames: []string{"prefix"}}}}
	diags := c.decodeKeys(block.Body, schema, origin, policyKeys(&p), func(inner *hcl.Block) hcl.Diagnostics {
		rule := AgentRule{Prefix: inner.Labels[0]}
		diags := c.decodeKeys(inner.Body, hcl.BodySchema{}, origin, agentRuleKeys(&rule), nil)
		p.Agents = append(p.Agents, rule)
		return diags
	})
	c.Policies = append(c.Policies, p)
	return diags
}

func (c *Config) decodeToken(block *hcl.Block) hcl.Diagnostics {
	t := Token{Name: block.Labels[0]}
	diags := c.decodeKeys(block.Body, hcl.BodySchema{}, "token."+t.Name+".", tokenKeys(&t), nil)
	c.Tokens = append(c.Tokens, t)
	return diags
}

// Authenticates reports whether callers must authenticate.
func (c *Config) Authenticates() bool { return len(c.Tokens)+len(c.JWTs) > 0 }

// capabilities returns the capabilities by their names.
func capabilities() map[string]scheduler.Capabilities {
	byName := map[string]scheduler.Capabilities{}
	for _, capability := range scheduler.EachCapability() {
		byName[capability.String()] = capability
	}
	return byName
}

var levels = map[string]scheduler.Level{"": scheduler.LevelNone, "read": scheduler.LevelRead, "write": scheduler.LevelWrite}

// maxName bounds the name of a policy or of a caller, in bytes.
const maxName = 128

func (c *Config) checkAuth(refuse func(name, format string, args ...any)) {
	if c.MaxSessions < 0 {
		refuse("max_sessions", "must not be negative")
	}
	for _, p := range c.Policies {
		origin := "policy." + p.Name
		if err := CheckCallerName(p.Name); err != nil {
			refuse(origin, "%w", err)
		}
		if _, ok := levels[p.Operator]; !ok {
			refuse(origin, `operator must be "read" or "write"`)
		}
		if p.Metrics != "" && p.Metrics != "read" {
			refuse(origin, `metrics must be "read"`)
		}
		seen := map[string]bool{}
		for _, rule := range p.Agents {
			if seen[rule.Prefix] {
				refuse(origin, "duplicate agent_prefix %q", rule.Prefix)
			}
			seen[rule.Prefix] = true
			c.checkAgentRule(origin, rule, refuse)
		}
	}
	for _, t := range c.Tokens {
		c.checkToken(t, refuse)
	}
	c.checkJWTs(refuse)
	if len(c.Policies) > 0 && !c.Authenticates() {
		refuse("policy."+c.Policies[0].Name, "policies need callers: add a jwt block, or a token block, which `bivouac token new NAME` prints")
	}
}

func (c *Config) checkAgentRule(origin string, rule AgentRule, refuse func(name, format string, args ...any)) {
	in := func(format string, args ...any) {
		refuse(origin, "agent_prefix %q: %w", rule.Prefix, fmt.Errorf(format, args...))
	}
	known := capabilities()
	for _, name := range rule.Capabilities {
		if known[name] == 0 {
			in("unknown capability %q (available: %s)", name, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		}
	}
	for _, root := range rule.VolumeRoots {
		if !filepath.IsAbs(root) || filepath.Clean(root) != root {
			in("volume root %q is not an absolute, clean path", root)
		}
		if len(c.VolumeRoots) > 0 && !slices.Contains(c.VolumeRoots, root) {
			in("volume root %q is not in the server's volume_roots", root)
		}
	}
	if rule.MaxSessions < 0 {
		in("max_sessions must not be negative")
	}
	if rule.MaxTTL != 0 && rule.MaxTTL < minTTL {
		in("max_ttl must be %s or longer", minTTL)
	}
}

func (c *Config) checkToken(t Token, refuse func(name, format string, args ...any)) {
	origin := "token." + t.Name
	if err := CheckCallerName(t.Name); err != nil {
		refuse(origin, "%w", err)
	}
	if (t.SHA256 == "") == (t.SHA256File == "") {
		refuse(origin, "needs either sha256 or sha256_file; `bivouac token new %s` prints them", t.Name)
	} else if _, err := t.sum(); err != nil {
		refuse(origin, "%w", err)
	}
	c.checkPolicies(t.Policies, origin, refuse)
}

// checkPolicies refuses names of policies that do not exist.
func (c *Config) checkPolicies(names []string, origin string, refuse func(name, format string, args ...any)) {
	for _, name := range names {
		if !slices.ContainsFunc(c.Policies, func(p Policy) bool { return p.Name == name }) {
			refuse(origin, "unknown policy %q", name)
		}
	}
}

// CheckCallerName refuses names of callers and policies that do not fit in a log line.
func CheckCallerName(name string) error {
	if scheduler.IsReservedName(name) {
		return fmt.Errorf("the name %q is reserved", name)
	}
	return checkName(name)
}

func checkName(name string) error {
	const allowed = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-._"
	if name == "" || len(name) > maxName || strings.Trim(name, allowed) != "" {
		return fmt.Errorf("the name must be 1 to %d letters, digits, '-', '.' and '_'", maxName)
	}
	return nil
}

// sum returns the SHA-256 of the token's secret.
func (t Token) sum() ([sha256.Size]byte, error) {
	text := t.SHA256
	if t.SHA256File != "" {
		content, err := credentials.ReadFile(t.SHA256File)
		if err != nil {
			return [sha256.Size]byte{}, fmt.Errorf("sha256_file: %w", err)
		}
		text = strings.TrimSpace(string(content))
	}
	sum, err := hex.DecodeString(text)
	if err != nil || len(sum) != sha256.Size {
		return [sha256.Size]byte{}, errors.New("sha256 must be 64 hexadecimal digits")
	}
	return [sha256.Size]byte(sum), nil
}

// PoliciesNamed returns the policies with these names, never nil.
func (c *Config) PoliciesNamed(names []string) []*scheduler.Policy {
	policies := []*scheduler.Policy{} // not nil, which would allow everything
	for _, p := range c.Policies {
		if slices.Contains(names, p.Name) {
			policies = append(policies, p.policy())
		}
	}
	return policies
}

func (p Policy) policy() *scheduler.Policy {
	policy := &scheduler.Policy{Name: p.Name, Operator: levels[p.Operator], Metrics: p.Metrics != ""}
	known := capabilities()
	for _, rule := range p.Agents {
		var set scheduler.Capabilities
		for _, name := range rule.Capabilities {
			set |= known[name]
		}
		policy.Agents = append(policy.Agents, scheduler.AgentRule{
			Prefix: rule.Prefix, Capabilities: set, VolumeRoots: rule.VolumeRoots, MaxSessions: rule.MaxSessions, MaxTTL: rule.MaxTTL,
		})
	}
	return policy
}

// Callers returns the static tokens. It reads the files of their checksums.
func (c *Config) Callers() ([]auth.Token, error) {
	var tokens []auth.Token
	for _, t := range c.Tokens {
		sum, err := t.sum()
		if err != nil {
			return nil, c.Wrong("token."+t.Name, err)
		}
		tokens = append(tokens, auth.Token{Name: t.Name, SHA256: sum, Policies: c.PoliciesNamed(t.Policies)})
	}
	return tokens, nil
}

// publicAuth returns the policies, and the tokens without their checksums.
func (c *Config) publicAuth() (policies, tokens map[string]any) {
	policies, tokens = map[string]any{}, map[string]any{}
	for _, p := range c.Policies {
		rules := map[string]any{}
		for _, rule := range p.Agents {
			rules[rule.Prefix] = shownAll(agentRuleKeys(&rule))
		}
		policy := shownAll(policyKeys(&p))
		policy["agent_prefix"] = rules
		policies[p.Name] = policy
	}
	for _, t := range c.Tokens {
		tokens[t.Name] = map[string]any{"policies": append([]string{}, t.Policies...)}
	}
	return policies, tokens
}

func shownAll(keys []key) map[string]any {
	all := map[string]any{}
	for _, k := range keys {
		all[k.name] = shown(k)
	}
	return all
}
