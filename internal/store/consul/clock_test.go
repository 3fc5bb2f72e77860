package consul

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/scheduler"
)

// machine is a replica on a machine whose clock may be wrong.
type machine struct {
	*Store
	clock *Clock
	step  func(time.Duration) // steps the machine's clock
	leave func()
}

func (c *cluster) joinClock(t *testing.T, off time.Duration) *machine {
	t.Helper()
	var wall atomic.Int64
	wall.Store(int64(off))
	r, clock := c.joinTimed(t, func() time.Time { return time.Now().Add(time.Duration(wall.Load())) })
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() { _ = clock.Run(ctx) })
	m := &machine{Store: r.Store, clock: clock, step: func(d time.Duration) { wall.Add(int64(d)) }, leave: func() {
		stop()
		running.Wait()
		r.leave()
	}}
	t.Cleanup(m.leave)
	must.Wait(t, wait.InitialSuccess(wait.ErrorFunc(func() error {
		if !clock.isKnown() {
			return errors.New("not yet")
		}
		return nil
	}), wait.Timeout(patience), wait.Gap(10*time.Millisecond)), must.Sprint("the time is known"))
	return m
}

// joinTimed adds a replica whose locks wait for a clock, which does not run yet.
func (c *cluster) joinTimed(t *testing.T, wall func() time.Time) (*replica, *Clock) {
	t.Helper()
	client, err := NewClient(&api.Config{Address: c.addr}, nil)
	must.NoError(t, err)
	clock, err := NewClock(client, c.prefix, wall, hclog.NewNullLogger())
	must.NoError(t, err)
	return c.joinWith(t, client, clock), clock
}

func TestReplicasAgreeOnTheTime(t *testing.T) {
	c := open(t)
	agree := func(by string, machines ...*machine) {
		t.Helper()
		must.Wait(t, wait.InitialSuccess(wait.ErrorFunc(func() error {
			for _, m := range machines[1:] {
				if d := m.clock.Now().Sub(machines[0].clock.Now()).Abs(); d > time.Second {
					return fmt.Errorf("%s: %v apart", by, d)
				}
			}
			return nil
		}), wait.Timeout(patience), wait.Gap(10*time.Millisecond)))
	}

	// Given a first replica, whose time all others take over.
	first := c.joinClock(t, maxSkew/2)
	off := time.Until(first.clock.Now())
	must.Between(t, maxSkew/2-time.Second, off, maxSkew/2+time.Second)

	// When others join whose clocks differ by the allowed maximum, all agree.
	second := c.joinClock(t, -maxSkew/2+time.Second)
	third := c.joinClock(t, 0)
	agree("after joining", first, second, third)

	// When the replica that writes the time leaves, the time continues.
	first.leave()
	must.Between(t, off-2*time.Second, time.Until(second.clock.Now()), off+2*time.Second)
	agree("without the first", second, third)
	fourth := c.joinClock(t, -time.Minute)
	agree("with a fourth", second, third, fourth)
	must.Between(t, off-2*time.Second, time.Until(fourth.clock.Now()), off+2*time.Second)

	// When all have left and one joins whose clock is behind, the time does not
	// go back.
	last := second.clock.Now()
	for _, m := range []*machine{second, third, fourth} {
		m.leave()
	}
	fifth := c.joinClock(t, -maxSkew/2+time.Second)
	must.False(t, fifth.clock.Now().Before(last.Add(-tickInterval)))
}

// TestTimeDoesNotJumpWithAMachinesClock checks that setting a machine's clock
// changes no replica's time, whether the machine writes the time or follows.
func TestTimeDoesNotJumpWithAMachinesClock(t *testing.T) {
	c := open(t)
	machines := []*machine{c.joinClock(t, 0), c.joinClock(t, 0)}
	var index uint64
	awaitTick := func() {
		_, next, err := machines[0].get(t.Context(), machines[0].clock.key, scheduler.Block{Index: index, Wait: patience})
		must.NoError(t, err)
		index = next
	}
	for i, m := range machines {
		for _, step := range []time.Duration{4 * time.Minute, -4 * time.Minute} {
			m.step(step)
			for tick := range 2 * samples {
				for j, other := range machines {
					must.Between(t, -time.Second, time.Until(other.clock.Now()), time.Second,
						must.Sprintf("machine %d stepped by %v; machine %d, tick %d", i, step, j, tick))
				}
				awaitTick()
			}
		}
	}
}

// TestSessionEndsOnAllReplicasAtOneTime checks that a session expires on all
// replicas at the same time, even if their machines' clocks differ by the
// allowed maximum.
func TestSessionEndsOnAllReplicasAtOneTime(t *testing.T) {
	const life, slack = 6 * time.Second, 2 * time.Second
	c := open(t)
	machines := []*machine{c.joinClock(t, maxSkew/2), c.joinClock(t, -maxSkew/2+time.Second), c.joinClock(t, 0)}
	for i, creator := range machines {
		session := freshSession()
		began := time.Now()
		session.CreatedAt = creator.clock.Now()
		session.ExpiresAt = session.CreatedAt.Add(life)
		put(t, creator, session)

		ended := make([]bool, len(machines))
		for slices.Contains(ended, false) {
			for j, m := range machines {
				before := time.Since(began)
				expired, err := m.Expired(t.Context(), m.clock.Now(), 10)
				after := time.Since(began)
				must.NoError(t, err)
				has := slices.ContainsFunc(expired, func(s scheduler.Session) bool { return s.ChatID == session.ChatID })
				if after < life-slack {
					must.False(t, has, must.Sprintf("ended %v early: created on %d, seen by %d", life-after, i, j))
				}
				if before > life+slack {
					must.True(t, has, must.Sprintf("lives %v too long: created on %d, seen by %d", before-life, i, j))
				}
				ended[j] = has
			}
		}
	}
}

func TestNoLockBeforeTheTimeIsKnown(t *testing.T) {
	c := open(t)
	r, clock := c.joinTimed(t, time.Now)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := r.Lock(ctx, uuid.New(), 0)
	must.ErrorIs(t, err, context.Canceled)
	_, _, err = r.Get(ctx, uuid.New(), scheduler.Block{})
	must.ErrorIs(t, err, context.Canceled)
	must.ErrorContains(t, r.Health(t.Context()), "the agreed time is not known")

	clock.measured(0)
	must.NoError(t, r.Health(t.Context()))
	lease, err := r.Lock(t.Context(), uuid.New(), 0)
	must.NoError(t, err)
	must.NoError(t, lease.Release(t.Context()))
}

func TestJudge(t *testing.T) {
	const day = 24 * time.Hour
	agreed := func(d time.Duration) *time.Duration { return &d }
	for name, tc := range map[string]struct {
		tick     time.Duration
		machine  time.Duration
		repeated bool
		agreed   *time.Duration
		want     verdict
	}{
		"a tick that tells what is known":                           {tick: time.Second, agreed: agreed(0), want: followed},
		"a tick that is a little late":                              {tick: -time.Second, agreed: agreed(0), want: followed},
		"what is known although the machine's clock was set":        {tick: 0, machine: -day, agreed: agreed(0), want: followed},
		"a day ahead, once":                                         {tick: day, agreed: agreed(0), want: refused},
		"a day ahead, again and again":                              {tick: day, agreed: agreed(0), repeated: true, want: refused},
		"a day back, again and again":                               {tick: -day, agreed: agreed(0), repeated: true, want: refused},
		"a minute ahead, once":                                      {tick: time.Minute, agreed: agreed(0), want: doubted},
		"a minute ahead, again and again: ours stood still":         {tick: time.Minute, agreed: agreed(0), repeated: true, want: followed},
		"an hour's sleep, after which the machine's clock is right": {tick: time.Hour, machine: time.Hour, agreed: agreed(0), repeated: true, want: followed},
		"an hour's sleep, before the machine's clock is right":      {tick: time.Hour, agreed: agreed(0), repeated: true, want: refused},
		"the machine's clock was set a day ahead, and no tick":      {tick: 0, machine: day, agreed: agreed(0), want: followed},
		"unknown: a first tick":                                     {tick: 0, want: doubted},
		"unknown: a tick like the one before":                       {tick: maxSkew, repeated: true, want: followed},
		"unknown: further ahead than clocks may be apart":           {tick: maxSkew + 1, repeated: true, want: refused},
		"unknown: others are far behind, which ends no session":     {tick: -day, repeated: true, want: followed},
		"unknown: far behind, once":                                 {tick: -day, want: doubted},
	} {
		t.Run(name, func(t *testing.T) {
			must.Eq(t, tc.want, judge(tc.tick, tc.machine, tc.repeated, tc.agreed))
		})
	}
}

// writeTick writes to the key of the agreed time, as an operator could do by
// hand.
func (c *cluster) writeTick(t *testing.T, value string) {
	t.Helper()
	_, err := c.client.KV().Put(&api.KVPair{Key: c.keys(t).clock(), Value: []byte(value)}, nil)
	must.NoError(t, err)
}

func byHand(at time.Time) string { return "hand " + at.UTC().Format(time.RFC3339Nano) }

// TestWrongTimeInConsulMovesNobody checks what happens if the key of the agreed
// time gets any wrong value or is deleted: no session ends, the agreed time
// continues, and health reports it.
func TestWrongTimeInConsulMovesNobody(t *testing.T) {
	c := open(t)
	machines := []*machine{c.joinClock(t, 0), c.joinClock(t, 0), c.joinClock(t, 0)}
	for _, m := range machines {
		session := freshSession()
		session.CreatedAt = m.clock.Now()
		session.ExpiresAt = session.CreatedAt.Add(10 * time.Minute)
		put(t, m, session)
	}
	key := machines[0].clock.key
	for name, harm := range map[string]struct {
		do   func()
		told string
	}{
		"a day ahead":    {func() { c.writeTick(t, byHand(time.Now().Add(24*time.Hour))) }, "24h0m0s ahead of the agreed time"},
		"a day back":     {func() { c.writeTick(t, byHand(time.Now().Add(-24*time.Hour))) }, "24h0m0s behind the agreed time"},
		"minutes ahead":  {func() { c.writeTick(t, byHand(time.Now().Add(4*time.Minute))) }, "4m0s ahead of the agreed time"},
		"no time at all": {func() { c.writeTick(t, "?") }, "a value that is not a time"},
		"deleted": {func() {
			_, err := c.client.KV().Delete(key, nil)
			must.NoError(t, err)
		}, "somebody deleted the key"},
	} {
		for _, m := range machines {
			m.clock.mu.Lock()
			m.clock.wrong = nil
			m.clock.mu.Unlock()
		}
		harm.do()
		must.Wait(t, wait.InitialSuccess(wait.ErrorFunc(func() error {
			for i, m := range machines {
				if off := time.Until(m.clock.Now()).Abs(); off > tolerance {
					t.Fatalf("%s: replica %d follows, by %v", name, i, off)
				}
				expired, err := m.Expired(t.Context(), m.clock.Now(), 10)
				must.NoError(t, err)
				must.SliceEmpty(t, expired, must.Sprint(name))
			}
			for _, m := range machines {
				if err := m.clock.Health(t.Context()); err != nil && strings.Contains(err.Error(), harm.told) {
					return nil
				}
			}
			return errors.New("no replica reports it")
		}), wait.Timeout(patience), wait.Gap(10*time.Millisecond)), must.Sprint(name))
		pair, _, err := c.client.KV().Get(key, nil)
		must.NoError(t, err)
		must.Less(t, tolerance, time.Until(tickOf(pair).time).Abs(), must.Sprint(name))
	}
}

// TestTimeFarAheadIsNotTakenByAReplicaThatStarts covers a time in Consul that
// is a day ahead while no replica runs. A replica that starts then ends
// nothing, reports what to do, and continues once that is done.
func TestTimeFarAheadIsNotTakenByAReplicaThatStarts(t *testing.T) {
	c := open(t)
	c.writeTick(t, byHand(time.Now().Add(24*time.Hour)))
	r, clock := c.joinTimed(t, time.Now)
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = clock.Run(ctx) })
	t.Cleanup(func() {
		stop()
		running.Wait()
	})
	healthy := func(told string) func() error {
		return func() error {
			err := r.Health(t.Context())
			if err == nil && told == "" || err != nil && told != "" && strings.Contains(err.Error(), told) {
				return nil
			}
			return fmt.Errorf("health is %v", err) //nolint:errorlint // it may be nil
		}
	}
	key := clock.key
	told := "24h0m0s ahead of this machine's clock; clocks may be at most 5m0s apart. If this machine's clock is right, run: consul kv delete " + key
	must.Wait(t, wait.InitialSuccess(wait.ErrorFunc(healthy(told)), wait.Timeout(patience), wait.Gap(10*time.Millisecond)))
	must.False(t, clock.isKnown())

	_, err := c.client.KV().Delete(key, nil)
	must.NoError(t, err)
	must.Wait(t, wait.InitialSuccess(wait.ErrorFunc(healthy("")), wait.Timeout(patience), wait.Gap(10*time.Millisecond)))
	must.Less(t, tolerance, time.Until(clock.Now()).Abs())
}
