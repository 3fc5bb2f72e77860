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

	"github.com/bivouac/bivouac/runtime"
)

const (
	// LockWait is how long an operation waits for another one on the same
	// chat. It is longer than a replica's death takes to free its locks, and
	// than a start may take, its undoing included, with the limit of 60 s that
	// templates have by default.
	LockWait = 90 * time.Second

	// operationLimit bounds what is done under one lock, so that nothing holds
	// a chat for ever. Drivers have tighter limits of their own.
	operationLimit = 5 * time.Minute

	// stopLimit bounds the wait for a sandbox to end. One that a driver cannot
	// see end by then, because its node is lost or it takes long to stop, stays
	// recorded as stopping, and SettleInFlight goes on with it.
	stopLimit = time.Minute

	// undoLimit bounds the undoing of what a failed operation began. What is
	// not undone by then stays recorded, and is settled later.
	undoLimit = 30 * time.Second

	// maxStarting is how many sandboxes one replica starts at a time. Past it
	// creates are refused with ErrBusy rather than queued: a queue would only
	// turn overload into lateness.
	maxStarting = 128

	// maxReplacing is how many sandboxes one replica stops at a time to replace
	// them. They are counted apart from starts: a lost node, whose sandboxes take
	// long to stop, must not keep other chats from their start.
	maxReplacing = 128

	// workers is how many chats each background pass works on at a time, but for
	// those that are to be settled.
	workers = 8
)

// Config is what a Scheduler is made from. All fields but VolumeRoots are
// required.
type Config struct {
	Store          Store
	Locker         Locker
	Drivers        map[string]runtime.Driver // by name
	DefaultRuntime string                    // a key of Drivers, for creates that name none

	TTL             time.Duration // of a session whose create names none
	MaxTTL          time.Duration // the longest that a caller may ask for
	CleanupInterval time.Duration
	VolumeRoots     []string // if any are set, each volume is directly below one of them, as ROOT/NAME

	Logger hclog.Logger
	Meter  metric.Meter
	Tracer trace.Tracer
	Now    func() time.Time
}

// Scheduler carries out the use cases. It is safe for concurrent use.
type Scheduler struct {
	Config
	metrics   *instruments
	journal   journal
	findings  findings
	starting  chan struct{} // one token per sandbox being started
	replacing chan struct{} // one token per sandbox being stopped for its successor
	creating  creating

	ending, ended       context.Context // see End
	setEnding, setEnded context.CancelFunc
}

// New checks the configuration and returns a Scheduler. Run does its background
// work; the use cases work without it.
func New(c Config) (*Scheduler, error) {
	if _, ok := c.Drivers[c.DefaultRuntime]; !ok {
		return nil, fmt.Errorf("%w: no runtime is named %q", ErrInvalid, c.DefaultRuntime)
	}
	if c.TTL < MinTTL || c.MaxTTL < c.TTL || c.CleanupInterval <= 0 {
		return nil, fmt.Errorf("%w: need %s <= ttl (%s) <= max_ttl (%s) and cleanup_interval (%s) > 0",
			ErrInvalid, MinTTL, c.TTL, c.MaxTTL, c.CleanupInterval)
	}
	c.VolumeRoots = slices.Clone(c.VolumeRoots)
	s := &Scheduler{
		Config:    c,
		starting:  make(chan struct{}, maxStarting),
		replacing: make(chan struct{}, maxReplacing),
	}
	s.ending, s.setEnding = context.WithCancel(context.Background())
	s.ended, s.setEnded = context.WithCancel(context.Background())
	var err error
	if s.metrics, err = newInstruments(c.Meter, c.Store, c.Now); err != nil {
		return nil, fmt.Errorf("scheduler: metrics: %w", err)
	}
	s.Locker = measuredLocker{c.Locker, s.metrics}
	s.journal = journal{now: s.now, readers: []func(context.Context, Event){s.logEvent, s.metrics.countEvent, s.metrics.timeEvent, traceEvent}}
	return s, nil
}

// End tells all operations to end, also those that wait for a lock, and fails
// those that come later, with [ErrShuttingDown]. They undo what they began for
// as long as undo lasts, and then give their locks up. What is not undone by then
// stays recorded, and is settled by another replica.
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

// now is the time as records hold it: of the wall clock alone, which is all that
// another replica could compare it with.
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

// underLock returns a context for what is done under the lease. It does not end
// with the caller's: an operation that has begun is finished or undone, also
// when nobody waits for it any more. It ends when the lock is lost, with
// ErrLockLost as its cause, and when End is called. The returned function frees
// it and must be called.
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

// undoing returns a context for undoing what an operation began, although ctx
// may have ended. The returned function frees it and must be called.
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

// held returns nil while the lock can be vouched for, else ErrLockLost. It is
// asked right before an effect: who slept past the end of its lock may go on
// before its context has ended.
func held(lease Lease) error {
	select {
	case <-lease.Lost():
		return ErrLockLost
	default:
		return nil
	}
}

// unlessHeld says of an error of an effect that it came from the loss of the lock,
// where that is lost by now: who lost it ends what it began.
func unlessHeld(lease Lease, err error) error {
	if lost := held(lease); lost != nil {
		return fmt.Errorf("%w: %w", lost, err)
	}
	return err
}

// runtimeError says what failed in a driver, and gives errors without a known
// kind the one that allows no conclusions.
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
func write(ctx context.Context, lease Lease, next *Session, then Then) error {
	return lockLost(ctx, lease.Write(ctx, next, then))
}

// lockLost says of an error that it came from the loss of the lock, where ctx
// ended by that: what was cut short knows only that it was.
func lockLost(ctx context.Context, err error) error {
	if err == nil || errors.Is(err, ErrLockLost) || !errors.Is(context.Cause(ctx), ErrLockLost) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrLockLost, err)
}

// release gives a lock up that a use case no longer needs. A failure costs the
// chat at most the time until the replica's hold ends, and the use case nothing.
func (s *Scheduler) release(ctx context.Context, lease Lease) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	defer cancel()
	if err := lease.Release(ctx); err != nil {
		s.Logger.Warn("lock_release_failed", "error", Kind(err), "detail", err)
	}
}
