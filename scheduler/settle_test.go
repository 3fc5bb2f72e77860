package scheduler_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

func TestSettleInFlight(t *testing.T) {
	for _, tc := range []struct {
		name  string
		given []func(*world)
		want  outcome
	}{{
		name:  "leaves sessions that stand alone",
		given: []func(*world){created(createA)},
		want: outcome{
			Effects: []string{"list in flight"},
			Metrics: []string{"sandbox.active.count 1"},
			Records: []string{"chat-a s1 running container-1 12:30:00"},
			Running: []string{"chat-a s1"},
		},
	}, {
		name:  "undoes a start whose replica is gone",
		given: []func(*world){abandonedStart},
		want: outcome{
			Effects: []string{"list in flight", "lock", "driver.find", "driver.inspect", "driver.delete", "remove + release"},
			Metrics: []string{"sandbox.active.count 0"},
			Logs:    []string{"info sandbox_settled chat_id=chat-a session_id=s1 container_id= state=creating"},
		},
	}, {
		name:  "finishes a stop whose replica is gone",
		given: []func(*world){created(createA), abandonedStop},
		want: outcome{
			Effects: []string{"list in flight", "lock", "driver.find", "driver.inspect", "driver.delete", "remove + release"},
			Metrics: []string{"sandbox.active.count 0"},
			Logs:    []string{"info sandbox_settled chat_id=chat-a session_id=s1 container_id=container-1 state=stopping"},
		},
	}, {
		name:  "leaves alone what somebody is at work on",
		given: []func(*world){abandonedStart, fails("lock", scheduler.ErrLockTimeout)},
		want: outcome{
			Effects: []string{"list in flight", "lock"},
			Metrics: []string{"sandbox.active.count 0"},
			Records: []string{"chat-a s1 creating  12:30:00"},
			Running: []string{"chat-a s1"},
		},
	}, {
		name:  "keeps the record of what cannot be stopped",
		given: []func(*world){abandonedStart, fails("driver.delete", errors.New("of no known kind"))},
		want: outcome{
			Effects: []string{"list in flight", "lock", "driver.find", "driver.inspect", "driver.delete", "release"},
			Metrics: []string{"sandbox.active.count 0"},
			Logs:    []string{"warn sandbox_settle_failed chat_id=chat-a session_id=s1 container_id= error=runtime_unavailable"},
			Records: []string{"chat-a s1 creating  12:30:00"},
			Running: []string{"chat-a s1"},
		},
	}, {
		name:  "tells where it cannot begin",
		given: []func(*world){abandonedStart, fails("list in flight", scheduler.ErrUnavailable)},
		want: outcome{
			Result:  "error store_unavailable",
			Effects: []string{"list in flight"},
			Metrics: []string{"sandbox.active.count 0"},
			Records: []string{"chat-a s1 creating  12:30:00"},
			Running: []string{"chat-a s1"},
		},
	}} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.given(tc.given...)
			err := w.SettleInFlight(t.Context())
			must.Eq(t, tc.want, w.outcome("", err))
		})
	}
}

// A start that is under way holds its chat's lock, so it is not taken for an
// abandoned one, on this replica or another.
func TestSettleInFlight_leavesAStartThatIsUnderWay(t *testing.T) {
	w := newWorld(t)
	other := w.peer()
	w.effects.before("driver.create", func() {
		must.NoError(t, w.SettleInFlight(t.Context()))
		must.NoError(t, other.SettleInFlight(t.Context()))
	})

	_, err := w.Create(t.Context(), createA)

	must.NoError(t, err)
	must.Eq(t, []string{"chat-a s1"}, w.running())
}

func TestSettleInFlight_leavesAStartThatEndedMeanwhile(t *testing.T) {
	w := newWorld(t)
	begun, finish, created := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	w.effects.before("driver.create", func() {
		close(begun)
		<-finish
	})
	go func() {
		_, err := w.peer().Create(context.Background(), createA)
		created <- err
	}()
	<-begun
	w.effects.before("lock", func() { // the list has shown it in flight
		close(finish)
		must.NoError(t, <-created)
	})

	must.NoError(t, w.SettleInFlight(t.Context()))

	must.Eq(t, []string{"list in flight", "lock", "release"}, withoutDriver(w.effects.taken()))
	must.Eq(t, []string{"chat-a unwritten running container-1 12:30:00"}, w.records())
	must.Eq(t, []string{"chat-a unwritten"}, w.running())
}

func withoutDriver(effects []string) []string {
	return slices.DeleteFunc(effects, func(name string) bool { return strings.HasPrefix(name, "driver.") })
}

func TestSettleInFlight_looksAgainUnderTheLock(t *testing.T) {
	w := newWorld(t)
	w.given(abandonedStart)
	other := w.peer()
	w.effects.before("lock", func() {
		_, err := other.Create(t.Context(), createA)
		must.NoError(t, err)
	})

	must.NoError(t, w.SettleInFlight(t.Context()))

	must.Eq(t, []string{"chat-a unwritten running container-2 12:30:00"}, w.records())
	must.Eq(t, []string{"chat-a unwritten"}, w.running())
}

// A replica that hangs in mid-start past its lock, while another one takes its
// intent over, cannot start anything any more when it wakes up.
func TestSettleInFlight_aStartThatWakesUpLateFails(t *testing.T) {
	w := newWorld(t)
	other := w.peer()
	w.effects.hook(effect{Name: "driver.create"}, hook{before: func(context.Context) error {
		w.locker.End() // the replica does not notice: its context goes on
		must.NoError(t, other.SettleInFlight(t.Context()))
		return nil
	}})
	stubborn := newWorld(t, func(c *scheduler.Config) {
		c.Store, c.Locker = recordingStore{w.store, w.effects}, unnoticed{recordingLocker{w.locker, w.effects}}
		c.Drivers = map[string]runtime.Driver{"fake": w.driver}
	})

	_, err := stubborn.Create(t.Context(), createA)

	must.ErrorIs(t, err, runtime.ErrConflict)
	must.SliceEmpty(t, w.records())
	must.SliceEmpty(t, w.running())
	must.Zero(t, w.driver.Created())
}

// unnoticed is a locker whose leases never tell that they were lost.
type unnoticed struct{ scheduler.Locker }

func (u unnoticed) Lock(ctx context.Context, chat uuid.UUID, wait time.Duration) (scheduler.Lease, error) {
	lease, err := u.Locker.Lock(ctx, chat, wait)
	if err != nil {
		return nil, err
	}
	return deaf{lease}, nil
}

type deaf struct{ scheduler.Lease }

func (deaf) Lost() <-chan struct{} { return nil }
