package agent

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	consulapi "github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	nomadapi "github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/internal/process"
	"github.com/bivouac/bivouac/internal/store/consul"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/nomad"
	"github.com/bivouac/bivouac/scheduler"
)

// base has everything that the scheduler needs: store, locker, clock and drivers.
type base struct {
	store     scheduler.Store
	storeName string // for messages: "Consul at HOST:PORT"; empty with -dev
	locker    scheduler.Locker
	now       func() time.Time
	drivers   map[string]runtime.Driver
	checks    []api.Check
	parts     []part
	prepare   func(ctx context.Context) error // is called while the parts run, before anything is asked of them
	plugins   *pluginhost.Host
	// identified is closed once the drivers know the ID of the instance. Until
	// then they are asked about no sandbox.
	identified chan struct{}
	instance   func() string // its ID, empty until it is known
	operator   *operator     // nil with -dev
	volume     devVolume     // of -dev
}

func newBase(c config.Config, metrics *metrics, log hclog.Logger) (base, error) {
	if err := checkRuntime(c); err != nil {
		return base{}, err
	}
	host, err := newPluginHost(c, log)
	if err != nil {
		return base{}, err
	}
	if err := metrics.addPlugins(host); err != nil {
		return base{}, fmt.Errorf("agent: metrics: %w", err)
	}
	b, err := newBuiltIn(c, host, metrics, log)
	if err != nil {
		return base{}, err
	}
	b.prepare = func(context.Context) error { return nil }
	b.addPlugins(host, c)
	if c.Dev {
		b.endWithAgent(c, host, log)
	}
	return b, nil
}

// newBuiltIn is a base with what is part of Bivouac itself.
func newBuiltIn(c config.Config, host *pluginhost.Host, metrics *metrics, log hclog.Logger) (base, error) {
	if c.Dev {
		return newDevBase(c, log)
	}
	b := base{drivers: map[string]runtime.Driver{}, identified: make(chan struct{})}
	settings := consul.Config{Instance: c.Instance}
	// No request is made to Nomad or Consul yet: they may start after this server.
	var driver *nomad.Driver
	if usesNomad(c) {
		var err error
		if driver, settings.Place, err = newNomad(c, requests(metrics.nomad), log); err != nil {
			return base{}, err
		}
		settings.Running = driver.Instances
		b.drivers[nomadName] = driver
	}
	store, name, err := newConsul(c, settings, log, requests(metrics.consul))
	if err != nil {
		return base{}, err
	}
	clock := consul.NewClock(store, wall)
	b.store, b.storeName, b.locker, b.now, b.instance = clock, name, clock, clock.Now, store.Instance
	b.operator = &operator{store: store, identified: b.identified}
	b.checks = []api.Check{
		{Name: "consul", Run: clock.Health},
		{Name: "clock", Run: clock.TimeHealth, Optional: true},
	}
	b.parts = []part{
		{"consul", store.Run},
		b.identify(store, driver, host, log),
		{"clock", whenReady(b.identified, clock.Run)},
	}
	if driver != nil {
		b.checks = append(b.checks, api.Check{Name: nomadName, Run: driver.Health, Optional: c.Runtime != nomadName})
		b.parts = append(b.parts, part{"nomad", whenReady(b.identified, driver.Run)})
	}
	return b, nil
}

// nomadName is the default runtime of a server without -dev.
const nomadName = "nomad"

// usesNomad reports whether Nomad is one of the server's runtimes: if it is the default
// runtime, or if anything of it is configured. A server with plugins only needs no Nomad.
func usesNomad(c config.Config) bool {
	if c.Dev {
		return false
	}
	return c.Runtime == nomadName || c.Says("nomad", "job_template", "job_vars") || os.Getenv("NOMAD_ADDR") != ""
}

// checkRuntime refuses to mix sandboxes of one machine with records that all replicas
// share, and records that end with the server with sandboxes that do not. Plugins work
// with both kinds of records.
func checkRuntime(c config.Config) error {
	known := []string{nomadName}
	if c.Dev {
		known = []string{process.Name}
	}
	for _, p := range c.Plugins {
		known = append(known, p.Name)
	}
	if !slices.Contains(known, c.Runtime) {
		return fmt.Errorf("agent: unknown runtime %q (available: %s). The built-in runtime is %q with -dev and %q without; a plugin needs a block in a configuration file",
			c.Runtime, strings.Join(known, ", "), process.Name, nomadName)
	}
	return nil
}

// newConsul returns the store, and what it is called in messages.
func newConsul(c config.Config, settings consul.Config, log hclog.Logger, observe ...consul.Observer) (*consul.Store, string, error) {
	reach := consulapi.DefaultConfig()
	override(&reach.Address, c.Consul.Address)
	override(&reach.Token, c.Consul.Token)
	override(&reach.Datacenter, c.Consul.Datacenter)
	client, err := consul.NewClient(reach, observe...)
	if err != nil && c.Consul.Address == "" {
		return nil, "", fmt.Errorf("CONSUL_HTTP_ADDR: %w", err)
	}
	if err != nil {
		return nil, "", c.Wrong("consul.address", err)
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, "", fmt.Errorf("agent: %w", err)
	}
	settings.Prefix, settings.Name, settings.Logger = c.KVPrefix, host, log.Named("consul")
	store, err := consul.New(client, settings)
	if err != nil {
		return nil, "", c.Wrong("kv_prefix", err)
	}
	return store, "Consul at " + reach.Address, nil
}

// connectNomad returns a client of Nomad and its settings. It makes no request.
func connectNomad(c config.Config) (*nomadapi.Client, *nomadapi.Config, error) {
	settings := nomadapi.DefaultConfig()
	override(&settings.Address, c.Nomad.Address)
	override(&settings.Region, c.Nomad.Region)
	override(&settings.Namespace, c.Nomad.Namespace)
	override(&settings.SecretID, c.Nomad.Token)
	client, err := nomadapi.NewClient(settings)
	return client, settings, err
}

// newNomad returns a driver, and what tells where in Nomad its sandboxes run.
func newNomad(c config.Config, observe consul.Observer, log hclog.Logger) (*nomad.Driver, func(context.Context) (consul.Place, error), error) {
	client, settings, err := connectNomad(c)
	if err != nil {
		return nil, nil, fmt.Errorf("agent: nomad: %w", err)
	}
	variables, err := jobVariables(c)
	if err != nil {
		return nil, nil, err
	}
	template, err := jobs.Load(c.JobTemplate, variables)
	if err != nil {
		return nil, nil, fmt.Errorf("agent: job_template: %w", err)
	}
	driver, err := nomad.New(nomad.Config{
		Client: client, Template: template, Logger: log.Named("nomad"), Observe: observe,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("agent: %w", err)
	}
	namespace := cmp.Or(template.Namespace(), settings.Namespace)
	return driver, place(client, settings.Region, namespace, c.Runtime == nomadName), nil
}

// jobVariables returns the configured job variables. Without a command, the raw_exec
// template runs this program as its demo sandbox.
func jobVariables(c config.Config) (map[string]string, error) {
	if _, told := c.JobVars["command"]; told || c.JobTemplate != "raw_exec" {
		return c.JobVars, nil
	}
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("agent: find this program: %w", err)
	}
	variables := map[string]string{"command": self}
	maps.Copy(variables, c.JobVars)
	return variables, nil
}

// override replaces a value from the environment by a configured one.
func override(setting *string, configured string) {
	if configured != "" {
		*setting = configured
	}
}
