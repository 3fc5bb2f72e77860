package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/httpapi"
	"github.com/bivouac/bivouac/internal/httpapi/wire"
	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/runtime"
)

func newPluginHost(c config.Config, log hclog.Logger) (*pluginhost.Host, error) {
	settings := pluginhost.Config{Dir: c.PluginDir, Instance: c.Instance, Logger: log}
	if c.Dev {
		settings.Instance = devInstance(c.HTTPAddr)
	}
	for _, p := range c.Plugins {
		settings.Plugins = append(settings.Plugins, pluginhost.Plugin{
			Name: p.Name, Path: p.Path, Args: p.Args, Env: p.Env, Config: p.Config, SHA256: p.SHA256,
		})
	}
	host, err := pluginhost.New(settings)
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	return host, nil
}

// devInstance names an agent of -dev to its plugins. It ends all sandboxes of
// its name, so the name is that of no other agent of this machine.
func devInstance(addr string) string {
	return "dev-" + strings.Trim(regexp.MustCompile(`[^a-z0-9]+`).ReplaceAllString(addr, "-"), "-")
}

// withPlugins adds the plugins' runtimes to a base.
func withPlugins(b base, c config.Config, log hclog.Logger) (base, error) {
	if len(c.Plugins) == 0 {
		return b, nil
	}
	host, err := newPluginHost(c, log)
	if err != nil {
		return base{}, err
	}
	b.parts = append(b.parts, part{"plugins", func(ctx context.Context) error { host.Run(ctx); return nil }})
	plugins := map[string]runtime.Driver{}
	for name, driver := range host.Drivers() {
		plugins[name] = driver
		b.checks = append(b.checks, httpapi.Check{Name: "plugin." + name, Run: driver.Health})
	}
	maps.Copy(b.drivers, plugins)
	if c.Dev {
		b.prepare = func(ctx context.Context) { endLeftovers(ctx, host, plugins, log) }
		b.parts = append(b.parts, part{"sandboxes of plugins", func(ctx context.Context) error {
			<-ctx.Done()
			return errors.Join(slices.Collect(maps.Values(endEach(context.WithoutCancel(ctx), plugins)))...)
		}})
	}
	return b, nil
}

// endLeftovers ends what an agent of -dev that was killed has left on plugins.
// What a plugin that does not come up has left is told, and is in nobody's way:
// sessions of this agent have IDs of their own.
func endLeftovers(ctx context.Context, host *pluginhost.Host, plugins map[string]runtime.Driver, log hclog.Logger) {
	_ = host.AwaitStart(ctx) // the host tells of those that failed, and so does what follows
	for name, err := range endEach(ctx, plugins) {
		if ctx.Err() == nil {
			log.Warn("leftovers_not_ended", "runtime", name, "error", err)
		}
	}
}

// endEach deletes every sandbox of the drivers, and returns what failed.
func endEach(ctx context.Context, drivers map[string]runtime.Driver) map[string]error {
	failed := map[string]error{}
	for name, driver := range drivers {
		if err := endAll(ctx, driver); err != nil {
			failed[name] = fmt.Errorf("runtime %s: %w", name, err)
		}
	}
	return failed
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
