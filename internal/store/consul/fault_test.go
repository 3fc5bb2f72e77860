package consul

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/faultproxy"
	"github.com/bivouac/bivouac/scheduler"
)

const patience = 2 * time.Minute

// behindProxy returns a cluster, a replica that connects to Consul directly,
// and one behind a proxy that already has its session.
func behindProxy(t *testing.T) (c *cluster, direct, proxied *replica, p *proxy) {
	t.Helper()
	c = open(t)
	p = newProxy(t, c.addr)
	direct, proxied = c.join(t, c.addr), c.join(t, p.addr)
	_, err := proxied.session.current(t.Context())
	must.NoError(t, err)
	return c, direct, proxied, p
}

func lock(t *testing.T, locker scheduler.Locker, chatID uuid.UUID) scheduler.Lease {
	t.Helper()
	lease, err := locker.Lock(t.Context(), chatID, patience)
	must.NoError(t, err)
	return lease
}

func read(t *testing.T, store scheduler.Store, chatID uuid.UUID) *scheduler.Session {
	t.Helper()
	session, _, err := store.Get(t.Context(), chatID, scheduler.Block{})
	must.NoError(t, err)
	return session
}

func put(t *testing.T, locker scheduler.Locker, session scheduler.Session) {
	t.Helper()
	must.NoError(t, lock(t, locker, session.ChatID).Write(t.Context(), &session, scheduler.Release))
}

func freshSession() scheduler.Session {
	session := testSession()
	session.SessionID, session.ChatID = uuid.New(), uuid.New()
	return session
}

// mistakes returns faults of a single request after which its sender does not
// know whether it was applied.
func mistakes() map[string]fault {
	return map[string]fault{
		"the reply is lost":               faultproxy.LoseReply,
		"the request is lost":             faultproxy.Drop,
		"it is applied and answered 500":  answerAfter(http.StatusInternalServerError),
		"it is turned away with 429":      answer(http.StatusTooManyRequests),
		"it is turned away with 503":      answer(http.StatusServiceUnavailable),
		"it is not applied, answered 500": answer(http.StatusInternalServerError),
	}
}

func TestLockIsTakenWhateverHappensToARequest(t *testing.T) {
	for name, mistake := range mistakes() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, direct, proxied, p := behindProxy(t)
			session := freshSession()
			put(t, direct, session)

			p.do(first(2, "lock", mistake))
			lease := lock(t, proxied, session.ChatID)
			must.Eq(t, &session, lease.Session())
			_, err := direct.Lock(t.Context(), session.ChatID, 0)
			must.ErrorIs(t, err, scheduler.ErrLockTimeout)

			p.do(first(2, "release", mistake))
			must.NoError(t, lease.Release(t.Context()))
			must.NoError(t, lock(t, direct, session.ChatID).Write(t.Context(), nil, scheduler.Release))
			c.MustBeEmpty(t)
		})
	}
}

func TestWriteIsMadeOnceWhateverHappensToARequest(t *testing.T) {
	for name, mistake := range mistakes() {
		for _, then := range []scheduler.Then{scheduler.Keep, scheduler.Release} {
			t.Run(map[scheduler.Then]string{scheduler.Keep: "keep, ", scheduler.Release: "release, "}[then]+name, func(t *testing.T) {
				t.Parallel()
				c, direct, proxied, p := behindProxy(t)
				session := freshSession()
				renewed := session
				renewed.ExpiresAt = session.ExpiresAt.Add(time.Hour)

				lease := lock(t, proxied, session.ChatID)
				for _, next := range []*scheduler.Session{&session, &renewed, nil} {
					if then == scheduler.Release {
						must.NoError(t, lease.Release(t.Context()))
						lease = lock(t, proxied, session.ChatID)
					}
					p.do(first(1, "write", mistake))
					must.NoError(t, lease.Write(t.Context(), next, then))
					must.Eq(t, next, lease.Session())
					must.Eq(t, next, read(t, direct, session.ChatID))

					free := then == scheduler.Release
					other, err := direct.Lock(t.Context(), session.ChatID, 0)
					if free {
						must.NoError(t, err)
						must.NoError(t, other.Release(t.Context()))
					} else {
						must.ErrorIs(t, err, scheduler.ErrLockTimeout)
					}
				}
				must.NoError(t, lease.Release(t.Context()))
				c.MustBeEmpty(t)
			})
		}
	}
}

func TestReadsBridgeAShortRefusal(t *testing.T) {
	_, direct, proxied, p := behindProxy(t)
	session := freshSession()
	session.ExpiresAt = session.CreatedAt
	put(t, direct, session)
	for kind, readAgain := range map[string]func() error{
		"get": func() error {
			_, _, err := proxied.Get(t.Context(), session.ChatID, scheduler.Block{})
			return err
		},
		"keys": func() error {
			_, err := proxied.Count(t.Context())
			return err
		},
		"read txn": func() error {
			_, err := proxied.Expired(t.Context(), session.ExpiresAt, 10)
			return err
		},
	} {
		p.do(first(2, kind, answer(http.StatusTooManyRequests)))
		must.NoError(t, readAgain(), must.Sprint(kind))
		p.do(always(answer(http.StatusTooManyRequests)))
		must.ErrorIs(t, readAgain(), scheduler.ErrUnavailable, must.Sprint(kind))
	}
}

// TestStormOf429IsWaitedOut checks that nothing is lost, not even the replica's
// locks, if Consul refuses all requests for a while, as behind a rate limiter.
func TestStormOf429IsWaitedOut(t *testing.T) {
	t.Parallel()
	c, direct, proxied, p := behindProxy(t)
	// Between two storms the Consul session is renewed. A lock needs that
	// within 9 s.
	storm := func() {
		renewed := make(chan struct{})
		once := sync.OnceFunc(func() { close(renewed) })
		p.do(func(r request) fault {
			if r.kind == "session" {
				once()
			}
			return nil
		})
		proxied.session.look()
		<-renewed
		over := time.Now().Add(3 * time.Second)
		p.do(func(request) fault {
			if time.Now().After(over) {
				return nil
			}
			return busy
		})
	}
	session := freshSession()
	session.ExpiresAt = session.CreatedAt

	storm()
	lease := lock(t, proxied, session.ChatID)
	storm()
	must.NoError(t, lease.Write(t.Context(), &session, scheduler.Keep))
	storm()
	must.Eq(t, &session, read(t, proxied, session.ChatID))
	storm()
	expired, err := proxied.Expired(t.Context(), session.ExpiresAt, 10)
	must.NoError(t, err)
	must.Eq(t, []scheduler.Session{session}, expired)
	storm()
	must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))
	must.Nil(t, read(t, direct, session.ChatID))
	c.MustBeEmpty(t)
}

// TestStormOf429ThatLetsSomeThroughIsWaitedOut checks that, if Consul refuses
// most requests at random, each request is repeated until it is accepted.
func TestStormOf429ThatLetsSomeThroughIsWaitedOut(t *testing.T) {
	t.Parallel()
	c, direct, proxied, p := behindProxy(t)
	session := freshSession()
	var seen atomic.Int64
	p.do(func(request) fault {
		if seen.Add(1)%3 == 0 {
			return nil
		}
		return busy
	})
	lease := lock(t, proxied, session.ChatID)
	for range 8 {
		session.ExpiresAt = session.ExpiresAt.Add(time.Minute)
		must.NoError(t, lease.Write(t.Context(), &session, scheduler.Keep))
		must.Eq(t, &session, read(t, direct, session.ChatID))
	}
	must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))
	c.MustBeEmpty(t)
}

func busy(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
	w.Header().Set("Retry-After", "1")
	w.WriteHeader(http.StatusTooManyRequests)
}

// TestUnknownOutcomeIsSaidAndFoundOutLater covers a write that is applied but
// whose reply is lost, with all later requests. The caller is told that the
// outcome is unknown. Once Consul is reachable again, the lease finds out by
// itself.
func TestUnknownOutcomeIsSaidAndFoundOutLater(t *testing.T) {
	c, direct, proxied, p := behindProxy(t)
	session := freshSession()
	running := session
	session.State = scheduler.StateCreating

	lease := lock(t, proxied, session.ChatID)
	p.do(always(faultproxy.LoseReply)) // a read has no effect, so it only fails
	must.ErrorIs(t, lease.Write(t.Context(), &session, scheduler.Keep), scheduler.ErrUnavailable)
	must.Eq(t, &session, read(t, direct, session.ChatID))

	p.do(nil)
	must.NoError(t, lease.Write(t.Context(), &running, scheduler.Keep))
	must.Eq(t, &running, read(t, direct, session.ChatID))
	must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))
	c.MustBeEmpty(t)
}

func TestLockLostWhileAWriteIsUnanswered(t *testing.T) {
	c, direct, proxied, p := behindProxy(t)
	session := freshSession()
	put(t, direct, session)
	dead := session
	dead.State = scheduler.StateDead

	lease := lock(t, proxied, session.ChatID)
	p.do(first(1, "write", func(http.ResponseWriter, *http.Request, http.Handler) {
		// Another replica takes over before the request could arrive.
		c.BreakLock(t, session.ChatID)
		panic(http.ErrAbortHandler)
	}))
	must.ErrorIs(t, lease.Write(t.Context(), &dead, scheduler.Keep), scheduler.ErrLockLost)
	<-lease.Lost()
	must.Eq(t, &session, read(t, direct, session.ChatID))
}

// holdFirstWrite keeps the next write in transit until its sender's context is
// done. arrive then delivers it.
func holdFirstWrite(t *testing.T, p *proxy) (sending context.Context, arrive func()) {
	sending, giveUp := context.WithCancel(t.Context())
	sent, answered := make(chan struct{}), make(chan struct{})
	p.do(first(1, "write", func(w http.ResponseWriter, r *http.Request, consul http.Handler) {
		defer close(answered)
		giveUp()
		<-sent
		faultproxy.LoseReply(w, r.WithContext(context.WithoutCancel(r.Context())), consul)
	}))
	return sending, func() {
		close(sent)
		<-answered
	}
}

// TestWriteThatArrivesLateChangesNothing covers a write that is in transit when
// its caller has given up and released the lock. When it finally arrives, it
// changes nothing.
func TestWriteThatArrivesLateChangesNothing(t *testing.T) {
	_, direct, proxied, p := behindProxy(t)
	session := freshSession()
	put(t, direct, session)
	dead := session
	dead.State = scheduler.StateDead

	lease := lock(t, proxied, session.ChatID)
	ctx, arrive := holdFirstWrite(t, p)
	must.ErrorIs(t, lease.Write(ctx, &dead, scheduler.Keep), scheduler.ErrUnavailable)
	must.NoError(t, lease.Release(t.Context()))

	next := lock(t, proxied, session.ChatID) // by the same Consul session
	arrive()
	must.Eq(t, &session, read(t, direct, session.ChatID))
	must.NoError(t, next.Write(t.Context(), nil, scheduler.Release))
}

// TestSessionThatArrivesAfterItsIntentWasWrittenAnewIsNotMade covers a
// session's write that is in transit when its intent is written again. When it
// finally arrives, it is not applied and nobody is told of the session, so its
// sandbox may be stopped.
func TestSessionThatArrivesAfterItsIntentWasWrittenAnewIsNotMade(t *testing.T) {
	_, direct, proxied, p := behindProxy(t)
	running := freshSession()
	intent := running
	intent.State = scheduler.StateCreating
	lease := lock(t, proxied, running.ChatID)
	must.NoError(t, lease.Write(t.Context(), &intent, scheduler.Keep))

	ctx, arrive := holdFirstWrite(t, p)
	must.ErrorIs(t, lease.Write(ctx, &running, scheduler.Release), scheduler.ErrUnavailable)
	must.NoError(t, lease.Write(t.Context(), &intent, scheduler.Keep))
	arrive()

	must.Eq(t, &intent, read(t, direct, running.ChatID))
	must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))
}

func TestAnswersOfSomethingElseAreNotTakenForConsuls(t *testing.T) {
	_, _, proxied, p := behindProxy(t)
	p.do(always(answer(http.StatusNotFound)))
	_, _, err := proxied.Get(t.Context(), uuid.New(), scheduler.Block{})
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
	_, err = proxied.List(t.Context(), scheduler.Query{PerPage: 1})
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
	_, err = proxied.Count(t.Context())
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
}

func TestHealthIsThatConsulHasALeader(t *testing.T) {
	_, _, proxied, p := behindProxy(t)
	must.NoError(t, proxied.Health(t.Context()))
	p.do(always(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) { _, _ = w.Write([]byte(`""`)) }))
	must.ErrorIs(t, proxied.Health(t.Context()), scheduler.ErrUnavailable)
	p.do(always(faultproxy.Drop))
	must.ErrorIs(t, proxied.Health(t.Context()), scheduler.ErrUnavailable)
}

// TestHealthIsAlsoThatThereIsASession covers a token that may read keys but may
// not create a session. The replica cannot take locks, and its health says so.
func TestHealthIsAlsoThatThereIsASession(t *testing.T) {
	c := open(t)
	p := newProxy(t, c.addr)
	p.do(always(func(w http.ResponseWriter, r *http.Request, consul http.Handler) {
		if strings.HasPrefix(r.URL.Path, "/v1/session/") {
			http.Error(w, "Permission denied", http.StatusForbidden)
			return
		}
		consul.ServeHTTP(w, r)
	}))
	proxied := c.join(t, p.addr)
	_, err := proxied.session.current(t.Context())
	must.ErrorIs(t, err, scheduler.ErrUnavailable)

	err = proxied.Health(t.Context())
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
	must.ErrorContains(t, err, "no Consul session")
	must.ErrorContains(t, err, "Permission denied")
}

// TestHealthTellsOfAnotherDatacenter covers a datacenter setting that differs
// from the Consul agent's datacenter. The servers accept keys but refuse the
// session, and health says what is wrong.
func TestHealthTellsOfAnotherDatacenter(t *testing.T) {
	c := open(t)
	p := newProxy(t, c.addr)
	p.do(always(func(w http.ResponseWriter, r *http.Request, consul http.Handler) {
		if r.URL.Path == "/v1/session/create" {
			http.Error(w, "rpc error making call: apply failed: Missing node registration", http.StatusInternalServerError)
			return
		}
		consul.ServeHTTP(w, r)
	}))
	proxied := c.join(t, p.addr)
	_, err := proxied.session.current(t.Context())
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
	must.ErrorContains(t, proxied.Health(t.Context()), "do not set consul { datacenter } to another")
}

func TestWithoutASessionNoLockIsGivenOut(t *testing.T) {
	c := open(t)
	p := newProxy(t, c.addr)
	p.do(always(faultproxy.Drop))
	proxied := c.join(t, p.addr)
	_, err := proxied.Lock(t.Context(), uuid.New(), patience)
	must.ErrorIs(t, err, scheduler.ErrUnavailable)

	p.do(nil) // the session is then created without a call
	for {
		lease, err := proxied.Lock(t.Context(), uuid.New(), patience)
		if err == nil {
			must.NoError(t, lease.Release(t.Context()))
			return
		}
		must.ErrorIs(t, err, scheduler.ErrUnavailable)
		<-time.After(10 * time.Millisecond)
	}
}

func TestEmptyPrefixMeansTheDefault(t *testing.T) {
	client, err := NewClient(&api.Config{}, nil)
	must.NoError(t, err)
	for prefix, changed := range map[string]string{"": "bivouac/v1/changed", "/a/b": "a/b/v1/changed"} {
		store, err := New(client, Config{Prefix: prefix})
		must.NoError(t, err)
		must.Eq(t, changed, store.keys.changed())
	}
}
