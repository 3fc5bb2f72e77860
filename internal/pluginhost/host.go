// Package pluginhost runs runtime drivers that are separate processes.
//
// A [Host] finds and verifies the plugins' files, starts and configures their
// processes, watches them, and restarts those that crash or hang. Each plugin is a
// runtime.Driver that stays the same over all restarts.
//
// The host does not trust a plugin to behave. A plugin that misbehaves harms at most
// its own sessions. A plugin can do everything on the machine that the host can,
// because it runs with the host's user ID.
//
// The package does not know what a plugin runs its sandboxes on, or who asks for them.
package pluginhost

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/runtime"
)

// Config is the configuration of a Host.
type Config struct {
	// Dir is the folder with the plugins' files. It may be empty if each plugin has a
	// Path.
	Dir string
	// Plugins are the plugins to run. The host ignores other files in Dir.
	Plugins []Plugin
	// Instance is the ID of this Bivouac, for [runtime.Config]. It can be set later
	// with [Host.SetInstance].
	Instance string
	Logger   hclog.Logger
}

// Plugin is a plugin to run.
type Plugin struct {
	// Name is the runtime that sessions ask for, and the name of the plugin's
	// file in Dir. See [runtime.ValidName].
	Name string
	// Path is the plugin's file. If it is empty, the file is in Dir under the plugin's
	// name.
	Path string
	Args []string
	// Env is the plugin's environment. The plugin inherits nothing from the host. The
	// host adds a fixed PATH if Env has none, and the variables that the protocol
	// needs.
	Env map[string]string
	// Config is a JSON object for the plugin's Configure. Nil means "{}".
	Config json.RawMessage
	// SHA256 is the file's checksum in hex, verified before each start. If it is empty,
	// any file is accepted.
	SHA256 string
}

// Host runs plugins.
type Host struct {
	plugins  []*plugin // sorted by name
	launcher *launcher
}

// New returns a host for the configured plugins. Its error names each plugin whose
// configuration is invalid. New starts nothing; [Host.Run] does.
func New(config Config) (*Host, error) {
	return newHost(config, defaultTimings())
}

func newHost(config Config, timings timings) (*Host, error) {
	h := &Host{launcher: newLauncher()}
	var problems []error
	seen := map[string]bool{}
	for _, spec := range config.Plugins {
		p, err := newPlugin(config, spec, h.launcher, timings)
		if err == nil && seen[spec.Name] {
			err = errors.New("configured twice")
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("plugin %q: %w", spec.Name, err))
			continue
		}
		seen[spec.Name] = true
		h.plugins = append(h.plugins, p)
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	slices.SortFunc(h.plugins, func(a, b *plugin) int { return strings.Compare(a.spec.Name, b.spec.Name) })
	return h, nil
}

// SetInstance sets the ID of this Bivouac. Call it before Run.
func (h *Host) SetInstance(id string) {
	for _, p := range h.plugins {
		p.instance = id
	}
}

// Run keeps the plugins running until ctx ends. It returns once their processes are
// gone. Their sandboxes keep running.
func (h *Host) Run(ctx context.Context) {
	h.launcher.run()
	defer h.launcher.close()
	var plugins sync.WaitGroup
	for _, p := range h.plugins {
		plugins.Go(func() { p.run(ctx) })
	}
	plugins.Wait()
}

// AwaitStart waits until the first start of each plugin has succeeded or failed. It
// returns an error that names the plugins that failed, and why. The host still tries to
// start those again.
func (h *Host) AwaitStart(ctx context.Context) error {
	var problems []error
	for _, p := range h.plugins {
		if err := p.awaitStart(ctx); err != nil {
			problems = append(problems, err)
		}
	}
	return errors.Join(problems...)
}

// Drivers returns the plugins' drivers by name. They stay valid for the host's life.
// While a plugin's process is not up, its driver returns [runtime.ErrUnavailable] at
// once.
func (h *Host) Drivers() map[string]*Driver {
	drivers := map[string]*Driver{}
	for _, p := range h.plugins {
		drivers[p.spec.Name] = &Driver{plugin: p}
	}
	return drivers
}

// Status returns the status of each plugin, sorted by name.
func (h *Host) Status() []Status {
	all := make([]Status, 0, len(h.plugins))
	for _, p := range h.plugins {
		all = append(all, p.current())
	}
	return all
}

// State is the state of a plugin.
type State string

// The states of a plugin.
const (
	StateStarting State = "starting" // its process is being started and configured
	StateRunning  State = "running"
	StateWaiting  State = "waiting" // it failed, and will be started again after a pause
	StateStopped  State = "stopped" // the host is not running
)

// Status is the status of a plugin.
type Status struct {
	Name     string
	State    State
	Since    time.Time
	Reason   string // why it is not running, if it is not
	Restarts int    // how many times its process was started again
	PID      int    // 0 if there is no process
	Info     runtime.Info
}
