// Package nomad runs sandboxes as Nomad batch jobs: one job, one group and one
// allocation for each session.
//
// What Nomad is asked, and what is believed of its answers:
//
//   - Ready is what the sandbox's endpoint says. Nomad's status comes up to a
//     second late.
//   - Stopped is what the client says of every allocation. A dead job, a
//     deregistration that returned and the status "lost" prove nothing.
//   - A sandbox is its allocation. A second one for the same job is never
//     handed out, and is stopped.
//   - A job that is registered once more, over its stop, is stopped again.
//
// The package must never know of sessions' records, locks or expiry. It changes
// nothing in Nomad that does not bear its instance's name and the ID of the
// session that the job is named for.
package nomad

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/version"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// Config is what a driver works with. All fields but Dial are required.
type Config struct {
	Client   *api.Client
	Template *jobs.Template
	// Instance names the replicas that work together. Sandboxes of other
	// instances are neither listed nor watched.
	Instance string
	Logger   hclog.Logger
	// Dial reaches sandboxes to ask whether they are ready; see [ready.Check].
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Driver is the runtime driver for Nomad. [Driver.Run] has to run for it to work
// well: without that each question costs requests to Nomad.
type Driver struct {
	client    *api.Client
	template  *jobs.Template
	instance  string
	logger    hclog.Logger
	dial      func(ctx context.Context, network, address string) (net.Conn, error)
	cache     *cache
	ownStops  *recent // session IDs that this driver stopped
	namespace string
	requests  chan struct{} // one token for each request under way

	registered *recent // job IDs that this driver asked Nomad to register
	refused    *recent // those of them that Nomad never took
}

var (
	_ runtime.Driver        = (*Driver)(nil)
	_ runtime.Watcher       = (*Driver)(nil)
	_ runtime.HealthChecker = (*Driver)(nil)
	_ runtime.ChatFinder    = (*Driver)(nil)
	_ runtime.Prober        = (*Driver)(nil)
)

// New returns a driver. It asks Nomad nothing yet.
func New(config Config) (*Driver, error) {
	switch {
	case config.Client == nil:
		return nil, fmt.Errorf("nomad: %w: no client", runtime.ErrInvalid)
	case config.Template == nil:
		return nil, fmt.Errorf("nomad: %w: no job template", runtime.ErrInvalid)
	case config.Instance == "":
		return nil, fmt.Errorf("nomad: %w: no instance name", runtime.ErrInvalid)
	case config.Logger == nil:
		return nil, fmt.Errorf("nomad: %w: no logger", runtime.ErrInvalid)
	}
	return &Driver{
		client:    config.Client,
		template:  config.Template,
		instance:  config.Instance,
		logger:    config.Logger,
		dial:      config.Dial,
		cache:     newCache(config.Instance),
		ownStops:  newRecent(),
		namespace: config.Template.Namespace(),
		requests:  make(chan struct{}, maxRequests),

		registered: newRecent(),
		refused:    newRecent(),
	}, nil
}

// Run follows Nomad's events until ctx ends, and returns ctx's error. One Run
// serves all callers of the driver.
func (d *Driver) Run(ctx context.Context) error {
	var workers sync.WaitGroup
	defer workers.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	workers.Go(func() { d.guard(ctx) })
	workers.Go(func() { d.cache.sweepUntil(ctx) })
	return d.follow(ctx)
}

// Current waits until Run follows Nomad's events and what stood before them is
// read, or until ctx ends. Nothing needs it to be so, but it is cheaper.
func (d *Driver) Current(ctx context.Context) error {
	f, done := d.cache.subscribe()
	defer done()
	for !d.cache.isCurrent() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("nomad: follow events: %w", ctx.Err())
		case <-f.C:
		}
	}
	return nil
}

// Info implements [runtime.Driver].
func (d *Driver) Info(context.Context) (runtime.Info, error) {
	return runtime.Info{Name: "nomad", Version: version.Get().Version}, nil
}

// Health implements [runtime.HealthChecker]: Nomad answers, has a leader, and
// lets this driver read jobs, which it asks no token for to tell its leader.
func (d *Driver) Health(ctx context.Context) error {
	var leader string
	err := d.ask(ctx, func(opts *api.QueryOptions) error {
		_, err := d.client.Raw().Query("/v1/status/leader", &leader, opts)
		return err
	})
	if err == nil && leader == "" {
		err = errors.New("no leader")
	}
	if err != nil {
		return fmt.Errorf("nomad: %w: %w", runtime.ErrUnavailable, err)
	}
	err = d.ask(ctx, func(opts *api.QueryOptions) error {
		opts.Prefix, opts.PerPage = jobs.IDPrefix, 1
		_, _, err := d.client.Jobs().List(opts)
		return err
	})
	if err != nil {
		return failed(ctx, "list jobs", err)
	}
	return nil
}
