package command

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/runtime"
)

func pluginCommand(t terminal) *command {
	c := newCommand(t, "plugin")
	c.synopsis = "Look at and try out runtime plugins"
	c.about = `Groups the commands for runtime plugins, which are programs that run sandboxes
for Bivouac. The commands need no server.`
	return c
}

// pluginFlags are the flags that configure plugins.
type pluginFlags struct{ config.Flags }

func newPluginFlags(c *command) *pluginFlags {
	f := &pluginFlags{}
	f.RegisterPlugins(c.flags)
	return f
}

// all returns the plugins that have a block, and those that only have a file in the
// plugin folder. A server ignores the latter.
func (f *pluginFlags) all() (named, others []pluginhost.Plugin, dir string, err error) {
	settings, err := f.Load()
	if err != nil {
		return nil, nil, "", err
	}
	named = settings.Plugins
	if settings.PluginDir == "" {
		return named, nil, "", nil
	}
	entries, err := os.ReadDir(settings.PluginDir)
	if err != nil {
		return nil, nil, "", err
	}
	for _, entry := range entries {
		info, err := os.Stat(filepath.Join(settings.PluginDir, entry.Name()))
		configured := slices.ContainsFunc(named, func(p pluginhost.Plugin) bool { return p.Name == entry.Name() })
		if err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 && !configured {
			others = append(others, pluginhost.Plugin{Name: entry.Name()})
		}
	}
	return named, others, settings.PluginDir, nil
}

// find returns the plugin for the argument PLUGIN. If the argument contains a slash, it
// is a path, otherwise a name. If a block has that name or uses that file, find returns
// the block's plugin.
func (f *pluginFlags) find(plugin string) (pluginhost.Plugin, string, error) {
	named, others, dir, err := f.all()
	if err != nil {
		return pluginhost.Plugin{}, "", err
	}
	if strings.ContainsRune(plugin, filepath.Separator) {
		for _, p := range named {
			if isFile(cmp.Or(p.Path, filepath.Join(dir, p.Name)), plugin) {
				return p, dir, nil
			}
		}
		return pluginhost.Plugin{Name: nameOf(plugin), Path: plugin}, dir, nil
	}
	for _, p := range slices.Concat(named, others) {
		if p.Name == plugin {
			return p, dir, nil
		}
	}
	return pluginhost.Plugin{}, "", fmt.Errorf("no plugin %q: it is neither a path, such as ./%s, nor in -plugin-dir, nor has it a block in a -config", plugin, plugin)
}

// isFile reports whether both paths lead to the same file.
func isFile(a, b string) bool {
	infoA, errA := os.Stat(a)
	infoB, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(infoA, infoB)
}

// pluginLogger returns the log of a command that drives a plugin.
func pluginLogger(level string, out io.Writer) (hclog.Logger, error) {
	known := hclog.LevelFromString(level)
	if known == hclog.NoLevel {
		return nil, fmt.Errorf("-log-level=%q is none of trace, debug, info, warn, error and off", level)
	}
	return hclog.New(&hclog.LoggerOptions{Name: "bivouac", Level: known, Output: out}), nil
}

// nameOf derives a runtime's name from a path.
func nameOf(path string) string {
	name := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(filepath.Base(path)))
	name = strings.Trim(name, "-")
	return name[:min(len(name), 64)]
}

// pluginAnswer is a plugin as list and inspect show it.
type pluginAnswer struct {
	Name       string        `json:"name"`
	Configured bool          `json:"configured"` // it has a block
	Info       *runtime.Info `json:"info,omitempty"`
	Error      string        `json:"error,omitempty"`
}

var errPluginFailed = errors.New("some plugins do not come up")

func pluginListCommand(t terminal) *command {
	c := newCommand(t, "plugin list")
	c.synopsis = "List the plugins of a folder or a configuration"
	c.about = `Starts each plugin that has a block in a configuration file or a file in the
plugin folder, asks for its name and version, and stops it. The server runs
only plugins with a block. Exits with 1 if a plugin does not start.`
	c.example = "$ bivouac plugin list -plugin-dir=/opt/bivouac/plugins"
	flags := newPluginFlags(c)
	jsonFlag(c)
	c.run = func(ctx context.Context, _ []string) error {
		named, others, dir, err := flags.all()
		if err != nil {
			return err
		}
		answers, failed := []pluginAnswer{}, false
		for i, p := range slices.Concat(named, others) {
			answer := pluginAnswer{Name: p.Name, Configured: i < len(named)}
			info, err := inspectPlugin(ctx, dir, p)
			if err != nil {
				answer.Error, failed = err.Error(), true
			} else {
				answer.Info = &info
			}
			answers = append(answers, answer)
		}
		if err := c.show(answers, pluginTable(answers)); err != nil {
			return err
		}
		if failed {
			return errPluginFailed
		}
		return nil
	}
	return c
}

func inspectPlugin(ctx context.Context, dir string, p pluginhost.Plugin) (runtime.Info, error) {
	return pluginhost.Inspect(ctx, pluginhost.Config{Dir: dir, Logger: hclog.NewNullLogger()}, p)
}

func pluginInspectCommand(t terminal) *command {
	c := newCommand(t, "plugin inspect")
	c.args = "PLUGIN"
	c.synopsis = "Show what a plugin says of itself"
	c.about = `Starts the plugin, prints its version, its abilities and the JSON Schema of its
configuration, and stops it. PLUGIN is a path, or the name of a plugin in the
plugin folder or a configuration file.`
	c.example = "$ bivouac plugin inspect ./my-runtime"
	flags := newPluginFlags(c)
	jsonFlag(c)
	c.run = func(ctx context.Context, args []string) error {
		p, dir, err := flags.find(args[0])
		if err != nil {
			return err
		}
		info, err := inspectPlugin(ctx, dir, p)
		if err != nil {
			return err
		}
		if c.asJSON {
			return showJSON(c.out, pluginAnswer{Name: p.Name, Info: &info})
		}
		return showPlugin(c.out, info)
	}
	return c
}
