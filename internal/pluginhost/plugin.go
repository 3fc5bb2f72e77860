package pluginhost

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/internal/broadcast"
	"github.com/bivouac/bivouac/runtime"
)

// timings holds the host's waiting times.
type timings struct {
	start          time.Duration // from a process's start until it is configured
	stop           time.Duration // from asking a process to end until killing it
	healthInterval time.Duration
	healthLimit    time.Duration // for one health check
	minPause       time.Duration // see [backoff.Backoff]
	maxPause       time.Duration
	steady         time.Duration // a process that ran this long starts with minPause again
}

func defaultTimings() timings {
	return timings{
		start:          30 * time.Second,
		stop:           5 * time.Second,
		healthInterval: 5 * time.Second,
		healthLimit:    5 * time.Second,
		minPause:       25 * time.Millisecond,
		maxPause:       30 * time.Second,
		steady:         time.Minute,
	}
}

const (
	healthFailures = 2                      // in a row, before a process is killed
	brokenLimit    = 200 * time.Millisecond // from a failed call to a broken connection
	collectLimit   = time.Second            // from a broken connection to the end of its process

	emptyConfig = "{}"
)

// plugin keeps one plugin running.
type plugin struct {
	spec     Plugin
	dir      string
	instance string
	logger   hclog.Logger
	launcher *launcher
	timings  timings
	owners   owners

	firstTry chan struct{} // closed once the first start has succeeded or failed

	mu       sync.Mutex
	status   Status
	firstErr error     // set before firstTry is closed
	up       *instance // nil while there is none
	changed  broadcast.Cond
}

func newPlugin(config Config, spec Plugin, l *launcher, timings timings) (*plugin, error) {
	if len(spec.Config) == 0 {
		spec.Config = json.RawMessage(emptyConfig)
	}
	if err := spec.Check(config.Dir); err != nil {
		return nil, err
	}
	p := &plugin{
		spec:     spec,
		dir:      config.Dir,
		instance: config.Instance,
		logger:   config.Logger.Named("plugin." + spec.Name),
		launcher: l,
		timings:  timings,
		firstTry: make(chan struct{}),
		status:   Status{Name: spec.Name, State: StateStopped, Since: time.Now(), Reason: "the host has not started it"},
	}
	p.changed.L = &p.mu
	return p, nil
}

// run keeps the plugin running until ctx ends. It returns once the plugin's process is
// gone.
func (p *plugin) run(ctx context.Context) {
	restarts := p.keepRunning(ctx)
	p.set(StateStopped, nil, restarts, nil)
	p.tried(ctx.Err())
}

// keepRunning restarts the plugin until ctx ends. It returns the number of restarts.
func (p *plugin) keepRunning(ctx context.Context) int {
	var failure error
	pause := backoff.Backoff{Min: p.timings.minPause, Max: p.timings.maxPause}
	for restarts := 0; ; restarts++ {
		began := time.Now()
		p.set(StateStarting, failure, restarts, nil)
		failure = p.live(ctx, restarts)
		if ctx.Err() != nil {
			return restarts
		}
		if time.Since(began) >= p.timings.steady {
			pause.Reset()
		}
		next := pause.Next()
		p.set(StateWaiting, failure, restarts, nil)
		p.logger.Error("plugin_failed", "error", failure, "restart_in", next)
		p.tried(failure)
		if backoff.Sleep(ctx, next) != nil {
			return restarts
		}
	}
}

// live runs one process of the plugin from its start to its end. It returns why the
// process ended.
func (p *plugin) live(ctx context.Context, restarts int) error {
	inc, err := p.startInstance(ctx, (*instance).setUp)
	if err != nil {
		return err
	}
	go func() {
		defer close(inc.learned)
		p.learn(ctx, inc)
	}()
	defer func() { <-inc.learned }() // it ends with the process
	p.set(StateRunning, nil, restarts, inc)
	p.logger.Info("plugin_started", "pid", inc.process.pid(), "driver", inc.info.Name, "version", inc.info.Version)
	p.tried(nil)
	err = inc.watch(ctx)
	p.set(StateWaiting, err, restarts, nil) // calls fail from now on
	if ctx.Err() == nil {
		inc.process.kill() // it is dead or does not answer, so do not ask it to end
	}
	inc.stop()
	return err
}

// learnLimit is how long a new process may take to list its existing sandboxes. The
// first Create waits for that.
const learnLimit = 10 * time.Second

// learn records the sandboxes that exist already, above all those of an earlier host,
// so that their containers are not accepted for other sessions.
func (p *plugin) learn(ctx context.Context, inc *instance) {
	ctx, cancel := context.WithTimeout(ctx, learnLimit)
	defer cancel()
	for sandbox, err := range inc.driver.List(ctx) {
		if err != nil {
			p.logger.Debug("sandboxes_not_learnt", "error", err)
			return
		}
		p.owners.claim(sandbox)
	}
}

func (p *plugin) set(state State, why error, restarts int, inc *instance) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status = Status{Name: p.spec.Name, State: state, Since: time.Now(), Restarts: restarts, Info: p.status.Info}
	if why != nil {
		p.status.Reason = printable(why.Error())
	}
	if inc != nil {
		p.status.PID, p.status.Info = inc.process.pid(), inc.info
	}
	p.up = inc
	p.changed.Broadcast()
}

// tried records the result of the first start. Later calls do nothing.
func (p *plugin) tried(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.firstTry:
	default:
		p.firstErr = err
		close(p.firstTry)
	}
}

func (p *plugin) awaitStart(ctx context.Context) error {
	select {
	case <-p.firstTry:
	case <-ctx.Done():
		return p.wrap(ctx.Err())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.firstErr != nil {
		return p.wrap(p.firstErr)
	}
	return nil
}

func (p *plugin) current() Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status
}

// now returns the instance that is up. If there is none, it returns at once an error
// that says why.
func (p *plugin) now() (*instance, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.up != nil:
		return p.up, nil
	case p.status.Reason != "":
		return nil, p.wrap(fmt.Errorf("%w: it is %s: %s", runtime.ErrUnavailable, p.status.State, p.status.Reason))
	}
	return nil, p.wrap(fmt.Errorf("%w: it is %s", runtime.ErrUnavailable, p.status.State))
}

// await returns the instance that is up, or waits for the next one.
func (p *plugin) await(ctx context.Context) (up *instance, err error) {
	err = p.changed.Wait(ctx, func() bool {
		up = p.up
		return up != nil && !up.process.gone() // it may have ended without p.up being updated yet
	})
	return up, err
}

// wrap adds the plugin's name to an error.
func (p *plugin) wrap(err error) error { return fmt.Errorf("plugin %q: %w", p.spec.Name, err) }
