package consul

import (
	"context"
	"errors"
	"maps"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/scheduler"
)

var instanceForm = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)

// bivouac is a replica whose Run may end by itself.
type bivouac struct {
	*Store
	ended chan error
}

// startAs starts a replica with an operator's settings.
func (c *cluster) startAs(t *testing.T, settings Config) bivouac {
	t.Helper()
	client, err := NewClient(&api.Config{Address: c.addr}, nil)
	must.NoError(t, err)
	settings.Prefix, settings.Name, settings.Logger = c.prefix, t.Name(), hclog.NewNullLogger()
	store, err := New(client, settings)
	must.NoError(t, err)
	b := bivouac{store, make(chan error, 1)}
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	over := make(chan struct{})
	go func() {
		defer close(over)
		b.ended <- b.Run(ctx)
	}()
	t.Cleanup(func() {
		stop()
		<-over
	})
	return b
}

func (b bivouac) identified(t *testing.T) Identity {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	own, err := b.Identity(ctx)
	must.NoError(t, err)
	return own
}

// refuses waits until the replica ends and returns the reason.
func (b bivouac) refuses(t *testing.T) error {
	t.Helper()
	select {
	case err := <-b.ended:
		must.ErrorIs(t, err, errOtherBivouac)
		return err
	case <-time.After(patience):
		t.Fatal("the replica goes on")
		return nil
	}
}

// standsStill waits until the replica's health reports why it does nothing.
func (b bivouac) standsStill(t *testing.T, words ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for b.identity.trouble() == nil {
		must.NoError(t, backoff.Sleep(ctx, 5*time.Millisecond))
	}
	err := b.Health(ctx)
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
	for _, word := range words {
		must.ErrorContains(t, err, word)
	}
	_, err = b.Lock(ctx, uuid.New(), 0)
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
	_, _, err = b.Get(ctx, uuid.New(), scheduler.Block{})
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
	_, err = b.List(ctx, scheduler.Query{PerPage: 1})
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
	_, err = b.Expired(ctx, time.Now(), 1)
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
	_, err = b.InFlight(ctx)
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
	_, err = b.Count(ctx)
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
}

func (b bivouac) locks(t *testing.T) {
	t.Helper()
	lease, err := b.Lock(t.Context(), uuid.New(), patience)
	must.NoError(t, err)
	must.NoError(t, lease.Release(t.Context()))
}

func (c *cluster) wipe(t *testing.T) {
	t.Helper()
	_, err := c.client.KV().DeleteTree(c.prefix, nil)
	must.NoError(t, err)
}

func runs(sandboxes map[string]int) func(context.Context) (map[string]int, error) {
	return func(context.Context) (map[string]int, error) { return maps.Clone(sandboxes), nil }
}

func in(region, namespace string) func(context.Context) (Place, error) {
	return func(context.Context) (Place, error) { return Place{region, namespace}, nil }
}

const (
	oneInstance     = "test-aaaaaaaaaaaaaaaaaaaa"
	anotherInstance = "test-bbbbbbbbbbbbbbbbbbbb"
)

func TestIdentity(t *testing.T) {
	t.Parallel()
	t.Run("is written by the first replica and taken by the others", func(t *testing.T) {
		c := open(t)
		first, second := c.startAs(t, Config{Instance: "test"}), c.startAs(t, Config{Instance: "test"})
		own := first.identified(t)
		must.RegexMatch(t, instanceForm, own.Instance)
		must.Eq(t, own, second.identified(t))
		must.Eq(t, "", own.LegacyInstance)
		first.locks(t)
		second.locks(t)
	})
	t.Run("fits what plugins are told even if the name is as long as names may be", func(t *testing.T) {
		name := strings.Repeat("a", 64)
		b := open(t).startAs(t, Config{Instance: name})
		must.Eq(t, 64, len(b.identified(t).Instance))
		must.True(t, isNamed(b.Instance(), name))
	})
	t.Run("ends a replica with another name", func(t *testing.T) {
		c := open(t)
		own := c.startAs(t, Config{Instance: "test"}).identified(t)
		err := c.startAs(t, Config{Instance: "other"}).refuses(t)
		for _, word := range []string{c.prefix + "v1/identity", own.Instance, "-instance=test", "-kv-prefix"} {
			must.ErrorContains(t, err, word)
		}
	})
	t.Run("ends a replica with another region or namespace of Nomad", func(t *testing.T) {
		c := open(t)
		c.startAs(t, Config{Instance: "test", Place: in("global", "default")}).identified(t)
		must.ErrorContains(t, c.startAs(t, Config{Instance: "test", Place: in("global", "sandboxes")}).refuses(t), `namespace "sandboxes"`)
		must.ErrorContains(t, c.startAs(t, Config{Instance: "test", Place: in("eu", "default")}).refuses(t), `region "eu"`)
	})
	t.Run("learns from a later replica where in Nomad the sandboxes run", func(t *testing.T) {
		c := open(t)
		first := c.startAs(t, Config{Instance: "test"}) // its runtime is a plugin
		first.identified(t)
		c.startAs(t, Config{Instance: "test", Place: in("global", "default")}).identified(t)
		must.Error(t, c.startAs(t, Config{Instance: "test", Place: in("global", "sandboxes")}).refuses(t))
		first.locks(t) // although the identity was written again in the meantime
	})
	t.Run("keeps the name of records from before there were identities", func(t *testing.T) {
		c := open(t)
		c.set(t, c.keys(t).record(uuid.New()), "{}")
		b := c.startAs(t, Config{Instance: "test", Running: runs(map[string]int{"test": 2, "other": 1})})
		must.Eq(t, "test", b.identified(t).LegacyInstance)
	})
	t.Run("waits until it is known what runs", func(t *testing.T) {
		var reachable atomic.Bool
		b := open(t).startAs(t, Config{Instance: "test", Running: func(context.Context) (map[string]int, error) {
			if !reachable.Load() {
				return nil, errors.New("connection refused")
			}
			return nil, nil
		}})
		b.standsStill(t, "connection refused")
		reachable.Store(true)
		b.identified(t)
		b.locks(t)
	})
	t.Run("that is replaced ends the replica", func(t *testing.T) {
		c := open(t)
		b := c.startAs(t, Config{Instance: "test"})
		b.identified(t)
		c.wipe(t)
		must.Eq(t, "test-", c.startAs(t, Config{Instance: "test"}).identified(t).Instance[:5])
		must.ErrorContains(t, b.refuses(t), "start this replica again")
	})
	t.Run("that cannot be read is left alone", func(t *testing.T) {
		c := open(t)
		c.set(t, c.keys(t).identity(), `{"v":2}`)
		c.startAs(t, Config{Instance: "test"}).standsStill(t, "schema version 2", c.prefix+"v1/identity")
	})
}

func TestStoreWithoutIdentity(t *testing.T) {
	t.Parallel()
	t.Run("stands still while sandboxes run under its name", func(t *testing.T) {
		c := open(t)
		running := runs(map[string]int{"test": 1, oneInstance: 2, "other": 9, "test-2": 9})
		b := c.startAs(t, Config{Instance: "test", Running: running})
		b.standsStill(t, "3 sandboxes", "test: 1, "+oneInstance+": 2", "bivouac operator forget", "bivouac operator adopt")

		t.Run("until an operator forgets them", func(t *testing.T) {
			own, left, err := b.Forget(t.Context())
			must.NoError(t, err)
			must.Eq(t, map[string]int{"test": 1, oneInstance: 2}, left)
			must.Eq(t, own, b.identified(t))
			must.Eq(t, "", own.LegacyInstance)
			b.locks(t)
			_, _, err = b.Forget(t.Context())
			must.ErrorIs(t, err, scheduler.ErrInvalid)
		})
	})
	t.Run("stands still if records stand and their sandboxes bear an identity", func(t *testing.T) {
		c := open(t)
		c.set(t, c.keys(t).record(uuid.New()), "{}")
		b := c.startAs(t, Config{Instance: "test", Running: runs(map[string]int{oneInstance: 2})})
		b.standsStill(t, "2 sandboxes")
		_, _, err := b.Forget(t.Context())
		must.ErrorIs(t, err, scheduler.ErrInvalid)
		must.ErrorContains(t, err, "adopt")
	})
	t.Run("is not given the identity of the only instance that runs unasked", func(t *testing.T) {
		b := open(t).startAs(t, Config{Instance: "test", Running: runs(map[string]int{oneInstance: 2})})
		b.standsStill(t)
		_, err := b.Adopt(t.Context(), "")
		must.ErrorIs(t, err, scheduler.ErrInvalid)
		must.ErrorContains(t, err, "`bivouac operator adopt -instance="+oneInstance+"` (2 sandboxes)")
		b.standsStill(t)

		own, err := b.Adopt(t.Context(), oneInstance)
		must.NoError(t, err)
		must.Eq(t, oneInstance, own.Instance)
		must.Eq(t, own, b.identified(t))
		b.locks(t)
	})
	t.Run("is given the bare name if that runs", func(t *testing.T) {
		b := open(t).startAs(t, Config{Instance: "test", Running: runs(map[string]int{"test": 2})})
		b.standsStill(t)
		own, err := b.Adopt(t.Context(), "test")
		must.NoError(t, err)
		must.Eq(t, "test", own.LegacyInstance)
		must.RegexMatch(t, instanceForm, own.Instance)
	})
	t.Run("is told of several which to take", func(t *testing.T) {
		b := open(t).startAs(t, Config{Instance: "test", Running: runs(map[string]int{oneInstance: 2, anotherInstance: 1})})
		b.standsStill(t)
		for _, unknown := range []string{"", "nobody"} {
			_, err := b.Adopt(t.Context(), unknown)
			must.ErrorIs(t, err, scheduler.ErrInvalid)
			must.ErrorContains(t, err, "-instance="+oneInstance+"` (2 sandboxes) or `bivouac operator adopt -instance="+anotherInstance+"` (1 sandboxes)")
		}
		own, err := b.Adopt(t.Context(), anotherInstance)
		must.NoError(t, err)
		must.Eq(t, anotherInstance, own.Instance)
	})
}

func TestStoreThatLosesItsData(t *testing.T) {
	t.Parallel()
	c := open(t)
	b, beside := c.startAs(t, Config{Instance: "test"}), c.startAs(t, Config{Instance: "test"})
	own := b.identified(t)
	beside.identified(t)
	session := freshSession()
	put(t, b, session)
	lease, err := b.Lock(t.Context(), session.ChatID, 0)
	must.NoError(t, err)
	_, index, err := b.Get(t.Context(), session.ChatID, scheduler.Block{})
	must.NoError(t, err)
	woken := make(chan error, 1)
	go func() {
		_, _, err := b.Get(t.Context(), session.ChatID, scheduler.Block{Index: index, Wait: patience})
		woken <- err
	}()

	c.wipe(t)
	b.standsStill(t, "Consul lost the identity", c.prefix+"v1/identity", own.Instance, "bivouac operator adopt")
	must.ErrorIs(t, <-woken, scheduler.ErrUnavailable, must.Sprint("whoever waits for a change is not told that there is no session"))
	err = lease.Write(t.Context(), nil, scheduler.Keep)
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
	must.False(t, errors.Is(err, scheduler.ErrLockLost))
	must.NoError(t, lease.Release(t.Context()))
	_, err = b.Adopt(t.Context(), anotherInstance)
	must.ErrorIs(t, err, scheduler.ErrInvalid)

	got, err := b.Adopt(t.Context(), "")
	must.NoError(t, err)
	must.Eq(t, own, got)
	b.locks(t)
	beside.identified(t)
	beside.locks(t)
}

// TestLeaseOutlivesTheRestoringOfTheIdentity checks that no lock is lost if the
// same identity is written again.
func TestLeaseOutlivesTheRestoringOfTheIdentity(t *testing.T) {
	t.Parallel()
	c := open(t)
	b := c.startAs(t, Config{Instance: "test"})
	b.identified(t)
	session := freshSession()
	lease, err := b.Lock(t.Context(), session.ChatID, 0)
	must.NoError(t, err)
	_, err = c.client.KV().Delete(b.keys.identity(), nil)
	must.NoError(t, err)
	b.standsStill(t)
	must.ErrorIs(t, lease.Write(t.Context(), &session, scheduler.Keep), scheduler.ErrUnavailable)
	_, err = b.Adopt(t.Context(), "")
	must.NoError(t, err)
	must.NoError(t, lease.Write(t.Context(), &session, scheduler.Release))
}

// TestAdoptOnAReplicaThatHasNotSeenTheLoss covers a replica that is cut off and
// has not yet seen that the identity was lost.
func TestAdoptOnAReplicaThatHasNotSeenTheLoss(t *testing.T) {
	t.Parallel()
	c := open(t)
	store, err := New(c.client, Config{Instance: "test", Prefix: c.prefix, Name: t.Name(), Logger: hclog.NewNullLogger()})
	must.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- store.Run(ctx) }()
	own, err := store.Identity(ctx)
	must.NoError(t, err)
	stop() // it sees no changes from now on
	must.NoError(t, <-ended)
	c.wipe(t)

	got, err := store.Adopt(t.Context(), "")
	must.NoError(t, err)
	must.Eq(t, own, got)
	must.True(t, c.has(t, store.keys.identity()))
}
