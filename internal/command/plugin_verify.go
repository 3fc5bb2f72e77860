package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/conformance"
)

var errNotConforming = errors.New("the plugin does not do all that a runtime must")

func pluginVerifyCommand(t terminal) *command {
	c := newCommand(t, "plugin verify")
	c.args = "PLUGIN"
	c.synopsis = "Check that a plugin does what a runtime must"
	c.about = `Runs the plugin as an agent would and goes through the conformance suite of
package runtime/conformance with it, as a Go author's own tests do. It makes
some dozens of sandboxes, ten at a time, kills the plugin now and then, and
deletes what it made. Prints a verdict on each requirement. Exits with 1 where
one is not met.`
	c.example = `$ bivouac plugin verify -plugin-config='{"image":"busybox"}' ./my-runtime`
	flags := newPluginFlags(c)
	settings := c.flags.String("plugin-config", "", "`JSON` object that the plugin is configured with. (default as its block says)")
	demo := c.flags.Bool("demo", false, "What runs in the sandboxes is bivouac demo-sandbox: ask each what it was told.")
	level := c.flags.String("log-level", "off", "`LEVEL` of the log: trace, debug, info, warn, error or off.")
	c.run = func(ctx context.Context, args []string) error {
		p, dir, err := flags.find(args[0])
		if err != nil {
			return err
		}
		if *settings != "" {
			p.Config = json.RawMessage(*settings)
		}
		log := hclog.New(&hclog.LoggerOptions{Name: "bivouac", Level: hclog.LevelFromString(*level), Output: c.err})
		host := pluginhost.Config{Dir: dir, Plugins: []pluginhost.Plugin{p}, Instance: "plugin-verify", Logger: log}
		other := host
		other.Instance = "plugin-verify-other"
		return withPlugin(ctx, host, func(h *pluginhost.Host, d runtime.Driver) error {
			return withPlugin(ctx, other, func(_ *pluginhost.Host, foreign runtime.Driver) error {
				restart := func(ctx context.Context, _ runtime.Driver) (runtime.Driver, error) { return d, restart(ctx, h) }
				kept, err := conformance.Verify(ctx, conformance.Harness{
					Open:    func(context.Context) (runtime.Driver, error) { return d, nil },
					Foreign: func(context.Context) (runtime.Driver, error) { return foreign, nil },
					Reopen:  restart,
					Crash:   restart,
					Demo:    *demo,
				}, c.out)
				if err == nil && !kept {
					return errNotConforming
				}
				return err
			})
		})
	}
	return c
}

// restart kills the process of a host's one plugin, and waits for the next.
func restart(ctx context.Context, host *pluginhost.Host) error {
	before := host.Status()[0]
	if before.PID == 0 {
		return errors.New("the plugin is not up, so it cannot be killed")
	}
	if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill the plugin: %w", err)
	}
	look := time.NewTicker(10 * time.Millisecond)
	defer look.Stop()
	for {
		now := host.Status()[0]
		if now.State == pluginhost.StateRunning && now.Restarts > before.Restarts {
			return nil
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return fmt.Errorf("the plugin did not come up again: %w: %s", ctx.Err(), now.Reason)
		}
	}
}
