package scheduler

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/time/rate"

	"github.com/bivouac/bivouac/runtime"
)

const (
	// LockWait is how long an operation waits for another one on the same chat. It is
	// longer than the locks of a dead replica last, and longer than a start and its
	// undoing take with the templates' default limit of 60 s.
	LockWait = 90 * time.Second

	// operationLimit bounds an operation under one lock, so that nothing holds a chat
	// for ever. Drivers have tighter limits.
	operationLimit = 5 * time.Minute

	// stopLimit bounds the wait for a sandbox to end. If the driver has not seen its end
	// by then, because its node is lost or its stop takes long, the session stays
	// recorded as stopping, and SettleInFlight continues the stop.
	stopLimit = time.Minute

	// undoLimit bounds the undoing of a failed operation. What is not undone by then
	// stays recorded and is settled later.
	undoLimit = 30 * time.Second

	// maxStarting is how many sandboxes one replica starts at a time. Further creates
	// are refused with ErrBusy instead of queued, because a queue would only make all
	// of them late.
	maxStarting = 128

	// maxReplacing is how many sandboxes one replica stops at a time to replace them.
	// They are not counted as starts: the sandboxes of a lost node take long to stop and
	// must not keep other chats from starting.
	maxReplacing = 128

	// workers is how many chats each background pass works on at a time. Settling has
	// its own limit.
	workers = 8
)

// Config is the configuration of a Scheduler. All fields but VolumeRoots, MaxSessions,
// Pools and Audit are required.
type Config struct {
	Store          Store
	Locker         Locker
	Drivers        map[string]runtime.Driver // by name
	DefaultRuntime string                    // a key of Drivers, for creates without a runtime

	TTL             time.Duration // for creates and renewals without a TTL
	MaxTTL          time.Duration // the longest TTL that a caller may ask for
	CleanupInterval time.Duration
	MaxSessions     int // of all AI agents together; 0: no limit
	Pools           []Pool
	VolumeRoots     []string // if set, each volume must be directly below one of them, as ROOT/NAME

	Logger hclog.Logger
	Meter  metric.Meter
	Tracer trace.Tracer
	Now    func() time.Time
	Audit  Auditor // may be nil
}

// Scheduler implements the use cases. It is safe for concurrent use.
type Scheduler struct {
	Config
	metrics    *instruments
	journal    journal
	findings   findings
	starting   Places // for sandboxes that are being started
	replacing  Places // for sandboxes that are being stopped for their successors
	logPlaces  logPlaces
	creating   sharing
	deleting   sharing
	explaining Places
	quotas     quotas
	counting   counting
	history    *history
	conflicts  *rate.Limiter // of those that are stored
	execs      execPlaces
	spares     spares
	filling    filling

	ending, ended       context.Context // see End
	setEnding, setEnded context.CancelFunc
}

// New checks the configuration and returns a Scheduler. [Scheduler.Run] does its
// background work. The use cases also work without Run.
func New(c Config) (*Scheduler, error) {
	if _, ok := c.Drivers[c.DefaultRuntime]; !ok {
		return nil, fmt.Errorf("%w: unknown default runtime %q", ErrInvalid, c.DefaultRuntime)
	}
	if c.TTL < MinTTL || c.MaxTTL < c.TTL || c.CleanupInterval <= 0 {
		return nil, fmt.Errorf("%w: need %s <= ttl (%s) <= max_ttl (%s) and cleanup_interval (%s) > 0",
			ErrInvalid, MinTTL, c.TTL, c.MaxTTL, c.CleanupInterval)
	}
	if err := c.checkPools(); err != nil {
		return nil, err
	}
	c.VolumeRoots = slices.Clone(c.VolumeRoots)
	s := &Scheduler{
		Config:     c,
		starting:   NewPlaces(maxStarting, "starts", "%d sandboxes are being started"),
		replacing:  NewPlaces(maxReplacing, "replacements", "%d sandboxes are being replaced"),
		explaining: NewPlaces(maxWhy, "explanations", "%d requests of this kind already"),
		counting:   counting{turn: make(chan struct{}, 1)},
		conflicts:  rate.NewLimiter(rate.Every(conflictInterval), conflictsAtOnce),
		logPlaces:  newLogPlaces(),
		execs:      newExecPlaces(),
		filling:    filling{woken: make(chan struct{}, 1)},
	}
	s.ending, s.setEnding = context.WithCancel(context.Background())
	s.ended, s.setEnded = context.WithCancel(context.Background())
	var err error
	if s.metrics, err = newInstruments(c.Meter, c.Store, c.Now); err != nil {
		return nil, fmt.Errorf("scheduler: metrics: %w", err)
	}
	if s.metrics.pools, err = newPoolMetrics(c.Meter, c.Pools, &s.spares); err != nil {
		return nil, fmt.Errorf("scheduler: metrics: %w", err)
	}
	if s.history, err = newHistory(c.Store, c.Meter, c.Now); err != nil {
		return nil, fmt.Errorf("scheduler: metrics: %w", err)
	}
	s.Locker = measuredLocker{c.Locker, s.metrics}
	s.journal = journal{now: s.now, readers: []func(context.Context, Event){s.logEvent, s.metrics.countEvent, s.metrics.timeEvent, traceEvent}}
	if c.Audit != nil {
		s.journal.readers = append(s.journal.readers, c.Audit.Note)
	}
	return s, nil
}

// End ends all operations, including those that wait for a lock, and makes later ones
// fail. All return [ErrShuttingDown]. The running operations undo what they began until
// undo ends, and then release their locks. What is not undone by then stays recorded,
// and another replica settles it.
func (s *Scheduler) End(undo context.Context) {
	context.AfterFunc(undo, s.setEnded)
	s.setEnding()
}

// shuttingDown adds ErrShuttingDown to an error of an operation if it was told to
// end.
func (s *Scheduler) shuttingDown(err error) error {
	if err == nil || s.ending.Err() == nil {
		return err
	}
	if errors.Is(err, ErrShuttingDown) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrShuttingDown, err)
}

// now returns the time as records contain it: without the monotonic clock, because
// other replicas compare it with their wall clocks.
func (s *Scheduler) now() time.Time { return s.Now().UTC().Round(0) }

// driver returns the driver that runs sessions of the named runtime.
func (s *Scheduler) driver(name string) (runtime.Driver, error) {
	d, ok := s.Drivers[name]
	if !ok {
		return nil, fmt.Errorf("%w: runtime %q is not configured in this replica", runtime.ErrUnavailable, name)
	}
	return d, nil
}

// lock takes the chat's lock for a caller. It gives up when End is called.
func (s *Scheduler) lock(ctx context.Context, chatID uuid.UUID, wait time.Duration) (Lease, error) {
	if s.ending.Err() != nil {
		return nil, ErrShuttingDown
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.ending, cancel)()
	return s.Locker.Lock(ctx, chatID, wait)
}

// underLock returns a context for an operation under the lease. It does not end with the
// caller's context: an operation that has begun is finished or undone, even if nobody
// waits for it any more. It ends when the lock is lost, with ErrLockLost as its cause,
// and when End is called. The returned function frees it and must be called.
func (s *Scheduler) underLock(ctx context.Context, lease Lease) (context.Context, func()) {
	ctx, expire := context.WithTimeout(context.WithoutCancel(ctx), operationLimit)
	unhook := context.AfterFunc(s.ending, expire)
	ctx, done := whileHeld(ctx, lease)
	return ctx, func() {
		done()
		unhook()
		expire()
	}
}

// undoing returns a context to undo an operation. ctx may already have ended. The
// returned function frees it and must be called.
func (s *Scheduler) undoing(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	unhook := context.AfterFunc(s.ended, cancel)
	return ctx, func() {
		unhook()
		cancel()
	}
}

// whileHeld returns a context that ends with ctx, or when the lock is lost, with
// ErrLockLost as its cause. The returned function frees it and must be called.
func whileHeld(ctx context.Context, lease Lease) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-lease.Lost():
			cancel(ErrLockLost)
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		cancel(context.Canceled)
		<-watched
	}
}

// held returns ErrLockLost if the lock may be lost, and otherwise nil. It is called
// right before an effect, because a process that was suspended past the end of its lock
// may continue before its context has ended.
func held(lease Lease) error {
	select {
	case <-lease.Lost():
		return ErrLockLost
	default:
		return nil
	}
}

// unlessHeld adds ErrLockLost to err if the lock has been lost. Then the operation ends
// what it began.
func unlessHeld(lease Lease, err error) error {
	if lost := held(lease); lost != nil {
		return fmt.Errorf("%w: %w", lost, err)
	}
	return err
}

// runtimeError adds op to a driver's error. It adds ErrUnavailable if the error has no
// known kind, because then nothing may be concluded from it.
func runtimeError(ctx context.Context, op string, err error) error {
	if err == nil {
		return nil
	}
	err = lockLost(ctx, err)
	if Kind(err) == "internal" {
		return fmt.Errorf("%s: %w: %w", op, runtime.ErrUnavailable, err)
	}
	return fmt.Errorf("%s: %w", op, err)
}

// write writes through the lease.
func write(ctx context.Context, lease Lease, next *Session, then Then, changes ...Change) error {
	return lockLost(ctx, lease.Write(ctx, next, then, changes...))
}

// lockLost adds ErrLockLost to err if the loss of the lock ended ctx. The error itself
// often shows only that ctx ended.
func lockLost(ctx context.Context, err error) error {
	if err == nil || errors.Is(err, ErrLockLost) || !errors.Is(context.Cause(ctx), ErrLockLost) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrLockLost, err)
}

// release releases a lock after a use case. If that fails, the chat stays locked until
// the replica's hold on the lock ends; the use case itself is not affected.
func (s *Scheduler) release(ctx context.Context, lease Lease) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	defer cancel()
	if err := lease.Release(ctx); err != nil {
		s.Logger.Warn("lock_release_failed", "error", Kind(err), "detail", err)
	}
}
