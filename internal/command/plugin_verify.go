package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/internal/pluginwire"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/conformance"
)

var errNotConforming = errors.New("the plugin does not do all that a runtime must")

func pluginVerifyCommand(t terminal) *command {
	c := newCommand(t, "plugin verify")
	c.args = "PLUGIN"
	c.synopsis = "Check that a plugin does what a runtime must"
	c.about = `Runs the plugin as the server would and checks it with the conformance suite of
package runtime/conformance. It creates some dozens of sandboxes, ten at a time,
kills the plugin at some points, and deletes what it created. At the end it
starts the plugin once more with BIVOUAC_DROP_MARKS=1 so that the plugin
removes its marks of used session IDs. It prints a verdict on each requirement
and exits with 1 if one is not met.

Pass -demo if the sandboxes run bivouac demo-sandbox. That program fails on
request and shows without the plugin whether it runs, so that every requirement
can be checked. It reads its orders from a file in the volume, which must be a
folder of this machine.`
	c.example = `$ bivouac plugin verify -demo -plugin-config='{"command":["/usr/bin/bivouac","demo-sandbox"]}' ./my-runtime`
	flags := newPluginFlags(c)
	settings := c.flags.String("plugin-config", "", "`JSON` object with the plugin's configuration. (default from its block)")
	demo := c.flags.Bool("demo", false, "The sandboxes run bivouac demo-sandbox.")
	run := c.flags.String("run", "", "`PATTERN` of the requirements to check: a regular expression for their names.")
	level := c.flags.String("log-level", "off", "`LEVEL` of the log: trace, debug, info, warn, error or off.")
	c.run = func(ctx context.Context, args []string) (err error) {
		p, dir, err := flags.find(args[0])
		if err != nil {
			return err
		}
		if *settings != "" {
			p.Config = json.RawMessage(*settings)
		}
		var pattern *regexp.Regexp
		if *run != "" {
			if pattern, err = regexp.Compile(*run); err != nil {
				return fmt.Errorf("-run: %w", err)
			}
		}
		log, err := pluginLogger(*level, c.err)
		if err != nil {
			return err
		}
		host := pluginhost.Config{Dir: dir, Plugins: []pluginhost.Plugin{p}, Instance: "plugin-verify", Logger: log}
		other := host
		other.Instance = "plugin-verify-other"
		verified, err := startPlugin(ctx, host)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, dropMarks(ctx, host), dropMarks(ctx, other)) }()
		defer func() { verified.end() }() // the current one: a crash replaces it
		foreign, err := startPlugin(ctx, other)
		if err != nil {
			return err
		}
		defer foreign.end()
		restart := func(ctx context.Context, _ runtime.Driver) (runtime.Driver, error) {
			next, err := crash(ctx, verified, host)
			if err != nil {
				return nil, err
			}
			verified = next
			return next.driver, nil
		}
		return verify(ctx, c.out, conformance.Harness{
			Open:    func(context.Context) (runtime.Driver, error) { return verified.driver, nil },
			Foreign: func(context.Context) (runtime.Driver, error) { return foreign.driver, nil },
			Reopen:  restart,
			Crash:   restart,
			Demo:    *demo,
		}, pattern)
	}
	return c
}

// verify runs the requirements, prints the verdict on each as it comes, and then a
// summary. It fails if a requirement is not met.
func verify(ctx context.Context, out io.Writer, h conformance.Harness, pattern *regexp.Regexp) error {
	count := map[conformance.Verdict]int{}
	began := time.Now()
	for result := range conformance.Verify(ctx, h, pattern) {
		count[result.Verdict]++
		if err := showResult(out, result); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	_, err := fmt.Fprintf(out, "\n%d passed, %d failed, %d skipped in %.1f s\n",
		count[conformance.Pass], count[conformance.Fail], count[conformance.Skip], time.Since(began).Seconds())
	switch {
	case err != nil:
		return err
	case len(count) == 0:
		return fmt.Errorf("no requirement's name matches -run=%s", pattern)
	case count[conformance.Fail] > 0:
		return errNotConforming
	}
	return nil
}

func showResult(out io.Writer, r conformance.Result) error {
	text := fmt.Sprintf("%s  %6.2f s  %s\n                required: %s\n", r.Verdict, r.Took.Seconds(), r.Name, r.Requires)
	if r.Reason != "" {
		label := map[conformance.Verdict]string{conformance.Fail: "but", conformance.Skip: "skipped"}[r.Verdict]
		text += fmt.Sprintf("                %s: %s\n", label, strings.ReplaceAll(r.Reason, "\n", "\n                  "))
	}
	_, err := io.WriteString(out, text)
	return err
}

// dropMarks has the plugin remove the data that it keeps to refuse the session IDs that
// this command used.
func dropMarks(ctx context.Context, config pluginhost.Config) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	p := config.Plugins[0]
	p.Env = maps.Clone(p.Env)
	if p.Env == nil {
		p.Env = map[string]string{}
	}
	p.Env[pluginwire.DropMarksKey] = "1"
	config.Plugins = []pluginhost.Plugin{p}
	running, err := startPlugin(ctx, config)
	if err != nil {
		return fmt.Errorf("remove the marks of used session IDs: %w", err)
	}
	defer running.end()
	for _, err := range running.driver.List(ctx) {
		if err != nil {
			return fmt.Errorf("remove the marks of used session IDs: %w", err)
		}
	}
	return nil
}

// crash kills the plugin's process and starts the plugin in a new host. The old host
// would pause before a restart, longer after each crash.
func crash(ctx context.Context, p *runningPlugin, config pluginhost.Config) (*runningPlugin, error) {
	pid := p.host.Status()[0].PID
	if pid == 0 {
		return nil, errors.New("the plugin is not up, so it cannot be killed")
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return nil, fmt.Errorf("kill the plugin: %w", err)
	}
	p.end()
	next, err := startPlugin(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("the plugin did not come up again: %w", err)
	}
	return next, nil
}
