package consul

import (
	"context"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/internal/test/storetest"
	"github.com/bivouac/bivouac/scheduler"
)

func TestMain(m *testing.M) { os.Exit(stack.Main(m)) }

func TestStoreContract(t *testing.T) {
	storetest.Stores(t, func(t *testing.T) storetest.Cluster { return open(t) })
}

func TestLockContract(t *testing.T) {
	storetest.Locks(t, func(t *testing.T) storetest.Cluster { return open(t) })
}

func TestChangesContract(t *testing.T) {
	storetest.Changes(t, func(t *testing.T) storetest.Cluster { return open(t) })
}

func TestSparesContract(t *testing.T) {
	storetest.Spares(t, func(t *testing.T) storetest.Cluster { return open(t) })
}

// cluster is a set of replicas with the same prefix in a real Consul.
type cluster struct {
	client *api.Client
	addr   string
	prefix string
	token  *credentials.Token // of the replicas; nil: none
	keep   scheduler.Retention
}

func open(t *testing.T) *cluster {
	t.Helper()
	c, prefix := stack.ConsulForTest(t)
	client, err := c.Client()
	must.NoError(t, err)
	return &cluster{client: client, addr: c.Addr(), prefix: prefix}
}

func (c *cluster) Retain(retention scheduler.Retention) { c.keep = retention }

func (c *cluster) keys(t *testing.T) keyspace {
	t.Helper()
	keys, err := newKeyspace(c.prefix)
	must.NoError(t, err)
	return keys
}

func (c *cluster) Join(t *testing.T) storetest.Replica {
	t.Helper()
	return c.join(t, c.addr)
}

// join adds a replica that connects to Consul at addr.
func (c *cluster) join(t *testing.T, addr string) *replica {
	t.Helper()
	client, err := NewClient(&api.Config{Address: addr}, c.token)
	must.NoError(t, err)
	return c.joinWith(t, client, nil)
}

// joinWith adds a replica that waits for the clock, unless that is nil.
func (c *cluster) joinWith(t *testing.T, client *api.Client, clock *Clock) *replica {
	t.Helper()
	store, err := New(client, Config{Prefix: c.prefix, Instance: "test", Name: t.Name(), Logger: hclog.NewNullLogger(), Clock: clock, Retention: c.keep})
	must.NoError(t, err)
	r := &replica{Store: store, direct: c.client}
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() { _ = r.Run(ctx) })
	r.leave = func() {
		stop()
		running.Wait()
	}
	t.Cleanup(r.leave)
	return r
}

func (c *cluster) BreakLock(t *testing.T, chatID uuid.UUID) {
	t.Helper()
	_, err := c.client.KV().Delete(c.keys(t).lock(chatID), nil)
	must.NoError(t, err)
}

func (c *cluster) Damage(t *testing.T, chatID uuid.UUID) {
	t.Helper()
	c.set(t, c.keys(t).record(chatID), `{"v":1,"session_id":"x`)
}

func (c *cluster) Outdate(t *testing.T, chatID uuid.UUID) {
	t.Helper()
	c.set(t, c.keys(t).record(chatID), `{"v":9,"min_reader":8,"session_id":["x"]}`)
}

// MustBeEmpty waits, because the lock of a caller that has left is removed in
// the background.
func (c *cluster) MustBeEmpty(t *testing.T) {
	t.Helper()
	c.waitForKeys(t, func(keys []string) bool {
		changed := c.keys(t).changed()
		return len(keys) == 0 || len(keys) == 1 && keys[0] == changed
	})
}

// waitForKeys waits until right accepts the keys, without the identity, the changes and the
// replicas.
func (c *cluster) waitForKeys(t *testing.T, right func(keys []string) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var index uint64
	for {
		keys, meta, err := c.client.KV().Keys(c.prefix, "", (&api.QueryOptions{WaitIndex: index}).WithContext(ctx))
		must.NoError(t, err, must.Sprintf("these keys are left: %q", keys))
		own := c.keys(t)
		keys = slices.DeleteFunc(keys, func(key string) bool {
			return key == own.identity() || strings.HasPrefix(key, own.events()) || strings.HasPrefix(key, own.replicas())
		})
		if right(keys) {
			return
		}
		index = meta.LastIndex
	}
}

// replica is one replica. direct is a Consul client that bypasses the replica.
type replica struct {
	*Store
	direct *api.Client
	leave  func()
}

func (r *replica) End(t *testing.T) {
	t.Helper()
	hold, err := r.session.current(t.Context())
	must.NoError(t, err)
	_, err = r.direct.Session().Destroy(hold.session, nil)
	must.NoError(t, err)
}
