package config

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/scheduler"
)

var update = flag.Bool("update", false, "write REFERENCE.md")

const introduction = `# Configuration reference

Generated from the code: ` + "`go test ./internal/config -run Reference -update`" + `.

Pass ` + "`-config=FILE|DIR`" + ` one or more times. A file is HCL, or JSON if its name ends in ` + "`.json`" + `. Later files override earlier ones, and flags override files. Files override the environment variables of Consul and Nomad.

| key | flag | type | default | meaning |
| --- | --- | --- | --- | --- |
`

// TestReferenceIsGenerated compares REFERENCE.md with the keys.
func TestReferenceIsGenerated(t *testing.T) {
	c := Default()
	var text strings.Builder
	text.WriteString(introduction)
	rows(&text, c.keys())
	blocks := c.blocks()
	for _, block := range []struct {
		name, about string
		keys        []key
	}{
		{"tls", "TLS of the addresses in `http_addr` that have the form HOST:PORT. Unix sockets do not use it.", blocks["tls"]},
		{"unix_sockets", "The files of the unix sockets in `http_addr`.", blocks["unix_sockets"]},
		{"events", "How long the store keeps what happened to sessions.", blocks["events"]},
		{"consul", "", blocks["consul"]},
		{"nomad", "", blocks["nomad"]},
		{"policy \"NAME\"", "Says what callers may do. A caller with several policies may do what one of them allows as a whole.", policyKeys(new(Policy))},
		{"agent_prefix \"PREFIX\"` in a `policy", "Says what callers may do with the sessions of the AI agents whose ID begins with `PREFIX`. In a policy only the longest matching prefix counts; an empty prefix matches all.", agentRuleKeys(new(AgentRule))},
		{"token \"NAME\"", "A caller with a static token. `bivouac token new NAME` makes one.", tokenKeys(new(Token))},
		{"jwt \"NAME\"", "Callers with signed tokens (JWT) of one issuer. If several blocks may accept a token, the first one that does decides.", jwtKeys(new(defaultJWT()))},
		{"audit \"NAME\"", "Writes who did what to a file, as JSON lines. [AUDIT.md](../../examples/deploy/AUDIT.md) describes the lines.", auditKeys(new(newAudit("NAME")))},
		{"pool \"NAME\"", "Keeps sandboxes started, so that a create need not wait for a start. [PRODUCTION.md](../../examples/deploy/PRODUCTION.md#13-keep-warm-pools) says what they cost.", poolKeys(new(scheduler.Pool))},
		{"plugin \"NAME\"", "Makes the plugin a runtime of that name. A block `config` inside it is passed to the plugin.", pluginKeys(new(pluginhost.Plugin))},
	} {
		fmt.Fprintf(&text, "\n## Block `%s`\n\n", block.name)
		if block.about != "" {
			fmt.Fprintf(&text, "%s\n\n", block.about)
		}
		text.WriteString("| key | flag | type | default | meaning |\n| --- | --- | --- | --- | --- |\n")
		rows(&text, block.keys)
	}
	must.MapLen(t, 5, blocks)
	if *update {
		must.NoError(t, os.WriteFile("REFERENCE.md", []byte(text.String()), 0o600))
	}
	stands, err := os.ReadFile("REFERENCE.md")
	must.NoError(t, err)
	must.Eq(t, text.String(), string(stands), must.Sprint("run the test with -update"))
}

func rows(text *strings.Builder, keys []key) {
	for _, k := range keys {
		var kind, value string
		switch target := k.target.(type) {
		case *string:
			kind, value = "string", *target
		case *bool:
			kind, value = "bool", fmt.Sprint(*target)
		case *int:
			kind, value = "number", fmt.Sprint(*target)
		case *time.Duration:
			kind, value = "duration", target.String()
		case *[]string:
			kind, value = "list of strings", strings.Join(*target, ", ")
		case *map[string]string:
			kind = "map"
		case *map[string][]string:
			kind = "map of lists"
		}
		if k.name == "http_addr" {
			kind = "string or list of strings"
		}
		usage, _, _ := strings.Cut(k.usage, " (default ")
		if _, after, ok := strings.Cut(k.usage, " (default "); ok {
			value = strings.TrimSuffix(after, ")")
		} else if value != "" {
			value = "`" + value + "`"
		}
		flagName := ""
		if k.flag != "" {
			flagName = "`-" + k.flag + "`"
		}
		fmt.Fprintf(text, "| `%s` | %s | %s | %s | %s |\n", k.name, flagName, kind, value,
			strings.ReplaceAll(strings.ReplaceAll(usage, "|", "\\|"), "`", ""))
	}
}
