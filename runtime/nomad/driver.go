// Package nomad runs sandboxes as Nomad batch jobs. Each session has one job with
// one group and one allocation.
//
// [New] returns a [Driver], and [Driver.Run] follows Nomad's events for it. The
// driver does not rely on everything that Nomad reports:
//
//   - A sandbox is ready when its endpoint answers. Nomad's status comes up to a
//     second later.
//   - A sandbox is stopped when the Nomad client has reported the end of every
//     allocation. A dead job, a successful deregistration and the status "lost"
//     prove nothing.
//   - A sandbox is its allocation. If Nomad makes a second allocation for a job,
//     the driver stops it and never returns it.
//   - A sandbox is one run of its main tasks. If Nomad starts one of them again in
//     the same allocation, or if one ends while other tasks run on, the sandbox is
//     dead and the driver stops what still runs.
//   - If a stopped job is registered again, the driver stops it again.
//
// If Nomad has ACLs enabled, the driver needs a token with this policy for the
// jobs' namespace. register-job, deregister-job and purge-job together can replace
// submit-job:
//
//	namespace "default" { capabilities = ["list-jobs", "read-job", "submit-job"] }
//	node { policy = "read" }
//	operator { policy = "read" } # to see whether the eval broker is paused
//
// A template that mounts a host volume also needs a host_volume rule. If Nomad denies
// a request, the driver returns [runtime.ErrPermission] with Nomad's words.
//
// The package does not know records, locks or expiry. It changes a job in Nomad
// only if the job's meta has its instance ID and the session ID from the job's
// name.
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

// Config is the configuration of a [Driver]. Token, Instance, Dial and Observe are
// optional.
type Config struct {
	Client   *api.Client
	Template *jobs.Template
	// Token is sent with each request. Without it the client's own token is used.
	Token Token
	// Instance is the ID of the Bivouac instance. The driver does not list or watch
	// sandboxes of other instances. [Driver.SetInstance] can set it later.
	Instance string
	Logger   hclog.Logger
	// Dial opens the connections of ready checks; see [ready.Check].
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Observe is called after each request to Nomad, other than for the event stream.
	// The operation is "read", "write", or "check" for a request by Health. The status
	// is 0 if the request succeeded or there was no answer.
	Observe func(operation string, took time.Duration, status int, err error)
}

// Driver is the runtime driver for Nomad. It works best while [Driver.Run] runs.
// Otherwise each question costs requests to Nomad.
type Driver struct {
	client    *api.Client
	token     Token
	template  *jobs.Template
	instance  *instance
	logger    hclog.Logger
	dial      func(ctx context.Context, network, address string) (net.Conn, error)
	observe   func(operation string, took time.Duration, status int, err error)
	cache     *cache
	ownStops  *recent // session IDs that this driver stopped
	namespace string
	requests  chan struct{} // one token for each running request
	health    health

	streamFault atomic.Pointer[error]     // why the event stream brings nothing; nil if it does, or if Nomad is down
	mayWrite    atomic.Pointer[time.Time] // when Health last saw that the token may write

	registered *recent // job IDs that this driver asked Nomad to register
	refused    *recent // those of them that Nomad never accepted
}

var (
	_ runtime.Driver        = (*Driver)(nil)
	_ runtime.Watcher       = (*Driver)(nil)
	_ runtime.HealthChecker = (*Driver)(nil)
	_ runtime.ChatFinder    = (*Driver)(nil)
	_ runtime.Prober        = (*Driver)(nil)
)

// New returns a driver. It makes no request to Nomad yet.
func New(config Config) (*Driver, error) {
	switch {
	case config.Client == nil:
		return nil, fmt.Errorf("nomad: %w: no client", runtime.ErrInvalid)
	case config.Template == nil:
		return nil, fmt.Errorf("nomad: %w: no job template", runtime.ErrInvalid)
	case config.Logger == nil:
		return nil, fmt.Errorf("nomad: %w: no logger", runtime.ErrInvalid)
	}
	if config.Token == nil {
		config.Token = clientToken{}
	}
	if config.Observe == nil {
		config.Observe = func(string, time.Duration, int, error) {}
	}
	instance := &instance{id: config.Instance}
	return &Driver{
		client:    config.Client,
		token:     config.Token,
		template:  config.Template,
		instance:  instance,
		logger:    config.Logger,
		dial:      config.Dial,
		observe:   config.Observe,
		cache:     newCache(instance),
		ownStops:  newRecent(),
		namespace: config.Template.Namespace(),
		requests:  make(chan struct{}, maxRequests),
		health:    health{turn: make(chan struct{}, 1)},

		registered: newRecent(),
		refused:    newRecent(),
	}, nil
}

// SetInstance sets the instance that the driver works for. Jobs with the legacy ID,
// if it is not empty, belong to the instance too. Call SetInstance before any other
// method.
func (d *Driver) SetInstance(id, legacy string) { *d.instance = instance{id, legacy} }

// Run follows Nomad's events until ctx ends, and returns ctx's error. One call of
// Run serves all users of the driver.
func (d *Driver) Run(ctx context.Context) error {
	var workers sync.WaitGroup
	defer workers.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	workers.Go(func() { d.guard(ctx) })
	workers.Go(func() { d.cache.sweepUntil(ctx) })
	return d.follow(ctx)
}

// Current waits until Run follows Nomad's events and has read everything before
// them, or until ctx ends. The driver also works before that, but makes more
// requests.
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
