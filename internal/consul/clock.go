package consul

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/scheduler"
)

const (
	// tickInterval is how often the time is written down.
	tickInterval = time.Second
	// silence is after how long without a tick a replica that knows the time
	// begins to write it down, and strangerSilence after how long one that does
	// not concludes that nobody knows it.
	silence         = 2 * time.Second
	strangerSilence = 3 * time.Second
	// samples is how many of the last ticks a replica goes by. A tick can come
	// late and never early, so of several the latest time is the best; few of
	// them, so that what a machine misses while it is suspended is soon made up
	// for.
	samples = 3
	// maxSkew is how far apart the machines' clocks may be.
	maxSkew = 5 * time.Minute
	// slew is how much of a tick whoever writes the time down moves it towards
	// its own machine's: slow enough that no session ends early for it, and
	// enough that the time does not stay behind for ever where it once stood
	// still.
	slew = tickInterval / 100
)

// Clock is the time that all replicas agree on, however far apart the clocks of
// their machines are. One replica writes its time to Consul every second, and
// the others measure how far their clocks are from it as they see it come. When
// it falls silent another goes on with the time as it knew it, so that the
// agreed time does not jump. The first replica of all takes its machine's time.
// Of several that come together, one is the first, since a tick only ever takes
// the place of the one that its writer has seen.
//
// Replicas then differ by what an answer of Consul takes to arrive, not by what
// their machines differ. It is no protection against anything: that is what
// locks are for. It decides when a session has expired.
//
// It is a [scheduler.Store] and a [scheduler.Locker]: the one that it keeps the
// time in, except that nobody gets a lock or one session to judge before the
// time is known, so that nothing is ended or handed out by a clock that is
// wrong. Lists do not wait: whoever acts upon one takes a lock first.
type Clock struct {
	*Store
	wall        func() time.Time
	began, base time.Time // when this clock was made, and what wall said then
	id          string    // marks our own ticks

	mu     sync.Mutex
	recent []time.Duration // the last offsets measured, of the agreed time to steady
	offset time.Duration
	known  chan struct{} // closed once there is an offset
}

// NewClock returns a clock that starts from wall, which tells this machine's
// time. It tells the time once Run runs.
func NewClock(store *Store, wall func() time.Time) *Clock {
	return &Clock{Store: store, wall: wall, began: time.Now(), base: wall(), id: rand.Text(), known: make(chan struct{})}
}

// steady returns this machine's time without the steps that its clock has made
// since: a step is no news of the agreed time.
func (c *Clock) steady() time.Time { return c.base.Add(time.Since(c.began)) }

// Now returns the agreed time, or this machine's while it is not known.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.steady().Add(c.offset)
}

// Lock implements [scheduler.Locker].
func (c *Clock) Lock(ctx context.Context, chatID uuid.UUID, wait time.Duration) (scheduler.Lease, error) {
	if err := c.awaitKnown(ctx); err != nil {
		return nil, fmt.Errorf("consul: lock chat %s: %w", chatID, err)
	}
	return c.Store.Lock(ctx, chatID, wait)
}

// LockDamaged implements [scheduler.Locker].
func (c *Clock) LockDamaged(ctx context.Context, chatID uuid.UUID, wait time.Duration) (scheduler.Lease, error) {
	if err := c.awaitKnown(ctx); err != nil {
		return nil, fmt.Errorf("consul: lock chat %s: %w", chatID, err)
	}
	return c.Store.LockDamaged(ctx, chatID, wait)
}

// Get implements [scheduler.Store].
func (c *Clock) Get(ctx context.Context, chatID uuid.UUID, block scheduler.Block) (*scheduler.Session, uint64, error) {
	if err := c.awaitKnown(ctx); err != nil {
		return nil, 0, fmt.Errorf("consul: get chat %s: %w", chatID, err)
	}
	return c.Store.Get(ctx, chatID, block)
}

// Health is that of the store, once the time is known.
func (c *Clock) Health(ctx context.Context) error {
	if err := c.Store.Health(ctx); err != nil {
		return err
	}
	if !c.isKnown() {
		return fmt.Errorf("consul: health: %w", errTimeUnknown)
	}
	return nil
}

var errTimeUnknown = fmt.Errorf("%w: the agreed time is not known yet", scheduler.ErrUnavailable)

func (c *Clock) awaitKnown(ctx context.Context) error {
	if c.isKnown() {
		return nil
	}
	limit := time.NewTimer(requestTimeout)
	defer limit.Stop()
	select {
	case <-c.known:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-limit.C:
		return errTimeUnknown
	}
}

// Run follows the agreed time, and writes it down while nobody else does, until
// ctx ends.
func (c *Clock) Run(ctx context.Context) error {
	var last sight
	pause := newBackOff(100*time.Millisecond, 5*time.Second)
	for ctx.Err() == nil {
		err := c.step(ctx, &last)
		if err == nil {
			pause.Reset()
			continue
		}
		c.log.Debug("cannot follow the time", "error", err)
		select {
		case <-time.After(pause.NextBackOff()):
		case <-ctx.Done():
		}
	}
	return nil
}

// sight is a tick, and when it was seen.
type sight struct {
	tick
	state uint64    // of Consul at that time; 0 before the first look
	at    time.Time // on this machine's clock
}

// step writes a tick if one is due, and then waits for the next to be seen.
func (c *Clock) step(ctx context.Context, last *sight) error {
	block := scheduler.Block{Index: last.state}
	if last.state != 0 {
		due := c.patience(last.tick) - time.Since(last.at)
		if due <= 0 {
			if err := c.tick(ctx, *last); err != nil {
				return err
			}
			due = c.patience(last.tick)
		}
		block.Wait = max(due, 50*time.Millisecond)
	}
	pair, state, err := c.get(ctx, c.keys.clock(), block)
	if err != nil || state == last.state {
		return err
	}
	seen := tickOf(pair)
	// The first tick to be seen may be of any age; only a new one is news.
	// Our own are none, except one whose outcome we did not learn.
	if last.state != 0 && !seen.time.IsZero() && (seen.by != c.id || !c.isKnown()) {
		c.measured(seen.time.Sub(c.steady()))
	}
	*last = sight{tick: seen, state: state, at: time.Now()}
	return nil
}

// patience is how long after the last tick this replica writes the next one.
func (c *Clock) patience(last tick) time.Duration {
	switch {
	case last.by == c.id:
		return tickInterval
	case c.isKnown():
		// Not all at once, or all would think themselves the next.
		return silence*3/4 + jitter(silence/2)
	case last.time.IsZero():
		return 0 // nobody ever wrote the time down
	default:
		return strangerSilence
	}
}

// tick writes the time down, unless somebody else just did.
func (c *Clock) tick(ctx context.Context, last sight) error {
	offset := c.nextOffset(last)
	now := tick{by: c.id, time: c.steady().Add(offset)}
	ctx, cancel := context.WithTimeout(ctx, tickInterval)
	defer cancel()
	written, _, err := c.client.KV().CAS(
		&api.KVPair{Key: c.keys.clock(), Value: []byte(now.String()), ModifyIndex: last.index},
		(&api.WriteOptions{}).WithContext(ctx))
	if err != nil {
		return fmt.Errorf("write the time: %w", classify(ctx, err))
	}
	if written {
		c.set(offset)
	}
	return nil
}

// nextOffset returns the offset of the next tick's time to this machine's. Who
// does not know the time, and heard nobody who does, goes on from the last tick,
// as of when it saw that, where its machine's time is no further from it than a
// clock may be off: the time may stand still while nobody keeps it, and must not
// jump.
func (c *Clock) nextOffset(last sight) time.Duration {
	stepped := c.wall().Sub(c.steady())
	if c.isKnown() {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.offset - min(max(c.offset-stepped, -slew), slew)
	}
	if c.wall().Sub(last.time) < 2*maxSkew {
		return last.time.Add(time.Since(last.at)).Sub(c.steady())
	}
	return stepped
}

// tick is the time as one replica wrote it down.
type tick struct {
	by    string
	time  time.Time
	index uint64 // of its key; 0 where there is none
}

func (t tick) String() string { return t.by + " " + t.time.UTC().Format(time.RFC3339Nano) }

// tickOf reads a tick. What is none is as if there were none: it is overwritten.
func tickOf(pair *api.KVPair) tick {
	if pair == nil {
		return tick{}
	}
	by, text, _ := strings.Cut(string(pair.Value), " ")
	if at, err := time.Parse(time.RFC3339Nano, text); err == nil {
		return tick{by: by, time: at, index: pair.ModifyIndex}
	}
	return tick{index: pair.ModifyIndex}
}

func (c *Clock) isKnown() bool {
	select {
	case <-c.known:
		return true
	default:
		return false
	}
}

// measured takes in an offset as another's tick shows it.
func (c *Clock) measured(offset time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.recent = append(c.recent, offset)
	if len(c.recent) > samples {
		c.recent = c.recent[1:]
	}
	c.know(slices.Max(c.recent))
}

// set takes an offset over as it is.
func (c *Clock) set(offset time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.recent = []time.Duration{offset}
	c.know(offset)
}

// know is called with mu held.
func (c *Clock) know(offset time.Duration) {
	c.offset = offset
	if !c.isKnown() {
		close(c.known)
	}
}
