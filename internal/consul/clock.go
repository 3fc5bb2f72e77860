package consul

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/scheduler"
)

const (
	// tickInterval is how often the keeper of the time writes it down.
	tickInterval = 2 * time.Second
	// samples is how many of the last ticks a follower goes by. An answer can
	// come late and never early, so of several the latest time is the best; few
	// of them, so that a step of this machine's clock is soon made up for.
	samples = 3
)

// keeperID is the chat whose lock the keeper of the time holds. No caller can
// name it: RFC 9562 reserves it, and its version is none that a UUID has.
var keeperID = uuid.Max

// Clock is the time that all replicas agree on, however far apart the clocks of
// their machines are. One replica keeps it: it writes its time to Consul every
// two seconds, and the others measure how far their clocks are from it as they
// see it come. A keeper that takes over goes on with the time as it knew it, so
// that the agreed time does not jump when a keeper dies. The first keeper of all
// takes its machine's time.
//
// Replicas then differ by what an answer of Consul takes to arrive, not by what
// their machines differ. It is no protection against anything: that is what
// locks are for. It decides when a session has expired.
type Clock struct {
	store *Store
	wall  func() time.Time

	mu     sync.Mutex
	recent []time.Duration // the last offsets measured, of the agreed time to wall
	offset time.Duration
	known  chan struct{} // closed once there is an offset
}

// NewClock returns a clock that starts from wall, which tells this machine's
// time. It tells the time once Run runs.
func NewClock(store *Store, wall func() time.Time) *Clock {
	return &Clock{store: store, wall: wall, known: make(chan struct{})}
}

// Now returns the agreed time, or this machine's while it is not known.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.wall().Add(c.offset)
}

// Lock implements [scheduler.Locker]: it is the store's, and gives out no lock
// before the time is known, so that nothing is ended by a clock that is wrong.
func (c *Clock) Lock(ctx context.Context, chatID uuid.UUID, wait time.Duration) (scheduler.Lease, error) {
	limit := time.NewTimer(requestTimeout)
	defer limit.Stop()
	select {
	case <-c.known:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-limit.C:
		return nil, fmt.Errorf("consul: lock chat %s: %w: the agreed time is not known yet", chatID, scheduler.ErrUnavailable)
	}
	return c.store.Lock(ctx, chatID, wait)
}

// Run follows the agreed time, and keeps it when nobody else does, until ctx
// ends.
func (c *Clock) Run(ctx context.Context) error {
	var following sync.WaitGroup
	following.Go(func() { c.follow(ctx) })
	defer following.Wait()
	pause := newBackOff(100*time.Millisecond, 5*time.Second)
	for ctx.Err() == nil {
		lease, err := c.store.Lock(ctx, keeperID, maxWait)
		if err == nil {
			pause.Reset()
			err = c.keep(ctx, lease)
		}
		if err != nil && ctx.Err() == nil {
			c.store.log.Debug("cannot keep the time", "error", err)
			select {
			case <-time.After(pause.NextBackOff()):
			case <-ctx.Done():
			}
		}
	}
	return nil
}

// keep writes the time down until the lease is lost, a write fails, or ctx ends.
func (c *Clock) keep(ctx context.Context, lease scheduler.Lease) error {
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
		defer cancel()
		if err := lease.Release(ctx); err != nil {
			c.store.log.Debug("cannot release the time", "error", err)
		}
	}()
	if err := c.takeOver(ctx); err != nil {
		return err
	}
	tick := time.NewTicker(tickInterval)
	defer tick.Stop()
	for {
		// Not fenced: the tick of a keeper that slept comes late, and late
		// ticks do not count.
		value := c.Now().UTC().Format(time.RFC3339Nano)
		writing, cancel := context.WithTimeout(ctx, tickInterval)
		_, err := c.store.client.KV().Put(&api.KVPair{Key: c.store.keys.clock(), Value: []byte(value)},
			(&api.WriteOptions{}).WithContext(writing))
		cancel()
		if err != nil {
			return fmt.Errorf("write the time: %w", classify(ctx, err))
		}
		select {
		case <-tick.C:
		case <-lease.Lost():
			return fmt.Errorf("keep the time: %w", scheduler.ErrLockLost)
		case <-ctx.Done():
			return nil
		}
	}
}

// takeOver makes sure that there is a time to keep. Who knew it goes on with it.
// Who did not comes first, or after all others ended: that one's own time will
// do, if only it does not go back.
func (c *Clock) takeOver(ctx context.Context) error {
	select {
	case <-c.known:
		return nil
	default:
	}
	pair, _, err := c.store.get(ctx, c.store.keys.clock(), scheduler.Block{})
	if err != nil {
		return err
	}
	var offset time.Duration
	if pair != nil {
		if last, err := time.Parse(time.RFC3339Nano, string(pair.Value)); err == nil {
			offset = max(0, last.Sub(c.wall()))
		}
	}
	c.measured(offset)
	return nil
}

// follow measures the offset at each tick. Its own, where it keeps the time,
// change nothing.
func (c *Clock) follow(ctx context.Context) {
	var index uint64
	pause := newBackOff(100*time.Millisecond, 5*time.Second)
	for ctx.Err() == nil {
		pair, next, err := c.store.get(ctx, c.store.keys.clock(), scheduler.Block{Index: index, Wait: time.Minute})
		if err != nil {
			select {
			case <-time.After(pause.NextBackOff()):
			case <-ctx.Done():
			}
			index = 0
			continue
		}
		pause.Reset()
		// The first answer may be of any age; only a change is news.
		if index != 0 && next > index && pair != nil {
			if told, err := time.Parse(time.RFC3339Nano, string(pair.Value)); err == nil {
				c.measured(told.Sub(c.wall()))
			}
		}
		index = next
	}
}

// measured takes in an offset.
func (c *Clock) measured(offset time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.recent = append(c.recent, offset)
	if len(c.recent) > samples {
		c.recent = c.recent[1:]
	}
	c.offset = slices.Max(c.recent)
	select {
	case <-c.known:
	default:
		close(c.known)
	}
}
