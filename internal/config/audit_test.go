package config

import (
	"io/fs"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/audit"
)

func TestAudits(t *testing.T) {
	c, err := load(t, "-config", write(t, "a.hcl", `
audit "file" { path = "/var/log/bivouac/audit.log" }
audit "out" {
  path     = "stdout"
  mode     = "0640"
  delivery = "best-effort"
}
`))
	must.NoError(t, err)
	must.Len(t, 2, c.Audits)
	must.Eq(t, audit.Settings{Name: "file", Path: "/var/log/bivouac/audit.log", Mode: 0o600, Enforced: true}, c.Audits[0].Settings())
	must.Eq(t, audit.Settings{Name: "out", Path: audit.Stdout, Mode: fs.FileMode(0o640)}, c.Audits[1].Settings())
	must.Eq(t, any(map[string]any{
		"file": map[string]any{"path": "/var/log/bivouac/audit.log", "mode": "0600", "delivery": "enforced"},
		"out":  map[string]any{"path": "stdout", "mode": "0640", "delivery": "best-effort"},
	}), c.Public()["audit"])
}

func TestWrongAuditsAreRefused(t *testing.T) {
	for block, want := range map[string]string{
		`audit "a b" { path = "stdout" }`:                              "the name must be 1 to 128 letters",
		`audit "a" {}`:                                                 `path "" must be an absolute, clean path or "stdout"`,
		`audit "a" { path = "audit.log" }`:                             `path "audit.log" must be an absolute`,
		`audit "a" { path = "/var/../log" }`:                           `path "/var/../log" must be an absolute`,
		"audit \"a\" {\n path = \"stdout\"\n mode = \"0800\"\n}":       `mode "0800" must be octal`,
		"audit \"a\" {\n path = \"stdout\"\n mode = \"0400\"\n}":       `mode "0400" must be octal and let the server read and write`,
		"audit \"a\" {\n path = \"stdout\"\n mode = \"0777\"\n}":       `mode "0777" must be octal`,
		"audit \"a\" {\n path = \"stdout\"\n delivery = \"maybe\"\n}":  `delivery must be "enforced" or "best-effort"`,
		"audit \"a\" { path = \"/x\" }\naudit \"b\" { path = \"/x\" }": `audit "a" has the same path`,
		"audit \"a\" { path = \"/x\" }\naudit \"a\" { path = \"/y\" }": `audit "a" is already defined at`,
	} {
		t.Run(want, func(t *testing.T) {
			_, err := load(t, "-config", write(t, "a.hcl", block))
			must.ErrorContains(t, err, want)
			must.ErrorContains(t, err, "a.hcl:")
		})
	}
}
