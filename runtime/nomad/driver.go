// Package nomad runs sandboxes as Nomad batch jobs. Each session has one job with
// one group and one allocation.
//
// [New] returns a [Driver], and [Driver.Run] follows Nomad's events for it. The
// driver does not rely on everything that Nomad reports:
//
//   - A sandbox is ready when its endpoint answers. Nomad's status comes up to a
//     second later.
//   - A sandbox is stopped when the Nomad client has reported the end of every
//     allocation, or has removed it for a Delete. A dead job, a successful
//     deregistration and the status "lost" prove nothing.
//   - A sandbox is its allocation. If Nomad makes a second allocation for a job,
//     the driver stops it and never returns it.
//   - A sandbox is one run of its main tasks. If Nomad starts one of them again in
//     the same allocation, or if one ends while other tasks run on, the sandbox is
//     dead and the driver stops what still runs.
//   - If a stopped job is registered again, the driver stops it again.
//
// If Nomad has ACLs enabled, the driver needs a token with this policy for the
// jobs' namespace. register-job, deregister-job and purge-job together can replace
// submit-job. Deletes of new sandboxes then take up to a second longer, unless the policy
// also has gc-allocation, which Nomad knows since version 1.11. read-logs is for
// [Driver.Logs], and for faster starts on Docker:
//
//	namespace "default" { capabilities = ["list-jobs", "read-job", "submit-job", "read-logs"] }
//	node { policy = "read" }
//	operator { policy = "read" } # to see whether the eval broker is paused
//
// To run commands in sandboxes, it also needs alloc-exec, and alloc-node-exec for
// raw_exec. To make and claim spares, it needs read-job in the namespace of the job that runs
// the node helpers, to find them by their service, bivouac-node. A template that mounts a host volume also needs a host_volume rule. If Nomad denies
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

// Config is the configuration of a [Driver]. Token, Region, Instance, Helper, Dial and
// Observe are optional.
type Config struct {
	Client   *api.Client
	Template *jobs.Template
	// Token is sent with each request. Without it the client's own token is used.
	Token Token
	// Region is the region of the client's requests, if it is not that of the agent that
	// it asks. Exec cannot ask the client for it.
	Region string
	// Instance is the ID of the Bivouac instance. The driver does not list or watch
	// sandboxes of other instances. [Driver.SetInstance] can set it later.
	Instance string
	Logger   hclog.Logger
	// Helper talks to the node helpers, which spares need. If it is nil, the driver refuses
	// to make spares and to claim them.
	Helper Helper
	// HelperNamespace is the Nomad namespace of the job that runs the node helpers. It is
	// optional: the default is the namespace of the sandboxes.
	HelperNamespace string
	// Dial opens the connections of ready checks; see [ready.Check].
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Observe is called after each request to Nomad, other than for the event stream.
	// The operation is "read", "write", "look" for a question whether a task has started or
	// ended, "check" for a request by Health, or "exec" for the start of a command or of its guard.
	// The status is 0 if the request succeeded or there was no answer.
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
	ownStops  *recent[struct{}] // session IDs that this driver stopped
	namespace string
	region    string
	requests  chan struct{} // one token for each running request
	execs     chan struct{} // one token for each command
	looks     chan struct{} // the same for questions whether a task has started or ended
	starts    startTimes
	logReads  chan struct{} // one token for each log that is being read
	health    health

	helper          Helper // nil: no spares
	helperNamespace string
	helpers         helpers
	variant         string // of spares; empty if there are none
	eligibility     eligibility

	streamFault atomic.Pointer[error]     // why the event stream brings nothing; nil if it does, or if Nomad is down
	mayWrite    atomic.Pointer[time.Time] // when Health last saw that the token may write

	registered *recent[struct{}] // job IDs that this driver asked Nomad to register
	refused    *recent[struct{}] // those of them that Nomad never accepted
}

var (
	_ runtime.Driver        = (*Driver)(nil)
	_ runtime.Watcher       = (*Driver)(nil)
	_ runtime.Explainer     = (*Driver)(nil)
	_ runtime.HealthChecker = (*Driver)(nil)
	_ runtime.ChatFinder    = (*Driver)(nil)
	_ runtime.Claimer       = (*Driver)(nil)
	_ runtime.Prober        = (*Driver)(nil)
	_ runtime.LogReader     = (*Driver)(nil)
	_ runtime.Execer        = (*Driver)(nil)
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
	variant := ""
	if config.Helper != nil {
		variant = config.Template.Variant()
	}
	return &Driver{
		client:    config.Client,
		token:     config.Token,
		template:  config.Template,
		instance:  instance,
		logger:    config.Logger,
		dial:      config.Dial,
		observe:   config.Observe,
		cache:     newCache(instance),
		ownStops:  newRecent[struct{}](maxRecent),
		namespace: config.Template.Namespace(),
		region:    config.Region,
		requests:  make(chan struct{}, maxRequests),
		execs:     make(chan struct{}, maxExecs),
		looks:     make(chan struct{}, maxLooks),
		logReads:  make(chan struct{}, maxLogReads),
		health:    health{turn: make(chan struct{}, 1)},

		helper:          config.Helper,
		helperNamespace: config.HelperNamespace,
		variant:         variant,

		registered: newRecent[struct{}](maxRecent),
		refused:    newRecent[struct{}](maxRecent),
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
	if d.helper != nil {
		workers.Go(func() { d.followHelpers(ctx) })
	}
	return d.follow(ctx)
}

// Current waits until Run follows Nomad's events and has read everything before
// them, or until ctx ends. The driver also works before that, but makes more
// requests.
func (d *Driver) Current(ctx context.Context) error {
	if err := d.cache.became.Wait(ctx, func() bool { return d.cache.current }); err != nil {
		return fmt.Errorf("nomad: follow events: %w", err)
	}
	return nil
}

// Info implements [runtime.Driver].
func (d *Driver) Info(context.Context) (runtime.Info, error) {
	return runtime.Info{Name: "nomad", Version: version.Get().Version, Variant: d.variant}, nil
}
