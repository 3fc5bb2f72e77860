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
//   - A sandbox is one run of its main tasks. If Nomad starts one of them again
//     in the same allocation, or one ends while other tasks run on, the sandbox
//     is dead, and what still runs is stopped.
//   - A job that is registered once more, over its stop, is stopped again.
//
// With ACLs, Nomad wants a token with this policy, of the namespace that the jobs
// are in, or with register-job, deregister-job and purge-job for submit-job:
//
//	namespace "default" { capabilities = ["list-jobs", "read-job", "submit-job"] }
//	node { policy = "read" }
//	operator { policy = "read" } # to tell that the eval broker is paused
//
// A template that mounts a host volume needs a host_volume rule as well.
//
// The package must never know of sessions' records, locks or expiry. It changes
// nothing in Nomad that does not bear its instance's name and the ID of the
// session that the job is named for.
package nomad

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/version"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// Config is what a driver works with. All fields but Instance, Dial and Observe
// are required.
type Config struct {
	Client   *api.Client
	Template *jobs.Template
	// Instance is the ID of the replicas that work together. Sandboxes of other
	// instances are neither listed nor watched. It may be left to
	// [Driver.SetInstance].
	Instance string
	Logger   hclog.Logger
	// Dial reaches sandboxes to ask whether they are ready; see [ready.Check].
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Observe is told of each request to Nomad whether it was a "read", a "write"
	// or a "check" of Health, how long it took, and its status, 0 for success or if
	// there was no answer. The event stream is not among them.
	Observe func(operation string, took time.Duration, status int, err error)
}

// Driver is the runtime driver for Nomad. [Driver.Run] has to run for it to work
// well: without that each question costs requests to Nomad.
type Driver struct {
	client    *api.Client
	template  *jobs.Template
	instance  *instance
	logger    hclog.Logger
	dial      func(ctx context.Context, network, address string) (net.Conn, error)
	observe   func(operation string, took time.Duration, status int, err error)
	cache     *cache
	ownStops  *recent // session IDs that this driver stopped
	namespace string
	requests  chan struct{} // one token for each request under way
	checks    chan struct{} // and for each that Health makes

	streamDenied atomic.Pointer[string]    // Nomad's words, nil if it lets this driver follow events
	mayWrite     atomic.Pointer[time.Time] // when Health last saw that it may

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
	case config.Logger == nil:
		return nil, fmt.Errorf("nomad: %w: no logger", runtime.ErrInvalid)
	}
	if config.Observe == nil {
		config.Observe = func(string, time.Duration, int, error) {}
	}
	instance := &instance{id: config.Instance}
	return &Driver{
		client:    config.Client,
		template:  config.Template,
		instance:  instance,
		logger:    config.Logger,
		dial:      config.Dial,
		observe:   config.Observe,
		cache:     newCache(instance),
		ownStops:  newRecent(),
		namespace: config.Template.Namespace(),
		requests:  make(chan struct{}, maxRequests),
		checks:    make(chan struct{}, maxChecks),

		registered: newRecent(),
		refused:    newRecent(),
	}, nil
}

// SetInstance says for which instance the driver works. What bears the legacy
// ID, if there is one, is the instance's as well. It is called before Run, and
// before the driver is asked about sandboxes.
func (d *Driver) SetInstance(id, legacy string) { *d.instance = instance{id, legacy} }

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
