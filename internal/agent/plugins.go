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
		settings.Instance = devInstance(c.HTTPAddrs[0])
	}
	host, err := pluginhost.New(settings)
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	return host, nil
}

// pluginSettings returns the settings of a host for the configured plugins.
func pluginSettings(c config.Config, log hclog.Logger) pluginhost.Config {
	return pluginhost.Config{Dir: c.PluginDir, Plugins: c.Plugins, Instance: c.Instance, Logger: log}
}

// checkPlugins checks the plugins and their pools. Its errors contain the position of the
// block.
func checkPlugins(ctx context.Context, c config.Config) error {
	log := hclog.NewNullLogger()
	if _, err := newPluginHost(c, log); err != nil {
		return err
	}
	var errs []error
	settings := pluginSettings(c, log)
	for _, p := range settings.Plugins {
		info, err := pluginhost.Check(ctx, settings, p)
		if err != nil {
			errs = append(errs, c.Wrong("plugin."+p.Name, err))
			continue
		}
		for _, pool := range c.Pools {
			if pool.Runtime == p.Name {
				if err := checkClaims(p.Name, info); err != nil {
					errs = append(errs, c.Wrong("pool."+pool.Name, err))
				}
			}
		}
	}
	return errors.Join(errs...)
}

// addPlugins adds the plugins' runtimes to a base. Health shows a plugin that is not the
// default runtime, but the server can serve without it.
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
	b.checks = append(b.checks, poolChecks(c, drivers)...)
}

// pluginPatience is how long background work waits for plugins to start.
const pluginPatience = 5 * time.Second

// awaitPlugins waits until the plugins have started, before background work begins. Its
// first pass could not read a plugin that has not started, and the next pass comes a
// minute later.
func (b *base) awaitPlugins(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, pluginPatience)
	defer cancel()
	_ = b.plugins.AwaitStart(ctx) // the host logs those that failed
}

// describeRuntimes returns the runtimes. The version of a plugin is not known while the
// plugin does not run.
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
