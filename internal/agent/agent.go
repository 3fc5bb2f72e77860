// Package agent runs a Bivouac server, one replica, from a configuration. [Run] puts the
// store, the runtime drivers, the scheduler and the API together, starts them, and stops
// them in order. It is the only package that may import all others.
//
// The package has no rules about sessions.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	stdlog "log" //nolint:depguard // it is sent to the hclog.Logger
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/agent/httpserver"
	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/store/consul"
	"github.com/bivouac/bivouac/internal/version"
	"github.com/bivouac/bivouac/internal/web"
	"github.com/bivouac/bivouac/scheduler"
)

const (
	// drainLimit is how long requests may take to finish when the server stops. After
	// that the scheduler ends its operations.
	drainLimit = 25 * time.Second
	// undoLimit is how long the operations may then take to undo what they began. What is
	// left is settled by another replica, or by this one after its restart.
	undoLimit = 8 * time.Second
	// answerLimit is how long the responses to them may take. Connections that are left
	// then are closed.
	answerLimit = 2 * time.Second
	// stopLimit is how long the whole server may take to stop.
	stopLimit = 45 * time.Second
)

// Environment is the environment of a Bivouac server process.
type Environment struct {
	Program string    // the command that started this program, for the output of -dev
	Stdout  io.Writer // for the output of -dev
	Stderr  io.Writer // for the log

	Hangups <-chan os.Signal // receives each SIGHUP; may be nil

	NotifySocket string // address that the service manager listens on (NOTIFY_SOCKET); may be empty
}

// Validate checks a configuration without requests to Nomad or Consul. It reads the files
// of TLS, and starts each plugin for a moment to check the plugin's configuration.
func Validate(ctx context.Context, c config.Config) error {
	if err := checkRuntime(c); err != nil {
		return err
	}
	err := checkPlugins(ctx, c)
	_, _, tlsErr := newTLS(c)
	err = errors.Join(err, tlsErr)
	if !c.Dev {
		_, storeErr := newConsul(c, consul.Config{}, hclog.NewNullLogger())
		err = errors.Join(storeErr, err)
	}
	if usesNomad(c) {
		_, runtimeErr := newNomad(c, nil, hclog.NewNullLogger())
		err = errors.Join(err, runtimeErr)
	}
	_, callersErr := newCallers(c, nil, hclog.NewNullLogger()) //nolint:contextcheck // reading a file takes no time
	return errors.Join(err, callersErr)
}

// Run runs a replica until ctx ends. It returns nil once all parts have stopped, or an
// error if that takes more than 45 seconds. If a part fails, Run stops the others and
// returns the error.
func Run(ctx context.Context, c config.Config, env Environment) (err error) {
	log := hclog.New(&hclog.LoggerOptions{
		Name: "bivouac", Level: hclog.LevelFromString(c.LogLevel), JSONFormat: c.LogJSON, Output: env.Stderr,
	})
	// net/http writes one message only to the standard logger: that a server sent an
	// unsolicited response, such as Consul's 429 on one connection too many.
	stdlog.SetFlags(0)
	stdlog.SetOutput(log.Named("net").StandardWriter(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}))
	// Listen first: if another server has an address, nothing of that server may be
	// touched.
	front, err := listen(ctx, c, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, httpserver.Close(front.listeners)) }()
	if c.Dev {
		// The names of a -dev server's files on this machine contain its first address.
		// Port 0 would not be unique.
		c.HTTPAddrs = front.addresses()
		lock, err := lockDev(ctx, c.HTTPAddrs[0])
		if err != nil {
			return err
		}
		end, err := startDevCleanup(ctx, log, env.Stderr)
		if err != nil {
			return errors.Join(err, lock.Close())
		}
		defer func() { err = errors.Join(err, lock.Close(), end()) }()
	}
	telemetry, err := newTelemetry(ctx, log)
	if err != nil {
		return err
	}
	metrics, err := newMetrics(telemetry.meter)
	if err != nil {
		return fmt.Errorf("agent: metrics: %w", err)
	}
	auditLog, err := openAudit(c, env.Stdout, metrics, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeSinks(auditLog.Sinks)) }()
	actual := c
	actual.HTTPAddrs = front.addresses()       // with the ports that were chosen
	base, err := newBase(actual, metrics, log) //nolint:contextcheck // a request is measured even if its caller has gone
	if err != nil {
		return err
	}
	if front.secure != nil {
		base.credentials["http_tls"] = front.secure
	}
	base = withFailpoints(base)
	domain := scheduler.Config{
		Store:           base.store,
		Locker:          base.locker,
		Drivers:         base.drivers,
		DefaultRuntime:  c.Runtime,
		TTL:             c.TTL,
		MaxTTL:          c.MaxTTL,
		MaxSessions:     c.MaxSessions,
		Pools:           c.Pools,
		CleanupInterval: c.CleanupInterval,
		VolumeRoots:     c.VolumeRoots,
		Logger:          log,
		Meter:           telemetry.meter,
		Tracer:          telemetry.tracer,
		Now:             base.now,
	}
	if len(auditLog.Sinks) > 0 {
		domain.Audit = auditLog
	}
	sessions, err := scheduler.New(domain)
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	callers, err := newCallers(c, base.nomad, log) //nolint:contextcheck // as above
	if err != nil {
		return err
	}
	watched := callers.credentials
	maps.Copy(watched, base.credentials)
	metrics.certificates = watched
	connections, err := maxConnections()
	if err != nil {
		return err
	}
	self := describe(c)
	settings := api.Config{
		Sessions: sessions,
		Store:    base.storeName,
		Checks: slices.Concat(base.checks, callers.checks, []api.Check{
			{Name: "certificates", Run: certificates(watched).health, Optional: true},
			{Name: "sessions", Run: sessions.Health, Optional: true},
		}),
		Metrics:  telemetry.handler,
		Self:     self,
		Instance: base.instance,
		Runtimes: func(ctx context.Context) []wire.Runtime { return describeRuntimes(ctx, base.drivers) },
		Replicas: base.replicas,
		Logger:   log.Named("http"),
		Refused:  metrics.refused,
		Known:    httpserver.Keep,
		UI:       web.Handler(),

		Hosts:              hosts(c),
		ClientCertificates: c.TLS.VerifyClient,
		Connections:        connections,
	}
	if len(auditLog.Sinks) > 0 {
		settings.Audit, settings.Checks = auditLog, append(settings.Checks, auditChecks(auditLog)...)
		for _, sink := range auditLog.Sinks {
			watched["audit."+sink.Name()] = sink
		}
	}
	if callers.authenticator != nil {
		settings.Authenticate = callers.authenticator.Authenticate
	}
	if base.operator != nil {
		base.operator.adopt = sessions.Adopt
		settings.Operator = base.operator
	}
	handler := api.New(settings)
	server := httpserver.New(handler, connections, log.Named("http"))
	server.RegisterOnShutdown(handler.Stop)

	watcher := &credentials.Watcher{Items: watched, Logger: log, Failed: metrics.reloadFailed}
	manager := serviceManager{socket: env.NotifySocket, log: log}
	prepared := make(chan struct{})
	parts := append([]part{
		{"credentials", func(ctx context.Context) error { watcher.Run(ctx); return nil }},
		// Not before the server is prepared: the end of a reload would be taken for the
		// end of the start.
		{"hangups", whenReady(prepared, func(ctx context.Context) error {
			return manager.reloadOnHangup(ctx, env.Hangups, watcher.Reload)
		})},
		{"telemetry", telemetry.run},
	}, base.parts...)
	parts = append(parts, callers.parts...)
	parts = append(parts,
		part{"start", func(ctx context.Context) error {
			if err := base.prepare(ctx); err != nil {
				return err
			}
			close(prepared)
			<-ctx.Done()
			return nil
		}},
		part{"scheduler", whenReady(prepared, whenReady(base.identified, func(ctx context.Context) error {
			base.awaitPlugins(ctx)
			// Other replicas continue this replica's unfinished background work.
			defer context.AfterFunc(ctx, func() { sessions.End(ctx) })()
			sessions.Run(ctx)
			return nil
		}))},
		part{"http", whenReady(prepared, func(ctx context.Context) error {
			return serve(ctx, server, front.listeners, handler.Wait, sessions.End, log)
		})},
		part{"notify", whenReady(prepared, manager.run)}, // last, because the last part is stopped first
	)
	if c.Dev {
		parts = append(parts, part{"guide", whenReady(prepared, func(ctx context.Context) error {
			if err := guide(env, c, front.url(), base.volume); err != nil {
				log.Warn("guide_not_printed", "error", err)
			}
			<-ctx.Done()
			return nil
		})})
	}
	log.Info("agent_started", "version", self.Version, "revision", self.Revision,
		"http_addr", strings.Join(front.addresses(), ", "), "runtime", c.Runtime, "instance", c.Instance)
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

// serve serves until ctx ends or a listener fails, and then waits up to drainLimit for
// requests to finish, and calls wait for those that have taken their connection over,
// because the server does not. After drainLimit it calls end. The context of end bounds how
// long operations may take to undo what they began.
func serve(ctx context.Context, server *http.Server, listeners []net.Listener, wait func(context.Context) error, end func(context.Context), log hclog.Logger) error {
	serving, serveCtx := errgroup.WithContext(ctx)
	for _, listener := range listeners {
		serving.Go(func() error {
			if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		})
	}
	<-serveCtx.Done()
	log.Info("agent_stopping")
	ctx = context.WithoutCancel(ctx)
	undo, cancelUndo := context.WithTimeout(ctx, drainLimit+undoLimit)
	defer cancelUndo()
	answer, cancelAnswer := context.WithTimeout(ctx, drainLimit+undoLimit+answerLimit)
	defer cancelAnswer()
	defer time.AfterFunc(drainLimit, func() {
		log.Warn("requests_ended", "after", drainLimit)
		end(undo)
	}).Stop()
	if err := server.Shutdown(answer); err != nil {
		log.Warn("requests_cut_off", "after", drainLimit+undoLimit+answerLimit, "error", err)
		if err := server.Close(); err != nil {
			log.Warn("http_close_failed", "error", err)
		}
	}
	if err := wait(answer); err != nil {
		log.Warn("connections_left", "error", err)
	}
	return serving.Wait()
}
