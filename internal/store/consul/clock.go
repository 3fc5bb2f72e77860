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
	"github.com/hashicorp/go-hclog"

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
	// tolerance is how far a tick may be from the time that a replica knows: it
	// covers what a tick needs to arrive.
	tolerance = 2 * time.Second
	// notable is from what distance on a wrong tick is reported. A Consul that is
	// slow to apply a tick makes it wrong by less.
	notable = 10 * time.Second
	// reportFor is how long health reports a wrong tick after it was overwritten.
	reportFor = time.Minute
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
// A wrong value of the key, written by hand or by a machine whose clock is far
// off, moves nobody: a replica that knows the time overwrites it, and one that does
// not know it yet takes no time that is more than 5 minutes ahead of its machine's
// clock; see [judge].
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

	mu      sync.Mutex
	recent  []time.Duration // the last offsets measured, of the agreed time to steady
	offset  time.Duration
	known   chan struct{} // closed once there is an offset
	trouble error         // why the time cannot be followed now; nil if it can
	wrong   error         // the last wrong tick that this replica overwrote
	wrongAt time.Time
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
		return fmt.Errorf("consul: health: %w", c.unknown())
	}
	return nil
}

// TimeHealth returns an error for a minute after this replica overwrote a wrong
// time in Consul, and while the agreed time is further from this machine's clock
// than clocks may be apart. The replica can serve all the same.
func (c *Clock) TimeHealth(context.Context) error {
	machine := c.machine()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.wrong != nil && time.Since(c.wrongAt) < reportFor {
		return fmt.Errorf("consul: time: %w", c.wrong)
	}
	if off := c.offset - machine; c.isKnown() && off.Abs() > maxSkew {
		return fmt.Errorf("consul: time: the agreed time is %s this machine's clock; clocks may be %v apart", distance(off), maxSkew)
	}
	return nil
}

var errTimeUnknown = fmt.Errorf("%w: the agreed time is not known yet", scheduler.ErrUnavailable)

// unknown returns errTimeUnknown with the reason.
func (c *Clock) unknown() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.trouble != nil {
		return fmt.Errorf("%w: %w", errTimeUnknown, c.trouble)
	}
	return errTimeUnknown
}

func (c *Clock) awaitKnown(ctx context.Context) error {
	if c.isKnown() {
		return nil
	}
	if err := c.identity.stands(ctx); err != nil { // without it no time is kept
		return err
	}
	limit := time.NewTimer(requestTimeout)
	defer limit.Stop()
	select {
	case <-c.known:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-limit.C:
		return c.unknown()
	}
}

// Run follows the agreed time, and writes it down while nobody else does, until
// ctx ends.
func (c *Clock) Run(ctx context.Context) error {
	var last sight
	var told time.Time
	pause := newBackOff(100*time.Millisecond, 5*time.Second)
	for ctx.Err() == nil {
		err := c.step(ctx, &last)
		trouble := err
		if err == nil {
			trouble = c.tooFarAhead(last)
		}
		c.mu.Lock()
		c.trouble = trouble
		c.mu.Unlock()
		if trouble != nil && ctx.Err() == nil {
			level := hclog.Debug
			if !c.isKnown() && time.Since(told) >= tellEvery {
				level, told = hclog.Warn, time.Now()
			}
			c.log.Log(level, "time_not_followed", "error", trouble)
		}
		if err == nil {
			pause.Reset()
			continue
		}
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
	state    uint64        // of Consul at that time; 0 before the first look
	at       time.Time     // on this machine's clock
	offset   time.Duration // of its time to steady
	repeated bool          // the tick seen before it tells the same time
	wrote    time.Time     // when this replica last tried to write a tick
}

// step writes a tick if one is due, and then waits for the next to be seen.
func (c *Clock) step(ctx context.Context, last *sight) error {
	block := scheduler.Block{Index: last.state}
	if last.state != 0 {
		due := c.due(*last)
		if due <= 0 {
			last.wrote = time.Now()
			if err := c.tick(ctx, *last); err != nil {
				return err
			}
			due = tickInterval
		}
		block.Wait = max(due, 50*time.Millisecond)
	}
	pair, state, err := c.get(ctx, c.keys.clock(), block)
	if err != nil || state == last.state {
		return err
	}
	seen := sight{tick: tickOf(pair), state: state, at: time.Now(), wrote: last.wrote}
	if !seen.time.IsZero() {
		seen.offset = seen.time.Sub(c.steady())
		seen.repeated = !last.time.IsZero() && (seen.offset-last.offset).Abs() <= tolerance
	}
	// The first tick to be seen may be of any age; only a new one is news.
	if last.state != 0 {
		c.take(seen)
	}
	*last = seen
	return nil
}

// take follows a tick that is to be followed. Our own are no news, except one
// whose outcome we did not learn.
func (c *Clock) take(seen sight) {
	known, own := c.isKnown(), seen.by == c.id
	if own && known || !own && c.judge(seen) != followed {
		return
	}
	if ahead := seen.offset - c.agreedOffset(); known && ahead > tolerance {
		c.log.Warn("time_caught_up", "by", ahead.String(), "reason", "this machine's clock stood still, as it does in a suspended machine")
	}
	c.measured(seen.offset)
}

// verdict is what a replica makes of a tick.
type verdict int

const (
	refused  verdict = iota // it is wrong
	doubted                 // it may be right if the next one tells the same
	followed                // it is right
)

// judge says what to make of a tick whose time is tick. All times are offsets to
// this machine's steady time. machine is that of the machine's clock, and agreed
// that of the agreed time as this replica knows it, nil if it does not.
//
// A replica that knows the time expects every tick to tell the same: the time
// goes on as the replica's monotonic clock does, and a tick can only be a little
// late. There is one exception. While a machine is suspended its monotonic clock
// stands still, so that afterwards the others' ticks are ahead of what it knows.
// They repeat themselves, as a wrong write by hand does not. So a replica follows
// a tick that is ahead if the one before it told the same time.
//
// A replica that does not know the time yet needs two ticks that tell the same.
//
// Neither follows further ahead than clocks may be apart: that would end sessions
// early. To be behind ends none.
func judge(tick, machine time.Duration, repeated bool, agreed *time.Duration) verdict {
	switch {
	case agreed != nil && (tick-*agreed).Abs() <= tolerance: // safeguard: bound of the agreed time
		return followed
	case tick > machine+maxSkew:
		return refused
	case agreed != nil && tick < *agreed:
		return refused
	case repeated:
		return followed
	default:
		return doubted
	}
}

// judge is what to make of a tick as things are now. What is no tick is refused.
func (c *Clock) judge(s sight) verdict {
	if s.time.IsZero() {
		return refused
	}
	var agreed *time.Duration
	if c.isKnown() {
		c.mu.Lock()
		agreed = new(c.offset)
		c.mu.Unlock()
	}
	return judge(s.offset, c.machine(), s.repeated, agreed)
}

// machine returns the offset of this machine's clock to steady: by how much it
// was set since.
func (c *Clock) machine() time.Duration { return c.wall().Sub(c.steady()) }

// tooFarAhead returns an error if the time in Consul is one that this replica,
// which does not know the time, must not take.
func (c *Clock) tooFarAhead(last sight) error {
	if c.isKnown() || last.time.IsZero() || c.judge(last) != refused {
		return nil
	}
	told := fmt.Sprintf("the agreed time in Consul (key %s) is %s this machine's clock; clocks may be %v apart",
		c.keys.clock(), distance(last.offset-c.machine()), maxSkew)
	if last.repeated && time.Since(last.at) < strangerSilence {
		return fmt.Errorf("%s. Other replicas keep that time: set this machine's clock, or theirs and restart them", told)
	}
	return fmt.Errorf("%s. If this machine's clock is right: consul kv delete %s", told, c.keys.clock())
}

// distance says how far off a time is: "24h0m0s ahead of".
func distance(off time.Duration) string {
	if off < 0 {
		return (-off).Round(time.Second).String() + " behind"
	}
	return off.Round(time.Second).String() + " ahead of"
}

// due returns how long it takes until this replica writes the next tick.
func (c *Clock) due(last sight) time.Duration {
	wrong := c.judge(last) == refused
	switch {
	case last.by == c.id:
		return tickInterval - time.Since(last.at)
	case c.isKnown() && wrong:
		return tickInterval - time.Since(last.wrote) // at once, unless somebody keeps writing it
	case c.isKnown():
		// Not all at once, or all would think themselves the next.
		return silence*3/4 + jitter(silence/2) - time.Since(last.at)
	case last.index == 0:
		return 0 // nobody ever wrote the time down
	case wrong && !last.time.IsZero():
		return silence // not ours to overwrite; look again then
	default:
		return strangerSilence - time.Since(last.at)
	}
}

// tick writes the time down, unless somebody else just did.
func (c *Clock) tick(ctx context.Context, last sight) error {
	wrong := c.wrongness(last)
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
	if !written {
		return nil
	}
	c.set(offset)
	if wrong != nil {
		c.report(wrong)
	}
	return nil
}

// wrongness says what is wrong with the tick that this replica is about to
// overwrite, nil if that is nothing to report. It is only certain once the tick
// was overwritten: else it may be an old one, seen late.
func (c *Clock) wrongness(last sight) error {
	if !c.isKnown() || last.by == c.id {
		return nil
	}
	switch {
	case last.index == 0:
		return fmt.Errorf("somebody deleted the key %s; it was written anew", c.keys.clock())
	case last.time.IsZero():
		return fmt.Errorf("somebody wrote something else than a time to the key %s; it was overwritten", c.keys.clock())
	}
	off := last.offset - c.agreedOffset()
	if off.Abs() < notable {
		return nil
	}
	return fmt.Errorf("somebody wrote a time to the key %s that is %s the agreed time; it was overwritten", c.keys.clock(), distance(off))
}

// report logs a wrong tick and has health report it for a while.
func (c *Clock) report(wrong error) {
	c.mu.Lock()
	again := c.wrong != nil && time.Since(c.wrongAt) < tellEvery
	c.wrong, c.wrongAt = wrong, time.Now()
	c.mu.Unlock()
	level := hclog.Warn
	if again {
		level = hclog.Debug
	}
	c.log.Log(level, "time_overwritten", "reason", wrong)
}

// nextOffset returns the offset of the next tick's time to this machine's. A
// replica that does not know the time, and heard nobody who does, goes on from the
// last tick, as of when it saw that: the time may stand still while nobody keeps
// it, and must not jump. If it stood still for longer than clocks may be apart the
// replica begins with its machine's time.
func (c *Clock) nextOffset(last sight) time.Duration {
	machine := c.machine()
	if c.isKnown() {
		offset := c.agreedOffset()
		return offset - min(max(offset-machine, -slew), slew)
	}
	if !last.time.IsZero() && machine-last.offset <= maxSkew {
		return last.offset
	}
	return machine
}

func (c *Clock) agreedOffset() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.offset
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
