package consul

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/internal/test/faultproxy"
	"github.com/bivouac/bivouac/scheduler"
)

// sessionOf returns the replica's session from Consul, or nil if it does not
// exist.
func sessionOf(t *testing.T, c *cluster, r *replica) *api.SessionEntry {
	t.Helper()
	hold, err := r.session.current(t.Context())
	must.NoError(t, err)
	entry, _, err := c.client.Session().Info(hold.session, nil)
	must.NoError(t, err)
	return entry
}

func TestSessionDependsOnNoHealthCheckAndTakesItsLocksAlong(t *testing.T) {
	c := open(t)
	r := c.join(t, c.addr)
	entry := sessionOf(t, c, r)
	must.Eq(t, "bivouac "+r.Instance()+" on "+t.Name(), entry.Name)
	must.Eq(t, "10s", entry.TTL)
	must.Eq(t, api.SessionBehaviorDelete, entry.Behavior)
	must.Eq(t, time.Millisecond, entry.LockDelay)
	must.SliceEmpty(t, entry.NodeChecks)
	must.SliceEmpty(t, entry.ServiceChecks)
}

// TestReplicaThatIsCutOffStopsBeforeOthersBegin covers a replica that can no
// longer reach Consul. It gives up its locks before Consul gives them to
// others. When it can reach Consul again, its old session does no harm.
func TestReplicaThatIsCutOffStopsBeforeOthersBegin(t *testing.T) {
	t.Parallel()
	c, direct, proxied, p := behindProxy(t)
	chatID := uuid.New()
	lease := lock(t, proxied, chatID)
	p.do(always(faultproxy.Drop))
	<-lease.Lost()
	_, err := direct.Lock(t.Context(), chatID, 0)
	must.ErrorIs(t, err, scheduler.ErrLockTimeout)

	session := freshSession()
	session.ChatID = chatID
	must.ErrorIs(t, lease.Write(t.Context(), &session, scheduler.Keep), scheduler.ErrLockLost)
	must.NoError(t, lease.Release(t.Context()))

	p.do(nil)
	must.NoError(t, lock(t, direct, chatID).Release(t.Context()))
	must.NoError(t, lock(t, direct, chatID).Release(t.Context()))
	c.MustBeEmpty(t)
}

func TestSessionIsRenewed(t *testing.T) {
	t.Parallel()
	c := open(t)
	r := c.join(t, c.addr)
	lease := lock(t, r, uuid.New())
	hold, err := r.session.current(t.Context())
	must.NoError(t, err)
	began := hold.until()
	<-time.After(time.Until(began) + time.Second)
	must.True(t, hold.until().After(began))
	must.False(t, hold.over())
	must.NoError(t, lease.Release(t.Context()))
}

func TestCleanEndWaitsForLeasesAndDestroysTheSession(t *testing.T) {
	c := open(t)
	r := c.join(t, c.addr)
	session := freshSession()
	lease := lock(t, r, session.ChatID)
	id := sessionOf(t, c, r).ID

	var ended sync.WaitGroup
	ended.Go(r.leave)
	for { // until it gives out no new locks
		other, err := r.Lock(t.Context(), uuid.New(), patience)
		if err != nil {
			must.ErrorIs(t, err, scheduler.ErrUnavailable)
			break
		}
		must.NoError(t, other.Release(t.Context()))
	}
	must.NoError(t, lease.Write(t.Context(), &session, scheduler.Keep))
	must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))
	ended.Wait()

	entry, _, err := c.client.Session().Info(id, nil)
	must.NoError(t, err)
	must.Nil(t, entry)
	c.MustBeEmpty(t)
}

func TestRequestsPerOperation(t *testing.T) {
	_, _, proxied, p := behindProxy(t)
	session := freshSession()
	renewed := session
	renewed.ExpiresAt = session.ExpiresAt.Add(time.Hour)
	noteChange(t, proxied, "the head is known")
	_ = p.kinds()

	lease := lock(t, proxied, session.ChatID)
	must.Eq(t, []string{"lock"}, p.kinds())
	must.NoError(t, lease.Write(t.Context(), &session, scheduler.Keep, changeOf(session, "1"), changeOf(session, "2")))
	must.Eq(t, []string{"write"}, p.kinds())
	must.NoError(t, lease.Write(t.Context(), &session, scheduler.Keep))
	must.Eq(t, []string{"write"}, p.kinds())
	must.NoError(t, lease.Write(t.Context(), &renewed, scheduler.Release))
	must.NoError(t, lease.Release(t.Context()))
	must.Eq(t, []string{"write"}, p.kinds())
	must.Eq(t, &renewed, read(t, proxied, session.ChatID))
	must.Eq(t, []string{"get"}, p.kinds())
	lease = lock(t, proxied, session.ChatID)
	must.NoError(t, lease.Release(t.Context()))
	must.Eq(t, []string{"lock", "release"}, p.kinds())
}

func TestWaitingForALockDoesNotPoll(t *testing.T) {
	_, direct, proxied, p := behindProxy(t)
	chatID := uuid.New()
	lease := lock(t, direct, chatID)

	parked := make(chan struct{}, 10)
	p.do(func(r request) fault {
		if r.blocking {
			parked <- struct{}{}
		}
		return nil
	})
	_ = p.kinds()
	var waiters sync.WaitGroup
	for range 3 { // all in one replica: only the first of them asks Consul
		waiters.Go(func() {
			lease, err := proxied.Lock(t.Context(), chatID, patience)
			if err == nil {
				err = lease.Release(t.Context())
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	<-parked
	must.Eq(t, []string{"lock", "get", "blocking get"}, p.kinds())
	must.NoError(t, lease.Release(t.Context()))
	waiters.Wait()
	must.Eq(t, []string{"lock", "release", "lock", "release", "lock", "release"}, p.kinds())
}

// TestManyLocksAreWaitedForAtATime covers more locked chats than can be waited
// for at a time, together with the maximum number of blocking reads. Each lock
// is still taken soon after it becomes free.
func TestManyLocksAreWaitedForAtATime(t *testing.T) {
	c := open(t)
	holder, waiter := c.join(t, c.addr), c.join(t, c.addr)
	reading, stop := context.WithCancel(t.Context())
	var reads, waits sync.WaitGroup
	for range maxParked {
		reads.Go(func() { _, _, _ = waiter.Get(reading, uuid.New(), scheduler.Block{Index: 1 << 50, Wait: patience}) })
	}
	held := make([]scheduler.Lease, maxAwaited+20)
	for i := range held {
		chatID := uuid.New()
		held[i] = lock(t, holder, chatID)
		waits.Go(func() {
			lease, err := waiter.Lock(t.Context(), chatID, patience)
			if err == nil {
				err = lease.Release(t.Context())
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	for _, lease := range held {
		must.NoError(t, lease.Release(t.Context()))
	}
	waits.Wait()
	stop()
	reads.Wait()
}

func TestBlockingReadsAreBounded(t *testing.T) {
	c := open(t)
	r := c.join(t, c.addr)
	ctx, stop := context.WithCancel(t.Context())
	chatID := uuid.New()
	results := make(chan error, maxParked+1)
	var reads sync.WaitGroup
	for range maxParked + 1 {
		reads.Go(func() {
			for { // a read may return early
				_, _, err := r.Get(ctx, chatID, scheduler.Block{Index: 1 << 50, Wait: patience})
				if err != nil {
					results <- err
					return
				}
			}
		})
	}
	must.ErrorIs(t, <-results, scheduler.ErrBusy)
	must.Nil(t, read(t, r, chatID)) // a read that does not block is always allowed
	stop()
	reads.Wait()
}

func TestReplicas(t *testing.T) {
	t.Parallel()
	c := open(t)
	names := func(store *Store) []string {
		t.Helper()
		replicas, err := store.Replicas(t.Context())
		must.NoError(t, err)
		var names []string
		for _, r := range replicas {
			must.Eq(t, "1.2.3", r.Version)
			must.Eq(t, []string{"10.0.0.1:4747"}, r.Addresses)
			must.Positive(t, r.StartedAt.Unix())
			names = append(names, r.Name)
		}
		return names
	}
	// run runs a replica until leave is called.
	run := func(name string) (store *Store, leave func()) {
		store, err := New(c.client, Config{
			Prefix: c.prefix, Instance: "test", Name: name, Version: "1.2.3", Addresses: []string{"10.0.0.1:4747"}, Logger: hclog.NewNullLogger(),
		})
		must.NoError(t, err)
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = store.Run(ctx) })
		return store, func() { stop(); running.Wait() }
	}
	first, leaveFirst := run("first")
	must.Wait(t, wait.InitialSuccess(wait.BoolFunc(func() bool { return len(names(first)) == 1 }), wait.Timeout(patience), wait.Gap(10*time.Millisecond)))
	second, leaveSecond := run("second")
	defer leaveSecond()
	must.Wait(t, wait.InitialSuccess(wait.BoolFunc(func() bool { return len(names(second)) == 2 }), wait.Timeout(patience), wait.Gap(10*time.Millisecond)))
	must.Eq(t, []string{"first", "second"}, names(first))

	c.set(t, first.keys.replicas()+"by-hand", `{"name":"x"}`)
	leaveFirst()
	must.Eq(t, []string{"second"}, names(second))

	// A replica whose Consul session was lost is there again with the next one.
	hold, err := second.session.current(t.Context())
	must.NoError(t, err)
	_, err = c.client.Session().Destroy(hold.session, nil)
	must.NoError(t, err)
	must.SliceEmpty(t, names(second))
	second.session.look()
	must.Wait(t, wait.InitialSuccess(wait.BoolFunc(func() bool { return len(names(second)) == 1 }), wait.Timeout(patience), wait.Gap(10*time.Millisecond)))
}
