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
		own := pluginhost.Config{Dir: dir, Instance: "plugin-verify", Logger: log}
		other := own
		other.Instance = "plugin-verify-other"
		verified, err := pluginhost.Start(ctx, own, p)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, dropMarks(ctx, own, p), dropMarks(ctx, other, p)) }()
		defer verified.End()
		foreign, err := pluginhost.Start(ctx, other, p)
		if err != nil {
			return err
		}
		defer foreign.End()
		restart := func(ctx context.Context, _ runtime.Driver) (runtime.Driver, error) {
			err := verified.Restart(ctx)
			return verified.Driver, err
		}
		return verify(ctx, c.out, conformance.Harness{
			Open:    func(context.Context) (runtime.Driver, error) { return verified.Driver, nil },
			Foreign: func(context.Context) (runtime.Driver, error) { return foreign.Driver, nil },
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
func dropMarks(ctx context.Context, config pluginhost.Config, p pluginhost.Plugin) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	p.Env = maps.Clone(p.Env)
	if p.Env == nil {
		p.Env = map[string]string{}
	}
	p.Env[pluginwire.DropMarksKey] = "1"
	running, err := pluginhost.Start(ctx, config, p)
	if err != nil {
		return fmt.Errorf("remove the marks of used session IDs: %w", err)
	}
	defer running.End()
	for _, err := range running.Driver.List(ctx) {
		if err != nil {
			return fmt.Errorf("remove the marks of used session IDs: %w", err)
		}
	}
	return nil
}
