package config

import (
	"path/filepath"

	"github.com/hashicorp/hcl/v2"

	"github.com/bivouac/bivouac/internal/audit"
)

// Audit is an audit block.
type Audit struct {
	Name     string
	Path     string
	Mode     string // octal
	Delivery string // "enforced" or "best-effort"
}

func newAudit(name string) Audit { return Audit{Name: name, Mode: "0600", Delivery: "enforced"} }

func auditKeys(a *Audit) []key {
	return []key{
		{name: "path", target: &a.Path, usage: "`FILE` as an absolute path, or stdout. The file is opened again if it was renamed, within seconds and on SIGHUP."},
		{name: "mode", target: &a.Mode, usage: "Mode of a new file, in octal."},
		{name: "delivery", target: &a.Delivery, usage: "`enforced`: nothing is done that cannot be written down. `best-effort`: lines that cannot be written are counted and lost."},
	}
}

func (c *Config) decodeAudit(block *hcl.Block) hcl.Diagnostics {
	a := newAudit(block.Labels[0])
	diags := c.decodeKeys(block.Body, hcl.BodySchema{}, "audit."+a.Name+".", auditKeys(&a), nil)
	c.Audits = append(c.Audits, a)
	return diags
}

func (c *Config) checkAudits(refuse func(name, format string, args ...any)) {
	paths := map[string]string{}
	for _, a := range c.Audits {
		origin := "audit." + a.Name
		if err := checkName(a.Name); err != nil {
			refuse(origin, "%w", err)
		}
		if a.Path != audit.Stdout && (!filepath.IsAbs(a.Path) || filepath.Clean(a.Path) != a.Path) {
			refuse(origin, `path %q must be an absolute, clean path or "stdout"`, a.Path)
		}
		if other, used := paths[a.Path]; used {
			refuse(origin, "audit %q has the same path", other)
		}
		paths[a.Path] = a.Name
		if mode, err := parseMode(a.Mode); err != nil || mode&0o600 != 0o600 || mode&^0o666 != 0 {
			refuse(origin, `mode %q must be octal and let the server read and write the file, such as "0600"`, a.Mode)
		}
		if a.Delivery != "enforced" && a.Delivery != "best-effort" {
			refuse(origin, `delivery must be "enforced" or "best-effort"`)
		}
	}
}

// Settings returns the settings of the sink.
func (a Audit) Settings() audit.Settings {
	mode, _ := parseMode(a.Mode) // checked
	return audit.Settings{Name: a.Name, Path: a.Path, Mode: mode, Enforced: a.Delivery == "enforced"}
}

func (c *Config) publicAudits() map[string]any {
	public := map[string]any{}
	for _, a := range c.Audits {
		public[a.Name] = shownAll(auditKeys(&a))
	}
	return public
}
