package consul

import (
	"context"
	"net/http"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/faultproxy"
	"github.com/bivouac/bivouac/scheduler"
)

// TestLockThatNobodyWaitsForAnyMoreIsCleared covers a caller that leaves while
// its lock is being taken. The lock is then freed.
func TestLockThatNobodyWaitsForAnyMoreIsCleared(t *testing.T) {
	c, direct, proxied, p := behindProxy(t)
	chatID := uuid.New()
	ctx, giveUp := context.WithCancel(t.Context())
	p.do(first(1, "lock", func(w http.ResponseWriter, r *http.Request, consul http.Handler) {
		giveUp()
		faultproxy.LoseReply(w, r.WithContext(context.WithoutCancel(r.Context())), consul)
	}))
	_, err := proxied.Lock(ctx, chatID, patience)
	must.ErrorIs(t, err, context.Canceled)
	must.NoError(t, lock(t, direct, chatID).Release(t.Context()))
	c.MustBeEmpty(t)
}

// TestLockThatCouldNotBeReleasedIsCleared covers a failed release, which is
// repeated later.
func TestLockThatCouldNotBeReleasedIsCleared(t *testing.T) {
	c, direct, proxied, p := behindProxy(t)
	chatID := uuid.New()
	lease := lock(t, proxied, chatID)
	p.do(first(maxTries, "release", faultproxy.Drop))
	must.ErrorIs(t, lease.Release(t.Context()), scheduler.ErrUnavailable)
	must.NoError(t, lease.Release(t.Context()))
	must.NoError(t, lock(t, direct, chatID).Release(t.Context()))
	c.MustBeEmpty(t)
}

// TestLockThatIsTakenOnceMoreIsCleared covers a lock request that a proxy kept
// back and answered with an error. It reaches Consul after the lock was taken
// and released, and takes the lock again. That lock is then freed.
func TestLockThatIsTakenOnceMoreIsCleared(t *testing.T) {
	c, direct, proxied, p := behindProxy(t)
	chatID := uuid.New()
	arrive, arrived := make(chan struct{}), make(chan struct{})
	p.do(first(1, "lock", func(w http.ResponseWriter, r *http.Request, consul http.Handler) {
		r = r.Clone(context.WithoutCancel(r.Context()))
		go func() {
			defer close(arrived)
			<-arrive
			consul.ServeHTTP(&faultproxy.Discard{}, r)
		}()
		w.WriteHeader(http.StatusBadGateway)
	}))
	must.NoError(t, lock(t, proxied, chatID).Release(t.Context()))
	close(arrive)
	<-arrived

	must.NoError(t, lock(t, direct, chatID).Release(t.Context()))
	c.MustBeEmpty(t)
}

// TestLockOfAnEditedRecordIsCleared covers a record that is edited by hand
// while an operation holds its chat's lock. The operation gets ErrLockLost, and
// others can take the lock.
func TestLockOfAnEditedRecordIsCleared(t *testing.T) {
	c := open(t)
	a, b := c.join(t, c.addr), c.join(t, c.addr)
	session := freshSession()
	put(t, a, session)
	lease := lock(t, a, session.ChatID)
	key := a.keys.record(session.ChatID)
	pair, _, err := c.client.KV().Get(key, nil)
	must.NoError(t, err)
	_, err = c.client.KV().Put(&api.KVPair{Key: key, Value: append(pair.Value, ' ')}, nil)
	must.NoError(t, err)

	next := session
	next.ExpiresAt = next.ExpiresAt.Add(time.Hour)
	must.ErrorIs(t, lease.Write(t.Context(), &next, scheduler.Release), scheduler.ErrLockLost)
	<-lease.Lost()
	must.NoError(t, lease.Release(t.Context()))

	must.NoError(t, lock(t, b, session.ChatID).Write(t.Context(), nil, scheduler.Release))
	c.MustBeEmpty(t)
}

// TestLockThatIsOverwrittenByHandIsCleared covers a lock key that is
// overwritten by hand while an operation holds the lock. The operation gets
// ErrLockLost, and other replicas can take the lock.
func TestLockThatIsOverwrittenByHandIsCleared(t *testing.T) {
	c := open(t)
	a, b := c.join(t, c.addr), c.join(t, c.addr)
	session := freshSession()
	lease := lock(t, a, session.ChatID)
	_, err := c.client.KV().Put(&api.KVPair{Key: a.keys.lock(session.ChatID), Value: []byte("by hand")}, nil)
	must.NoError(t, err)

	must.ErrorIs(t, lease.Write(t.Context(), &session, scheduler.Release), scheduler.ErrLockLost)
	must.NoError(t, lease.Release(t.Context()))

	next, err := b.Lock(t.Context(), session.ChatID, 30*time.Second)
	must.NoError(t, err)
	must.NoError(t, next.Release(t.Context()))
	c.MustBeEmpty(t)
}

// TestLockThatIsOverwrittenByHandIsReleased covers the same for a lock that is
// released without a write.
func TestLockThatIsOverwrittenByHandIsReleased(t *testing.T) {
	c := open(t)
	a, b := c.join(t, c.addr), c.join(t, c.addr)
	chatID := uuid.New()
	lease := lock(t, a, chatID)
	_, err := c.client.KV().Put(&api.KVPair{Key: a.keys.lock(chatID), Value: []byte("by hand")}, nil)
	must.NoError(t, err)
	must.NoError(t, lease.Release(t.Context()))

	next, err := b.Lock(t.Context(), chatID, 30*time.Second)
	must.NoError(t, err)
	must.NoError(t, next.Release(t.Context()))
	c.MustBeEmpty(t)
}
