package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/internal/test/processplugin"
	"github.com/bivouac/bivouac/runtime"
)

const (
	pluginPart = "plugin"
	// These are large because the calls are fast and the difference to be
	// measured is small.
	createsPerRound = 10
	callsPerCreate  = 20
	crashes         = 10
)

// plugin measures the cost of running a driver as a plugin. It compares creates
// and inspects of the same driver linked in and run as a plugin, in turns. Then
// it measures how long the plugin is unavailable after it was killed.
func (w *world) plugin(ctx context.Context, rounds int) (report, error) {
	command := []string{w.binary, "demo-sandbox"}
	spec, err := w.pluginSpec(command)
	if err != nil {
		return nil, err
	}
	linked := new(processplugin.Plugin)
	if err := linked.Configure(ctx, runtime.Config{Instance: "linked-in", JSON: spec.Config}); err != nil {
		return nil, err
	}
	served, err := startPlugin(ctx, spec)
	if err != nil {
		return nil, err
	}
	rows, err := w.besidePlugin(ctx, linked, served.Driver, rounds*createsPerRound)
	served.End()
	if err != nil {
		return nil, err
	}
	restarts, err := w.restarts(ctx, spec)
	return append(rows, restarts...), err
}

// side is one of two drivers that are compared.
type side struct {
	name   string
	driver runtime.Driver
}

// besidePlugin creates and inspects sandboxes through both drivers in turns.
func (w *world) besidePlugin(ctx context.Context, linked, served runtime.Driver, creates int) (report, error) {
	volume, err := w.volume()
	if err != nil {
		return nil, err
	}
	first, second := side{"linked in", linked}, side{"through a plugin", served}
	times := stopwatch{}
	for i := range creates + 1 { // the first one is a warm-up
		if i == 1 {
			clear(times)
		}
		if err := inTurns(ctx, times, volume, first, second); err != nil {
			return nil, err
		}
		first, second = second, first
	}
	var out report
	for _, what := range []string{"create", "repeated create", "inspect"} {
		base := timed(pluginPart, what+" linked in", times[what+" linked in"])
		through := timed(pluginPart, what+" through a plugin", times[what+" through a plugin"])
		through.against(base)
		through.Count, through.Unit = through.P50-base.P50, "ms more at p50"
		out = append(out, base, through)
	}
	return out, nil
}

// inTurns lets each side create a sandbox and then inspect it and repeat the
// create several times. A first create includes the start of the sandbox, whose
// duration varies by more than the difference to be measured. A repeated create
// takes the same path but starts nothing.
func inTurns(ctx context.Context, times stopwatch, volume string, sides ...side) (err error) {
	ids := make([]string, len(sides))
	for i, s := range sides {
		ids[i] = uuid.NewString()
		defer func() { err = errors.Join(err, s.driver.Delete(context.WithoutCancel(ctx), ids[i])) }()
		if err := times.time("create "+s.name, func() error { return createBy(ctx, s.driver, ids[i], volume) }); err != nil {
			return err
		}
	}
	for range callsPerCreate {
		for i, s := range sides {
			if err := times.time("inspect "+s.name, func() error { return inspectBy(ctx, s.driver, ids[i]) }); err != nil {
				return err
			}
			if err := times.time("repeated create "+s.name, func() error { return createBy(ctx, s.driver, ids[i], volume) }); err != nil {
				return err
			}
		}
	}
	return nil
}

func createBy(ctx context.Context, d runtime.Driver, id, volume string) error {
	now := time.Now()
	_, err := d.Create(ctx, runtime.Spec{SessionID: id, ChatID: id, AgentID: "bench",
		VolumeHostPath: volume, CreatedAt: now, ExpiresAt: now.Add(time.Hour)}, func(runtime.Stage) {})
	return err
}

func inspectBy(ctx context.Context, d runtime.Driver, id string) error {
	_, err := d.Inspect(ctx, id)
	return err
}

// restarts measures how long calls fail after the plugin was killed. Each time
// it uses a new host, which has seen no crash, and a sandbox that the next
// plugin process has to find again.
func (w *world) restarts(ctx context.Context, spec pluginhost.Plugin) (report, error) {
	volume, err := w.volume()
	if err != nil {
		return nil, err
	}
	times := stopwatch{}
	for range crashes {
		p, err := startPlugin(ctx, spec)
		if err != nil {
			return nil, err
		}
		id := uuid.NewString()
		err = createBy(ctx, p.Driver, id, volume)
		if err == nil {
			err = times.time("restart", func() error { return crash(ctx, p, id) })
		}
		err = errors.Join(err, p.Driver.Delete(context.WithoutCancel(ctx), id))
		p.End()
		if err != nil {
			return nil, err
		}
	}
	return report{timed(pluginPart, "kill -9 until the next call succeeds", times["restart"])}, nil
}

// servePlugin is the argument that runs this program as the plugin.
const servePlugin = "serve-plugin"

// pluginSpec returns the tests' process driver as a plugin.
func (w *world) pluginSpec(command []string) (pluginhost.Plugin, error) {
	self, err := os.Executable()
	if err != nil {
		return pluginhost.Plugin{}, err
	}
	config, err := json.Marshal(map[string]any{"dir": filepath.Join(w.dir, "plugin"), "command": command})
	return pluginhost.Plugin{Name: "process", Path: self, Args: []string{servePlugin}, Config: config}, err
}

func startPlugin(ctx context.Context, spec pluginhost.Plugin) (*pluginhost.Running, error) {
	return pluginhost.Start(ctx, pluginhost.Config{Instance: "bench", Logger: hclog.NewNullLogger()}, spec)
}

// crash kills the plugin and returns when it answers again.
func crash(ctx context.Context, p *pluginhost.Running, id string) error {
	before := p.Status()
	if err := p.Kill(); err != nil {
		return err
	}
	again := time.NewTicker(time.Millisecond)
	defer again.Stop()
	for {
		err := inspectBy(ctx, p.Driver, id)
		if err == nil && p.Status().Restarts > before.Restarts {
			return nil
		}
		if err != nil && !errors.Is(err, runtime.ErrUnavailable) {
			return err
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
