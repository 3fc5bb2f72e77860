package consul

import (
	"context"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/simulate/consulmodel"
	"github.com/bivouac/bivouac/internal/test/simulate/network"
)

// sleeper is a machine that can be suspended. Its monotonic clock, its requests
// and its replica stop while it is suspended.
type sleeper struct {
	*Clock
	http.RoundTripper

	mu    sync.Mutex
	awake chan struct{} // closed while it is awake
	off   time.Duration // offset of the machine's clock
}

func startSleeper(t *testing.T, server network.Server) *sleeper {
	t.Helper()
	s := &sleeper{RoundTripper: network.Direct{Server: server}, awake: make(chan struct{})}
	close(s.awake)
	client, err := NewClient(&api.Config{HttpClient: &http.Client{Transport: s}}, nil)
	must.NoError(t, err)
	s.Clock, err = NewClock(client, DefaultPrefix, func() time.Time {
		s.mu.Lock()
		defer s.mu.Unlock()
		return time.Now().Add(s.off)
	}, hclog.NewNullLogger())
	must.NoError(t, err)
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() { _ = s.Run(ctx) })
	t.Cleanup(func() {
		stop()
		running.Wait()
	})
	return s
}

// RoundTrip delays requests and answers while the machine is suspended.
func (s *sleeper) RoundTrip(r *http.Request) (*http.Response, error) {
	s.await()
	response, err := s.RoundTripper.RoundTrip(r)
	s.await()
	return response, err
}

func (s *sleeper) await() {
	s.mu.Lock()
	awake := s.awake
	s.mu.Unlock()
	<-awake
}

func (s *sleeper) suspend() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.awake = make(chan struct{})
}

// resume wakes the machine after a sleep of d. Its clock is then behind by lag.
func (s *sleeper) resume(d, lag time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.began, s.off = s.began.Add(d), s.off-lag
	close(s.awake)
}

func (s *sleeper) setClock(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.off += d
}

// behind returns how far the machine's agreed time is behind.
func (s *sleeper) behind() time.Duration { return time.Since(s.Now()) }

// TestSuspendedMachineComesBack checks that a machine that was suspended
// returns to the others' time and does not change it.
func TestSuspendedMachineComesBack(t *testing.T) {
	for name, tc := range map[string]struct {
		slept time.Duration
		lag   time.Duration // of the machine's clock, until it is corrected
	}{
		"after minutes":                  {slept: 3 * time.Minute},
		"after hours":                    {slept: time.Hour},
		"after minutes, its clock stood": {slept: 3 * time.Minute, lag: 3 * time.Minute},
		"after hours, its clock stood":   {slept: time.Hour, lag: time.Hour},
	} {
		for _, which := range []int{0, 1} { // the one that writes the time, and one that follows
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					server := consulmodel.New(2)
					t.Cleanup(server.Close)
					var machines []*sleeper
					for range 3 {
						machines = append(machines, startSleeper(t, server))
						pass(10 * time.Second)
					}
					othersAreRight := func() {
						t.Helper()
						for i, m := range machines {
							if i != which {
								must.Less(t, tolerance, m.behind().Abs(), must.Sprintf("machine %d", i))
							}
						}
					}
					m := machines[which]
					m.suspend()
					for range 10 {
						pass(tc.slept / 10)
						othersAreRight()
					}
					m.resume(tc.slept, tc.lag)
					for range 50 {
						pass(100 * time.Millisecond)
						othersAreRight()
					}
					if tc.lag > maxSkew {
						must.Between(t, tc.slept-tolerance, m.behind(), tc.slept+tolerance)
						must.ErrorContains(t, m.Health(t.Context()), "ahead of the agreed time")
					}
					m.setClock(tc.lag)
					pass(5 * time.Second)
					othersAreRight()
					must.Less(t, tolerance, m.behind().Abs())
					pass(reportFor)
					must.NoError(t, m.Health(t.Context()))
				})
			})
		}
	}
}

// TestTimeGoesOnWhereItStoodWhenAllMachinesWereSuspended checks that the time
// continues from where it stopped if all machines were suspended, even for a
// replica that joins after that.
func TestTimeGoesOnWhereItStoodWhenAllMachinesWereSuspended(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const slept = time.Hour
		server := consulmodel.New(2)
		t.Cleanup(server.Close)
		machines := []*sleeper{startSleeper(t, server), startSleeper(t, server)}
		pass(10 * time.Second)
		for _, m := range machines {
			m.suspend()
		}
		pass(slept)
		for _, m := range machines {
			m.resume(slept, 0)
		}
		pass(10 * time.Second)
		machines = append(machines, startSleeper(t, server))
		pass(5 * time.Second)
		for i, m := range machines {
			must.Between(t, slept-5*time.Second, m.behind(), slept+5*time.Second, must.Sprintf("machine %d", i))
			must.ErrorContains(t, m.Health(t.Context()), "behind this machine's clock")
		}
	})
}

// TestWrongTimeThatIsWrittenAgainAndAgain checks that a wrong time that is
// written repeatedly changes no replica's time, and that the replicas do not
// flood Consul.
func TestWrongTimeThatIsWrittenAgainAndAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := consulmodel.New(2)
		t.Cleanup(server.Close)
		machines := []*sleeper{startSleeper(t, server), startSleeper(t, server)}
		pass(10 * time.Second)
		evil := machines[0].client.KV()
		key := machines[0].key
		var writes uint64
		for range 600 {
			before := server.Keys(key)[key].ModifyIndex
			_, err := evil.Put(&api.KVPair{Key: key, Value: []byte(byHand(time.Now().Add(24 * time.Hour)))}, nil)
			must.NoError(t, err)
			pass(100 * time.Millisecond)
			writes += server.Keys(key)[key].ModifyIndex - before
			for i, m := range machines {
				must.Less(t, tolerance, m.behind().Abs(), must.Sprintf("machine %d", i))
			}
		}
		must.LessEq(t, 600+2*62, writes, must.Sprint("at most one a second of each replica"))
	})
}

// pass lets time pass. In a synctest bubble that takes no real time.
func pass(d time.Duration) { <-time.After(d) }
