package config

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"

	"github.com/hashicorp/hcl/v2"
	"github.com/zclconf/go-cty/cty"
	ctyjson "github.com/zclconf/go-cty/cty/json"
)

// Plugin is a runtime that runs as a separate program.
type Plugin struct {
	Name   string // the name of the runtime, and of its file in PluginDir
	Path   string // empty: the file is in PluginDir
	Args   []string
	Env    map[string]string
	Config json.RawMessage // an object; nil if there is no config block
	SHA256 string          // in hex; empty: the file is not checked
}

// maxPlugins is the maximum number of plugins.
const maxPlugins = 32

var (
	pluginForm = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,63}$`)
	// builtIn are the runtimes that are not plugins.
	builtIn = []string{"nomad", "process"}
)

func (p *Plugin) keys() []key {
	return []key{
		{name: "path", target: &p.Path},
		{name: "args", target: &p.Args},
		{name: "env", target: &p.Env},
		{name: "sha256", target: &p.SHA256},
	}
}

// decodePlugin decodes a plugin's block. It refuses two blocks with one name, even in
// different files, because a reader of one file would miss the other.
func (c *Config) decodePlugin(block *hcl.Block) hcl.Diagnostics {
	p := Plugin{Name: block.Labels[0]}
	origin := "plugin." + p.Name
	if first, again := c.origins[origin]; again {
		return hcl.Diagnostics{{
			Severity: hcl.DiagError,
			Summary:  "Duplicate plugin block",
			Detail:   fmt.Sprintf("plugin %q is already defined at %s.", p.Name, first),
			Subject:  block.DefRange.Ptr(),
		}}
	}
	c.setBy(origin, position(block.DefRange))
	schema := hcl.BodySchema{Blocks: []hcl.BlockHeaderSchema{{Type: "config"}}}
	diags := c.decodeKeys(block.Body, schema, origin+".", p.keys(), func(block *hcl.Block) hcl.Diagnostics {
		if p.Config != nil {
			return hcl.Diagnostics{{
				Severity: hcl.DiagError,
				Summary:  "Duplicate config block",
				Detail:   fmt.Sprintf("plugin %q may have only one config block.", p.Name),
				Subject:  block.DefRange.Ptr(),
			}}
		}
		var diags hcl.Diagnostics
		p.Config, diags = decodeObject(block.Body)
		return diags
	})
	c.Plugins = append(c.Plugins, p)
	return diags
}

// decodeObject returns a block with any attributes as JSON.
func decodeObject(body hcl.Body) (json.RawMessage, hcl.Diagnostics) {
	attrs, diags := body.JustAttributes()
	values := map[string]cty.Value{}
	for name, attr := range attrs {
		value, more := attr.Expr.Value(nil)
		diags = append(diags, more...)
		values[name] = value
	}
	if diags.HasErrors() {
		return nil, diags
	}
	text, err := ctyjson.SimpleJSONValue{Value: cty.ObjectVal(values)}.MarshalJSON()
	if err != nil {
		return nil, append(diags, &hcl.Diagnostic{
			Severity: hcl.DiagError,
			Summary:  "Wrong value",
			Detail:   fmt.Sprintf("config cannot be JSON: %v.", err),
			Subject:  body.MissingItemRange().Ptr(),
		})
	}
	return text, diags
}

// checkPlugins refuses invalid plugins. It does not look at their files.
func (c *Config) checkPlugins(refuse func(name, format string, args ...any)) {
	if len(c.Plugins) > maxPlugins {
		refuse("plugin."+c.Plugins[maxPlugins].Name, "there are more than %d plugins", maxPlugins)
	}
	for _, p := range c.Plugins {
		origin := "plugin." + p.Name
		switch {
		case !pluginForm.MatchString(p.Name):
			refuse(origin, "the name %q must be 1 to 64 of a-z, 0-9 and -", p.Name)
		case slices.Contains(builtIn, p.Name):
			refuse(origin, "%s is the name of a built-in runtime", p.Name)
		case p.Path == "" && c.PluginDir == "":
			refuse(origin, "no path is set, and no plugin_dir")
		}
		if sum, err := hex.DecodeString(p.SHA256); p.SHA256 != "" && (err != nil || len(sum) != 32) {
			refuse(origin+".sha256", "%q must be 64 hex digits", p.SHA256)
		}
	}
}

// publicPlugins returns the plugins without secrets. Arguments, environment variables and
// configuration may be secrets.
func (c *Config) publicPlugins() map[string]any {
	public := map[string]any{}
	for _, p := range c.Plugins {
		public[p.Name] = map[string]any{
			"path":   p.Path,
			"sha256": p.SHA256,
			"env":    append([]string{}, slices.Sorted(maps.Keys(p.Env))...),
		}
	}
	return public
}
