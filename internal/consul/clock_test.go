package consul

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/scheduler"
)

// machine is a replica on a machine whose clock is off.
type machine struct {
	*Clock
	step  func(time.Duration) // of the machine's clock
	leave func()
}

func (c *cluster) joinClock(t *testing.T, off time.Duration) *machine {
	t.Helper()
	r := c.join(t, c.addr)
	var wall atomic.Int64
	wall.Store(int64(off))
	clock := NewClock(r.Store, func() time.Time { return time.Now().Add(time.Duration(wall.Load())) })
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() { _ = clock.Run(ctx) })
	m := &machine{Clock: clock, step: func(d time.Duration) { wall.Add(int64(d)) }, leave: func() {
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

func TestReplicasAgreeOnTheTime(t *testing.T) {
	c := open(t)
	agree := func(by string, machines ...*machine) {
		t.Helper()
		must.Wait(t, wait.InitialSuccess(wait.ErrorFunc(func() error {
			for _, m := range machines[1:] {
				if d := m.Now().Sub(machines[0].Now()).Abs(); d > time.Second {
					return fmt.Errorf("%s: %v apart", by, d)
				}
			}
			return nil
		}), wait.Timeout(patience), wait.Gap(10*time.Millisecond)))
	}

	// Given a first replica, whose time is everybody's.
	first := c.joinClock(t, 5*time.Minute)
	off := time.Until(first.Now())
	must.Between(t, 299*time.Second, off, 301*time.Second)

	// When others join whose clocks are up to ten minutes apart, all agree.
	second := c.joinClock(t, -5*time.Minute)
	third := c.joinClock(t, 0)
	agree("after joining", first, second, third)

	// When the one who writes it down goes, the time goes on as it was.
	first.leave()
	must.Between(t, off-2*time.Second, time.Until(second.Now()), off+2*time.Second)
	agree("without the first", second, third)
	fourth := c.joinClock(t, -time.Minute)
	agree("with a fourth", second, third, fourth)
	must.Between(t, off-2*time.Second, time.Until(fourth.Now()), off+2*time.Second)

	// When all are gone and one comes whose clock is behind, time does not go back.
	last := second.Now()
	for _, m := range []*machine{second, third, fourth} {
		m.leave()
	}
	fifth := c.joinClock(t, -5*time.Minute)
	must.False(t, fifth.Now().Before(last.Add(-tickInterval)))
}

// Whoever sets the clock of a machine moves nobody's time: neither where the
// machine writes the time down, nor where it follows.
func TestTimeDoesNotJumpWithAMachinesClock(t *testing.T) {
	c := open(t)
	machines := []*machine{c.joinClock(t, 0), c.joinClock(t, 0)}
	var index uint64
	awaitTick := func() {
		_, next, err := machines[0].get(t.Context(), machines[0].keys.clock(), scheduler.Block{Index: index, Wait: patience})
		must.NoError(t, err)
		index = next
	}
	for i, m := range machines {
		for _, step := range []time.Duration{4 * time.Minute, -4 * time.Minute} {
			m.step(step)
			for tick := range 2 * samples {
				for j, other := range machines {
					must.Between(t, -time.Second, time.Until(other.Now()), time.Second,
						must.Sprintf("machine %d stepped by %v; machine %d, tick %d", i, step, j, tick))
				}
				awaitTick()
			}
		}
	}
}

// Given machines whose clocks are ten minutes apart, then a session ends on all
// replicas when its time is over, and on none sooner or later.
func TestSessionEndsOnAllReplicasAtOneTime(t *testing.T) {
	const life, slack = 6 * time.Second, 2 * time.Second
	c := open(t)
	machines := []*machine{c.joinClock(t, 5*time.Minute), c.joinClock(t, -5*time.Minute), c.joinClock(t, 0)}
	for i, creator := range machines {
		session := freshSession()
		began := time.Now()
		session.CreatedAt = creator.Now()
		session.ExpiresAt = session.CreatedAt.Add(life)
		put(t, creator, session)

		ended := make([]bool, len(machines))
		for slices.Contains(ended, false) {
			for j, m := range machines {
				before := time.Since(began)
				expired, err := m.Expired(t.Context(), m.Now(), 10)
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
	r := c.join(t, c.addr)
	clock := NewClock(r.Store, time.Now)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := clock.Lock(ctx, uuid.New(), 0)
	must.ErrorIs(t, err, context.Canceled)
	must.ErrorContains(t, clock.Health(t.Context()), "the agreed time is not known")

	clock.measured(0)
	must.NoError(t, clock.Health(t.Context()))
	lease, err := clock.Lock(t.Context(), uuid.New(), 0)
	must.NoError(t, err)
	must.NoError(t, lease.Release(t.Context()))
}
