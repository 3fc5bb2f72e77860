package scheduler_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// TestQuota_isExceededByAtMostTheCreatesOfTheOtherReplicas lets all creates of several
// replicas count before any of them writes its intent, which is the worst that can be.
func TestQuota_isExceededByAtMostTheCreatesOfTheOtherReplicas(t *testing.T) {
	const limit, creates = 3, 8 // of each replica, at the same time
	for _, replicas := range []int{1, 2, 3} {
		t.Run(fmt.Sprint(replicas), func(t *testing.T) {
			w := newWorld(t, func(c *scheduler.Config) { c.MaxSessions = limit })
			all := []*scheduler.Scheduler{w.Scheduler}
			gate := make(chan struct{}) // opens once each replica has counted
			counted := make(chan struct{}, replicas)
			for range replicas - 1 {
				config := w.peerConfig()
				config.MaxSessions = limit
				config.Store = countingStore{config.Store, counted, gate}
				peer, err := scheduler.New(config)
				must.NoError(t, err)
				all = append(all, peer)
			}
			if replicas > 1 {
				go func() {
					for range replicas - 1 {
						<-counted
					}
					close(gate)
				}()
			}
			var made, refused atomic.Int32
			var running sync.WaitGroup
			for _, s := range all {
				for range creates {
					running.Go(func() {
						cmd := scheduler.CreateCommand{ChatID: uuid.New(), AgentID: "a", VolumeHostPath: "/data/a"}
						switch _, err := s.Create(t.Context(), cmd); {
						case err == nil:
							made.Add(1)
						case errors.Is(err, scheduler.ErrQuota):
							refused.Add(1)
						default:
							t.Error(err)
						}
					})
				}
			}
			running.Wait()
			must.Eq(t, int32(replicas*creates), made.Load()+refused.Load())
			must.Between(t, 1, int(made.Load()), limit+(replicas-1)*limit)
			if replicas == 1 {
				must.Eq(t, limit, int(made.Load()), must.Sprint("one replica alone fills the quota and never exceeds it"))
			}
		})
	}
}

// countingStore reports each count, and returns it once the gate is open.
type countingStore struct {
	scheduler.Store
	counted chan<- struct{}
	gate    <-chan struct{}
}

func (s countingStore) CountAgents(ctx context.Context, prefix string) (int, error) {
	n, err := s.Store.CountAgents(ctx, prefix)
	select {
	case s.counted <- struct{}{}:
	default:
	}
	<-s.gate
	return n, err
}

func TestQuota_isFreeAgainAfterAFailedStart(t *testing.T) {
	w := newWorld(t, func(c *scheduler.Config) { c.MaxSessions = 1 })
	w.given(fails("driver.create", runtime.ErrNotPlaced))
	_, err := w.Create(t.Context(), createA)
	must.ErrorIs(t, err, runtime.ErrNotPlaced)
	w.effects.heal()
	_, err = w.Create(t.Context(), createA)
	must.NoError(t, err)
}

func TestQuota_isUnknownWhileTheStoreIsAway(t *testing.T) {
	w := newWorld(t, func(c *scheduler.Config) { c.MaxSessions = 1 })
	w.given(fails("count agents", scheduler.ErrUnavailable))
	_, err := w.Create(t.Context(), createA)
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
	must.Eq(t, 0, w.driver.Created())
}

func TestQuota_ofARuleAndOfTheServerAreCountedApart(t *testing.T) {
	const limit = 2
	w := newWorld(t, func(c *scheduler.Config) { c.MaxSessions = 10 * limit })
	ctx := scheduler.WithCaller(t.Context(), scheduler.Caller{Name: "c", Policies: []*scheduler.Policy{{
		Agents: []scheduler.AgentRule{{Prefix: "", Capabilities: scheduler.CapWrite, MaxSessions: limit}},
	}}})
	create := func() error {
		_, err := w.Create(ctx, scheduler.CreateCommand{ChatID: uuid.New(), AgentID: "a", VolumeHostPath: "/data/a"})
		return err
	}
	for range limit {
		must.NoError(t, create())
	}
	must.ErrorIs(t, create(), scheduler.ErrQuota)
}

// largeCount is a store with many sessions, which take a second to count.
type largeCount struct {
	scheduler.Store
	sessions int
	counts   *int
}

func (s largeCount) CountAgents(context.Context, string) (int, error) {
	*s.counts++
	time.Sleep(time.Second)
	return s.sessions, nil
}

func TestQuota_countsManySessionsSeldom(t *testing.T) {
	const limit = 1_000_000
	for _, tc := range []struct {
		name     string
		sessions int
		want     int // counts for three creates within three seconds
	}{
		{"far_below_the_limit", limit / 2, 1},
		{"not_near_the_limit", limit - limit/20, 3},
	} {
		t.Run(tc.name, func(t *testing.T) {
			counts := 0
			inBubbleWith(t, func(c *scheduler.Config) {
				c.Store, c.MaxSessions = largeCount{c.Store, tc.sessions, &counts}, limit
			}, func(t *testing.T, w *world) {
				for range 3 {
					_, err := w.Create(t.Context(), someCreate())
					must.NoError(t, err)
				}
				must.Eq(t, tc.want, counts)

				pass(10 * time.Second)
				_, err := w.Create(t.Context(), someCreate())
				must.NoError(t, err)
				must.Eq(t, tc.want+1, counts, must.Sprint("the count is too old"))
			})
		})
	}
	t.Run("not_if_the_limit_is_low", func(t *testing.T) {
		counts := 0
		inBubbleWith(t, func(c *scheduler.Config) {
			c.Store, c.MaxSessions = largeCount{c.Store, 10, &counts}, 1000
		}, func(t *testing.T, w *world) {
			for range 3 {
				_, err := w.Create(t.Context(), someCreate())
				must.NoError(t, err)
			}
			must.Eq(t, 3, counts)
		})
	})
}
