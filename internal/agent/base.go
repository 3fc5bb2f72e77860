package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/internal/process"
	"github.com/bivouac/bivouac/internal/store/consul"
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
	// replicas returns the replicas of this Bivouac that run, or nil if they are not known.
	replicas func(ctx context.Context) []wire.Replica
	// credentials are read again while the server runs, by the name that logs have.
	credentials map[string]credentials.Reloader
	nomad       *nomadConnection // nil if no runtime uses Nomad
	operator    *operator        // nil with -dev
	volume      devVolume        // of -dev
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
	if err := checkPools(c, b.drivers); err != nil {
		return base{}, err
	}
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
	b := base{
		drivers: map[string]runtime.Driver{}, identified: make(chan struct{}), credentials: map[string]credentials.Reloader{},
	}
	settings := consul.Config{Instance: c.Instance, Retention: c.Events}
	// No request is made to Nomad or Consul yet: they may start after this server.
	var driver *nomad.Driver
	if usesNomad(c) {
		parts, err := newNomad(c, requests(metrics.nomad), log)
		if err != nil {
			return base{}, err
		}
		driver, settings.Place = parts.driver, parts.place
		settings.Running = driver.Instances
		b.drivers[nomadName], b.nomad = driver, &parts.nomadConnection
		maps.Copy(b.credentials, parts.credentials)
	}
	used, err := newConsul(c, settings, log, requests(metrics.consul))
	if err != nil {
		return base{}, err
	}
	store, clock := used.store, used.clock
	b.store, b.storeName, b.locker, b.now, b.instance = store, used.name, store, clock.Now, store.Instance
	maps.Copy(b.credentials, used.credentials)
	b.replicas = listReplicas(store)
	b.operator = &operator{store: store, identified: b.identified}
	b.checks = []api.Check{
		{Name: "consul", Run: store.Health},
		{Name: "clock", Run: clock.Health, Optional: true},
	}
	b.parts = []part{
		{"consul", store.Run},
		b.identify(store, driver, host, log),
		{"clock", whenReady(b.identified, clock.Run)},
	}
	if driver != nil {
		b.checks = append(b.checks, api.Check{Name: nomadName, Run: driver.Health, Optional: c.Runtime != nomadName})
		b.parts = append(b.parts, part{"nomad", whenReady(b.identified, driver.Run)}, part{"nomad_health", driver.RunHealth})
	}
	return b, nil
}

// nomadName is the default runtime of a server without -dev.
const nomadName = "nomad"

// usesNomad reports whether Nomad is one of the server's runtimes: if it is the default
// runtime, or if anything of it or a pool of it is configured. A server with plugins only
// needs no Nomad.
func usesNomad(c config.Config) bool {
	if c.Dev {
		return false
	}
	pooled := slices.ContainsFunc(c.Pools, func(p scheduler.Pool) bool { return p.Runtime == nomadName })
	return c.Runtime == nomadName || pooled || c.Says("nomad", "job_template", "job_vars") || os.Getenv("NOMAD_ADDR") != ""
}

// checkRuntime refuses to mix sandboxes of one machine with records that all replicas
// share, and records that end with the server with sandboxes that do not. Plugins work
// with both kinds of records.
func checkRuntime(c config.Config) error {
	known := c.Runtimes()
	if !slices.Contains(known, c.Runtime) {
		return fmt.Errorf("agent: unknown runtime %q (available: %s). The built-in runtime is %q with -dev and %q without; a plugin needs a block in a configuration file",
			c.Runtime, strings.Join(known, ", "), process.Name, nomadName)
	}
	return nil
}

// checkHTTPS refuses settings of TLS in the block consul or nomad if its address is not
// https.
func checkHTTPS(c config.Config, block string, secure bool) error {
	if secure || !c.Says(block+".ca_file", block+".cert_file", block+".key_file", block+".tls_server_name") {
		return nil
	}
	return c.Wrong(block, errors.New("TLS needs an address that begins with https://"))
}

// override replaces a value from the environment by a configured one.
func override(setting *string, configured string) {
	if configured != "" {
		*setting = configured
	}
}
