// Package agent makes a running replica out of a configuration: it puts the
// store, the runtime drivers, the scheduler and the API together, starts them,
// and stops them in order.
//
// It is where all of Bivouac meets, and the only package that may know all of
// it. What a session is, it must never know.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/httpapi"
	"github.com/bivouac/bivouac/internal/httpapi/wire"
	"github.com/bivouac/bivouac/internal/version"
	"github.com/bivouac/bivouac/scheduler"
)

const (
	// drainLimit is how long requests may take to finish once the agent is
	// told to stop. What is cut off then is settled by another replica, or by
	// this one when it is back.
	drainLimit = 30 * time.Second
	// stopLimit is how long all of the agent may take to stop.
	stopLimit = 45 * time.Second
)

// Environment is what surrounds an agent.
type Environment struct {
	Program string    // how this program was called, for what -dev prints
	Stdout  io.Writer // gets what -dev prints
	Stderr  io.Writer // gets the log
}

// Validate finds what is wrong with a configuration as far as that can be seen
// without starting anything.
func Validate(c config.Config) error {
	if err := checkRuntime(c); err != nil {
		return err
	}
	_, err := newPluginHost(c, hclog.NewNullLogger())
	if !c.Dev {
		_, storeErr := newConsul(c, hclog.NewNullLogger())
		err = errors.Join(storeErr, err)
	}
	if usesNomad(c) {
		_, runtimeErr := newNomad(c, hclog.NewNullLogger())
		err = errors.Join(err, runtimeErr)
	}
	return err
}

// Run runs a replica until ctx ends, and then returns nil once all of it has
// stopped, or an error where that took more than 45 seconds. Where a part of it
// fails it stops the others and returns why.
func Run(ctx context.Context, c config.Config, env Environment) error {
	log := hclog.New(&hclog.LoggerOptions{
		Name: "bivouac", Level: hclog.LevelFromString(c.LogLevel), JSONFormat: c.LogJSON, Output: env.Stderr,
	})
	// The address is taken first: where another agent has it, nothing of that
	// one's may be touched.
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", c.HTTPAddr)
	if err != nil {
		return fmt.Errorf("agent: http_addr: %w", err)
	}
	defer func() { _ = listener.Close() }() // the server has closed it, unless it never got it
	if c.Dev {
		// What it has to itself on this machine goes by the address, and port 0
		// is that of many.
		c.HTTPAddr = listener.Addr().String()
	}
	telemetry, err := newTelemetry(ctx, log)
	if err != nil {
		return err
	}
	base, err := newBase(c, log)
	if err != nil {
		return err
	}
	base = withFailpoints(base)
	sessions, err := scheduler.New(scheduler.Config{
		Store:           base.store,
		Locker:          base.locker,
		Drivers:         base.drivers,
		DefaultRuntime:  c.Runtime,
		TTL:             c.TTL,
		MaxTTL:          c.MaxTTL,
		CleanupInterval: c.CleanupInterval,
		VolumeRoots:     c.VolumeRoots,
		Logger:          log,
		Meter:           telemetry.meter,
		Tracer:          telemetry.tracer,
		Now:             base.now,
	})
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	self := describe(c)
	api := httpapi.New(httpapi.Config{
		Sessions: sessions,
		Checks:   append(base.checks, httpapi.Check{Name: "sessions", Run: sessions.Health, Optional: true}),
		Metrics:  telemetry.handler,
		Self:     self,
		Runtimes: func(ctx context.Context) []wire.Runtime { return describeRuntimes(ctx, base.drivers) },
		Logger:   log.Named("http"),
	})

	prepared := make(chan struct{})
	oncePrepared := func(run func(context.Context) error) func(context.Context) error {
		return func(ctx context.Context) error {
			select {
			case <-prepared:
				return run(ctx)
			case <-ctx.Done():
				return nil
			}
		}
	}
	parts := append([]part{{"telemetry", telemetry.run}}, base.parts...)
	parts = append(parts,
		part{"start", func(ctx context.Context) error {
			if err := base.prepare(ctx); err != nil {
				return err
			}
			close(prepared)
			<-ctx.Done()
			return nil
		}},
		part{"scheduler", oncePrepared(func(ctx context.Context) error {
			base.awaitPlugins(ctx)
			sessions.Run(ctx)
			return nil
		})},
		part{"http", oncePrepared(func(ctx context.Context) error { return serve(ctx, api.Server(), listener, log) })},
	)
	if c.Dev {
		parts = append(parts, part{"guide", oncePrepared(func(ctx context.Context) error {
			return guide(ctx, env, listener.Addr().String(), base.volume)
		})})
	}
	log.Info("agent_started", "version", self.Version, "revision", self.Revision,
		"http_addr", listener.Addr().String(), "runtime", c.Runtime, "instance", c.Instance)
	if err := supervise(ctx, parts, stopLimit); err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	log.Info("agent_stopped")
	return nil
}

func describe(c config.Config) wire.SelfAnswer {
	build := version.Get()
	return wire.SelfAnswer{Version: build.Version, Revision: build.Revision, Config: c.Public()}
}

// serve serves until ctx ends, and then lets requests finish within drainLimit.
func serve(ctx context.Context, server *http.Server, listener net.Listener, log hclog.Logger) error {
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	log.Info("agent_stopping")
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainLimit)
	defer cancel()
	if err := server.Shutdown(drain); err != nil {
		log.Warn("requests_cut_off", "after", drainLimit, "error", err)
		if err := server.Close(); err != nil {
			log.Warn("http_close_failed", "error", err)
		}
	}
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
