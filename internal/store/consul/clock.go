package consul

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/scheduler"
)

const (
	// tickInterval is how often a tick, the agreed time, is written to Consul.
	tickInterval = time.Second
	// silence is how long a replica that knows the time waits without a tick before
	// it writes ticks itself. strangerSilence is how long a replica that does not
	// know the time waits before it concludes that nobody knows it.
	silence         = 2 * time.Second
	strangerSilence = 3 * time.Second
	// samples is how many of the last ticks a replica uses. A tick can come late but
	// never early, so the latest time of several is the best. There are few of them,
	// so that a machine that was suspended soon catches up.
	samples = 3
	// maxSkew is how far apart the machines' clocks may be.
	maxSkew = 5 * time.Minute
	// tolerance is how far a tick may be from the time that a replica knows. It
	// covers the time that a tick takes to arrive.
	tolerance = 2 * time.Second
	// notable is the distance from which a wrong tick is reported. If Consul applies
	// a tick slowly, the tick is wrong by less.
	notable = 10 * time.Second
	// reportFor is how long health reports a wrong tick after it was overwritten.
	reportFor = time.Minute
	// slew is how far the replica that writes a tick moves the time towards its own
	// machine's clock. It is so little that no session ends early, and enough that
	// the time does not stay behind for ever if it once stood still.
	slew = tickInterval / 100
)

// Clock is the time that all replicas agree on, even if the clocks of their machines
// differ. It decides only when a session has expired. It protects nothing; locks do
// that.
//
// One replica writes its time to Consul every second. Such a write is a tick. The
// others measure how far their clocks are from the ticks as they arrive. If the
// ticks stop, another replica continues with the time as it knows it, so the agreed
// time does not jump. The very first replica uses its machine's time. If several
// start together, only one of them is the first, because a tick replaces only the
// tick that its writer has seen. So replicas differ by the time that an answer of
// Consul takes, not by the difference of their machines' clocks.
//
// A wrong value of the key, written by hand or by a machine whose clock is far off,
// changes the time of no replica. A replica that knows the time overwrites the value.
// One that does not know the time yet accepts no time that is more than 5 minutes
// ahead of its machine's clock; see [judge].
//
// A [Store] with a Clock hands out locks and sessions only once the time is known.
type Clock struct {
	client      *api.Client
	log         hclog.Logger
	key         string
	wall        func() time.Time
	began, base time.Time // when this clock was made, and the time of wall then
	id          string    // marks this replica's ticks

	mu      sync.Mutex
	recent  []time.Duration // the last measured offsets of the agreed time to steady
	offset  time.Duration
	known   chan struct{} // closed once there is an offset
	trouble error         // why the time cannot be followed now, or nil
	wrong   error         // the last wrong tick that this replica overwrote
	wrongAt time.Time
	warned  backoff.Throttle // of wrong ticks
}

// NewClock returns a clock for the replicas whose keys have the same prefix. It starts
// from wall, this machine's clock, and knows the agreed time only while Run runs. An
// empty prefix means DefaultPrefix. NewClock returns an error if the prefix is invalid.
func NewClock(client *api.Client, prefix string, wall func() time.Time, log hclog.Logger) (*Clock, error) {
	keys, err := newKeyspace(prefix)
	if err != nil {
		return nil, err
	}
	return &Clock{
		client: client, log: log, key: keys.clock(),
		wall: wall, began: time.Now(), base: wall(), id: rand.Text(), known: make(chan struct{}),
	}, nil
}

// steady returns this machine's time without the steps that its clock has made since
// the start. A step must not change the agreed time.
func (c *Clock) steady() time.Time { return c.base.Add(time.Since(c.began)) }

// Now returns the agreed time, or this machine's time while the agreed time is not
// known.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.steady().Add(c.offset)
}

// Health returns an error for a minute after this replica overwrote a wrong time
// in Consul, and while the agreed time and this machine's clock are more than 5
// minutes apart. The replica can still serve.
func (c *Clock) Health(context.Context) error {
	machine := c.machine()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.wrong != nil && time.Since(c.wrongAt) < reportFor {
		return fmt.Errorf("consul: time: %w", c.wrong)
	}
	if off := c.offset - machine; c.isKnown() && off.Abs() > maxSkew {
		return fmt.Errorf("consul: time: the agreed time is %s this machine's clock; clocks may be at most %v apart", distance(off), maxSkew)
	}
	return nil
}

var errTimeUnknown = fmt.Errorf("%w: the agreed time is not known yet", scheduler.ErrUnavailable)

// checkKnown returns errTimeUnknown with the reason, or nil if the time is known.
func (c *Clock) checkKnown() error {
	if c.isKnown() {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.trouble != nil {
		return fmt.Errorf("%w: %w", errTimeUnknown, c.trouble)
	}
	return errTimeUnknown
}

// await returns nil once the time is known. It waits for that within a limit.
func (c *Clock) await(ctx context.Context) error {
	limit := time.NewTimer(requestTimeout)
	defer limit.Stop()
	select {
	case <-c.known:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-limit.C:
		return c.checkKnown()
	}
}

// Run follows the agreed time until ctx ends, and writes ticks while no other
// replica does.
func (c *Clock) Run(ctx context.Context) error {
	var last seenTick
	var told backoff.Throttle
	pause := backoff.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
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
			if !c.isKnown() {
				level = told.Level()
			}
			c.log.Log(level, "time_not_followed", "error", trouble)
		}
		if err == nil {
			pause.Reset()
			continue
		}
		_ = backoff.Sleep(ctx, pause.Next())
	}
	return nil
}

// seenTick is a tick as this replica saw it.
type seenTick struct {
	tick
	state    uint64        // Consul's index at that time; 0 before the first read
	at       time.Time     // when it was seen, on this machine's clock
	offset   time.Duration // of the tick's time to steady
	repeated bool          // the tick seen before it has the same time
	wrote    time.Time     // when this replica last tried to write a tick
}

// step writes a tick if one is due, and then waits until it sees the next.
func (c *Clock) step(ctx context.Context, last *seenTick) error {
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
	pair, state, err := get(ctx, c.client, c.key, block)
	if err != nil || state == last.state {
		return err
	}
	seen := seenTick{tick: tickOf(pair), state: state, at: time.Now(), wrote: last.wrote}
	if !seen.time.IsZero() {
		seen.offset = seen.time.Sub(c.steady())
		seen.repeated = !last.time.IsZero() && (seen.offset-last.offset).Abs() <= tolerance
	}
	// The first tick may have any age; only a later one shows the time.
	if last.state != 0 {
		c.take(seen)
	}
	*last = seen
	return nil
}

// take sets the time from a tick if judge says so. It ignores this replica's own
// ticks, unless the time is not known because the answer to such a tick was lost.
func (c *Clock) take(seen seenTick) {
	known, own := c.isKnown(), seen.by == c.id
	if own && known || !own && c.judge(seen) != followed {
		return
	}
	if ahead := seen.offset - c.agreedOffset(); known && ahead > tolerance {
		c.log.Warn("time_caught_up", "by", ahead.String(), "reason", "this machine's clock stood still, as it does in a suspended machine")
	}
	c.measured(seen.offset)
}

// verdict is how a replica treats a tick.
type verdict int

const (
	refused  verdict = iota // it is wrong
	doubted                 // it is right if the next one has the same time
	followed                // it is right
)

// judge decides how to treat a tick. All times are offsets to this machine's steady
// time: tick is the tick's time, machine the time of the machine's clock, and agreed
// the agreed time, or nil if this replica does not know it.
//
// A replica that knows the time expects every tick to have the same offset, because
// the agreed time runs like the replica's monotonic clock and a tick can only be a
// little late. There is one exception. While a machine is suspended, its monotonic
// clock stops. Afterwards the ticks of the others are ahead of what it knows. Unlike
// a wrong write by hand, they come again and again. So a replica follows a tick that
// is ahead if the one before it had the same offset.
//
// A replica that does not know the time yet needs two ticks with the same offset.
//
// No replica follows a tick that is further ahead than clocks may be apart, because
// that would end sessions early. A time that is behind ends no session.
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

// judge decides how to treat a tick now. It refuses a value that is not a tick.
func (c *Clock) judge(s seenTick) verdict {
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

// machine returns the offset of this machine's clock to steady: how far the clock was
// set since the start.
func (c *Clock) machine() time.Duration { return c.wall().Sub(c.steady()) }

// tooFarAhead returns an error if this replica does not know the time and must not
// accept the one in Consul.
func (c *Clock) tooFarAhead(last seenTick) error {
	if c.isKnown() || last.time.IsZero() || c.judge(last) != refused {
		return nil
	}
	told := fmt.Sprintf("the agreed time in Consul (key %s) is %s this machine's clock; clocks may be at most %v apart",
		c.key, distance(last.offset-c.machine()), maxSkew)
	if last.repeated && time.Since(last.at) < strangerSilence {
		return fmt.Errorf("%s. Other replicas use that time: correct this machine's clock, or correct theirs and restart them", told)
	}
	return fmt.Errorf("%s. If this machine's clock is right, run: consul kv delete %s", told, c.key)
}

// distance describes how far off a time is, such as "24h0m0s ahead of".
func distance(off time.Duration) string {
	if off < 0 {
		return (-off).Round(time.Second).String() + " behind"
	}
	return off.Round(time.Second).String() + " ahead of"
}

// due returns how long to wait until this replica writes the next tick.
func (c *Clock) due(last seenTick) time.Duration {
	wrong := c.judge(last) == refused
	switch {
	case last.by == c.id:
		return tickInterval - time.Since(last.at)
	case c.isKnown() && wrong:
		return tickInterval - time.Since(last.wrote) // at once, unless somebody writes it repeatedly
	case c.isKnown():
		// Spread out, so that not all replicas write at once.
		return silence*3/4 + backoff.Jitter(silence/2) - time.Since(last.at)
	case last.index == 0:
		return 0 // nobody ever wrote the time
	case wrong && !last.time.IsZero():
		return silence // must not be overwritten by this replica: read again then
	default:
		return strangerSilence - time.Since(last.at)
	}
}

// tick writes a tick, unless another replica just did.
func (c *Clock) tick(ctx context.Context, last seenTick) error {
	wrong := c.wrongness(last)
	offset := c.nextOffset(last)
	now := tick{by: c.id, time: c.steady().Add(offset)}
	ctx, cancel := context.WithTimeout(ctx, tickInterval)
	defer cancel()
	written, _, err := c.client.KV().CAS(
		&api.KVPair{Key: c.key, Value: []byte(now.String()), ModifyIndex: last.index},
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

// wrongness returns what is wrong with the tick that this replica is about to
// overwrite, or nil if there is nothing to report. It is certain only once the tick
// was overwritten; before, it may be an old tick that was seen late.
func (c *Clock) wrongness(last seenTick) error {
	if !c.isKnown() || last.by == c.id {
		return nil
	}
	switch {
	case last.index == 0:
		return fmt.Errorf("somebody deleted the key %s; it was written again", c.key)
	case last.time.IsZero():
		return fmt.Errorf("somebody wrote a value that is not a time to the key %s; it was overwritten", c.key)
	}
	off := last.offset - c.agreedOffset()
	if off.Abs() < notable {
		return nil
	}
	return fmt.Errorf("somebody wrote a time to the key %s that is %s the agreed time; it was overwritten", c.key, distance(off))
}

// report logs a wrong tick and makes Health report it for a while.
func (c *Clock) report(wrong error) {
	c.mu.Lock()
	c.wrong, c.wrongAt = wrong, time.Now()
	level := c.warned.Level()
	c.mu.Unlock()
	c.log.Log(level, "time_overwritten", "reason", wrong)
}

// nextOffset returns the offset of the next tick's time to steady. A replica that
// does not know the time, and has seen no replica that does, continues from the last
// tick: the time may stand still while nobody writes it, but it must not jump. If it
// stood still for longer than clocks may be apart, the replica begins with its
// machine's time.
func (c *Clock) nextOffset(last seenTick) time.Duration {
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

// tick is the time that one replica wrote.
type tick struct {
	by    string
	time  time.Time
	index uint64 // ModifyIndex of the key, 0 if there is none
}

func (t tick) String() string { return t.by + " " + t.time.UTC().Format(time.RFC3339Nano) }

// tickOf decodes a tick. It returns one without a time if the value is not a tick.
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

// measured adds an offset that another replica's tick showed.
func (c *Clock) measured(offset time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.recent = append(c.recent, offset)
	if len(c.recent) > samples {
		c.recent = c.recent[1:]
	}
	c.know(slices.Max(c.recent))
}

// set replaces all measured offsets by one.
func (c *Clock) set(offset time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.recent = []time.Duration{offset}
	c.know(offset)
}

// know sets the offset. The caller holds mu.
func (c *Clock) know(offset time.Duration) {
	c.offset = offset
	if !c.isKnown() {
		close(c.known)
	}
}
