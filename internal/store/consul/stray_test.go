package consul

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

// Given a caller who leaves while its lock is being taken, then nobody holds it.
func TestLockThatNobodyWaitsForAnyMoreIsCleared(t *testing.T) {
	c, direct, proxied, p := behindProxy(t)
	chatID := uuid.New()
	ctx, giveUp := context.WithCancel(t.Context())
	p.do(first(1, "lock", func(w http.ResponseWriter, r *http.Request, consul http.Handler) {
		giveUp()
		loseReply(w, r.WithContext(context.WithoutCancel(r.Context())), consul)
	}))
	_, err := proxied.Lock(ctx, chatID, patience)
	must.ErrorIs(t, err, context.Canceled)
	must.NoError(t, lock(t, direct, chatID).Release(t.Context()))
	c.MustBeEmpty(t)
}

// Given a release that could not be made, then it is made up for later.
func TestLockThatCouldNotBeReleasedIsCleared(t *testing.T) {
	c, direct, proxied, p := behindProxy(t)
	chatID := uuid.New()
	lease := lock(t, proxied, chatID)
	p.do(first(maxTries, "release", loseRequest))
	must.ErrorIs(t, lease.Release(t.Context()), scheduler.ErrUnavailable)
	must.NoError(t, lease.Release(t.Context()))
	must.NoError(t, lock(t, direct, chatID).Release(t.Context()))
	c.MustBeEmpty(t)
}

// Given a request for a lock that a proxy kept and answered for with an error,
// when it comes to Consul after the lock was had and released, then the lock that
// it takes is cleared.
func TestLockThatIsTakenOnceMoreIsCleared(t *testing.T) {
	c, direct, proxied, p := behindProxy(t)
	chatID := uuid.New()
	arrive, arrived := make(chan struct{}), make(chan struct{})
	p.do(first(1, "lock", func(w http.ResponseWriter, r *http.Request, consul http.Handler) {
		r = r.Clone(context.WithoutCancel(r.Context()))
		go func() {
			defer close(arrived)
			<-arrive
			consul.ServeHTTP(httptest.NewRecorder(), r)
		}()
		w.WriteHeader(http.StatusBadGateway)
	}))
	must.NoError(t, lock(t, proxied, chatID).Release(t.Context()))
	close(arrive)
	<-arrived

	must.NoError(t, lock(t, direct, chatID).Release(t.Context()))
	c.MustBeEmpty(t)
}

// Given a record that somebody edits while an operation holds its chat's lock,
// then the operation learns that its lock is lost, and others can have it.
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

// Given a lock's key that somebody overwrites while an operation holds it, then the
// operation learns that its lock is lost, and other replicas can have it.
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

// The same for one that is released without a write.
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
