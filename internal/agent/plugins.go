package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/runtime"
)

func newPluginHost(c config.Config, log hclog.Logger) (*pluginhost.Host, error) {
	settings := pluginSettings(c, log)
	if c.Dev {
		settings.Instance = devInstance(c.HTTPAddr)
	}
	host, err := pluginhost.New(settings)
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	return host, nil
}

// pluginSettings are those of a host with the plugins of the configuration.
func pluginSettings(c config.Config, log hclog.Logger) pluginhost.Config {
	return pluginhost.Config{Dir: c.PluginDir, Plugins: c.Plugins, Instance: c.Instance, Logger: log}
}

// checkPlugins finds what is wrong with plugins, with the place of each one's
// block.
func checkPlugins(ctx context.Context, c config.Config) error {
	log := hclog.NewNullLogger()
	if _, err := newPluginHost(c, log); err != nil {
		return err
	}
	var errs []error
	settings := pluginSettings(c, log)
	for _, p := range settings.Plugins {
		if err := pluginhost.Check(ctx, settings, p); err != nil {
			errs = append(errs, c.Wrong("plugin."+p.Name, err))
		}
	}
	return errors.Join(errs...)
}

// addPlugins adds the plugins' runtimes to a base. A plugin that is not the
// default runtime is in health, and the agent can serve without it.
func (b *base) addPlugins(host *pluginhost.Host, c config.Config) {
	b.plugins = host
	drivers := host.Drivers()
	if len(drivers) == 0 {
		return
	}
	b.parts = append(b.parts, part{"plugins", whenReady(b.identified, func(ctx context.Context) error { host.Run(ctx); return nil })})
	for name, driver := range drivers {
		b.drivers[name] = driver
		b.checks = append(b.checks, api.Check{Name: "plugin." + name, Run: driver.Health, Optional: name != c.Runtime})
	}
}

// pluginPatience is how long background work waits for plugins to come up.
const pluginPatience = 5 * time.Second

// awaitPlugins lets background work begin with plugins that are up: its first
// look at what is there would be wasted on them, and the next is a minute later.
func (b *base) awaitPlugins(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, pluginPatience)
	defer cancel()
	_ = b.plugins.AwaitStart(ctx) // the host tells of those that failed
}

// describeRuntimes tells which runtimes there are. The version of a plugin is
// not known while it is not up.
func describeRuntimes(ctx context.Context, drivers map[string]runtime.Driver) []wire.Runtime {
	var all []wire.Runtime
	for _, name := range slices.Sorted(maps.Keys(drivers)) {
		info, err := drivers[name].Info(ctx)
		if err != nil {
			info.Version = ""
		}
		all = append(all, wire.Runtime{Name: name, Version: info.Version})
	}
	return all
}
