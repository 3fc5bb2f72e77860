// Package pluginhost runs runtime drivers that are processes of their own: it
// finds and verifies their files, starts them, watches them, restarts those
// that crash or hang, and configures them again. To the scheduler each is a
// runtime.Driver that stays the same over all of that.
//
// A plugin is not trusted to behave: whatever it prints, answers or leaves
// undone costs its own sessions at most. It is trusted with the machine, since
// it runs with the host's user ID.
//
// The package must never know what a plugin runs its sandboxes on, nor who asks
// for them.
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

// Config is what a Host is made from.
type Config struct {
	// Dir is the folder with the plugins' files. It may be empty where each
	// plugin has a Path.
	Dir string
	// Plugins are the plugins to run. Other files in Dir are left alone.
	Plugins []Plugin
	// Instance is the ID of this Bivouac, for [runtime.Config]. It may be left to
	// [Host.SetInstance].
	Instance string
	Logger   hclog.Logger
}

// Plugin is a plugin to run.
type Plugin struct {
	// Name is the runtime that sessions ask for, and the name of the plugin's
	// file in Dir. See [runtime.ValidName].
	Name string
	// Path is the file, where it is not in Dir under the plugin's name.
	Path string
	Args []string
	// Env is the plugin's environment. Nothing of the host's is added but a
	// fixed PATH, where Env has none, and what the protocol needs.
	Env map[string]string
	// Config is a JSON object for the plugin's Configure. Nil means "{}".
	Config json.RawMessage
	// SHA256 is the file's checksum in hex, verified before each start. Empty
	// accepts any file.
	SHA256 string
}

// Host runs plugins.
type Host struct {
	plugins  []*plugin // sorted by name
	launcher *launcher
}

// New returns a host for the configured plugins, and an error that names each
// plugin whose configuration cannot be right. Nothing is started before
// [Host.Run].
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

// SetInstance says the ID of this Bivouac. It is called before Run.
func (h *Host) SetInstance(id string) {
	for _, p := range h.plugins {
		p.instance = id
	}
}

// Run keeps the plugins running until ctx ends. It returns once their processes
// are gone; their sandboxes live on.
func (h *Host) Run(ctx context.Context) {
	launcherDone := make(chan struct{})
	go func() {
		defer close(launcherDone)
		h.launcher.run()
	}()
	var plugins sync.WaitGroup
	for _, p := range h.plugins {
		plugins.Go(func() { p.run(ctx) })
	}
	plugins.Wait()
	h.launcher.close()
	<-launcherDone
}

// AwaitStart waits until each plugin has come up or failed to for the first
// time, and returns an error that names those that failed and why. They are
// started again all the same.
func (h *Host) AwaitStart(ctx context.Context) error {
	var problems []error
	for _, p := range h.plugins {
		if err := p.awaitStart(ctx); err != nil {
			problems = append(problems, err)
		}
	}
	return errors.Join(problems...)
}

// Drivers returns the plugins' drivers by name. They are good for the host's
// life; while a plugin's process is not up, its driver returns
// [runtime.ErrUnavailable] at once.
func (h *Host) Drivers() map[string]*Driver {
	drivers := map[string]*Driver{}
	for _, p := range h.plugins {
		drivers[p.spec.Name] = &Driver{plugin: p}
	}
	return drivers
}

// Status returns how each plugin stands, by name.
func (h *Host) Status() []Status {
	all := make([]Status, 0, len(h.plugins))
	for _, p := range h.plugins {
		all = append(all, p.current())
	}
	return all
}

// State says how a plugin stands.
type State string

// The states of a plugin.
const (
	StateStarting State = "starting" // its process is started and configured
	StateRunning  State = "running"
	StateWaiting  State = "waiting" // it failed, and is started again after a pause
	StateStopped  State = "stopped" // the host does not run
)

// Status is how a plugin stands.
type Status struct {
	Name     string
	State    State
	Since    time.Time
	Reason   string // why it does not run, where it does not
	Restarts int    // how often its process was started again
	PID      int    // 0 while there is no process
	Info     runtime.Info
}
