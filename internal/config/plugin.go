package config

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/hashicorp/hcl/v2"
	"github.com/zclconf/go-cty/cty"
	ctyjson "github.com/zclconf/go-cty/cty/json"

	"github.com/bivouac/bivouac/internal/pluginhost"
)

// maxPlugins is the maximum number of plugins.
const maxPlugins = 32

// builtIn are the runtimes that are part of Bivouac.
var builtIn = []string{"nomad", "process"}

func pluginKeys(p *pluginhost.Plugin) []key {
	return []key{
		{name: "path", target: &p.Path, usage: "`FILE` of the plugin. (default the file in plugin_dir with the block's name)"},
		{name: "args", target: &p.Args, usage: "Arguments of the plugin."},
		{name: "env", target: &p.Env, usage: "Environment of the plugin. It gets nothing else of the server's environment, except a fixed PATH if you set none."},
		{name: "sha256", target: &p.SHA256, usage: "Checksum of the file in hex, verified before each start. (default any file)"},
	}
}

// decodePlugin decodes a plugin's block.
func (c *Config) decodePlugin(block *hcl.Block) hcl.Diagnostics {
	p := pluginhost.Plugin{Name: block.Labels[0]}
	origin := "plugin." + p.Name
	schema := hcl.BodySchema{Blocks: []hcl.BlockHeaderSchema{{Type: "config"}}}
	diags := c.decodeKeys(block.Body, schema, origin+".", pluginKeys(&p), func(block *hcl.Block) hcl.Diagnostics {
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
		if slices.Contains(builtIn, p.Name) {
			refuse(origin, "%s is a runtime of Bivouac itself", p.Name)
		} else if err := p.Check(c.PluginDir); err != nil {
			refuse(origin, "%w", err)
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
