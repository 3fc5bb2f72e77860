package stack

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/shoenig/test/must"
)

func TestConsulDevAgent(t *testing.T) {
	NeedServers(t)
	// Given a dev agent, then a session and a key can be created at once.
	c, err := StartConsul(limited(t), ConsulConfig{})
	must.NoError(t, err)
	client, err := c.Client()
	must.NoError(t, err)
	_, _, err = client.Session().CreateNoChecks(nil, nil)
	must.NoError(t, err)
	_, err = client.KV().Put(&api.KVPair{Key: "a"}, nil)
	must.NoError(t, err)

	// When it stops, then nothing is left.
	must.NoError(t, c.Stop())
	leavesNothing(t, c.group)
}

func TestConsulCluster(t *testing.T) {
	NeedServers(t)
	// Given three servers and a key.
	ctx := limited(t)
	c, err := StartConsul(ctx, ConsulConfig{Servers: 3})
	must.NoError(t, err)
	client, err := c.Client()
	must.NoError(t, err)
	_, err = client.KV().Put(&api.KVPair{Key: "a", Value: []byte("1")}, nil)
	must.NoError(t, err)
	first, err := c.Leader(ctx)
	must.NoError(t, err)

	// When the leader is killed, then another leads, and has the key.
	must.NoError(t, first.Kill())
	must.False(t, first.Running())
	var second *Agent
	eventually(t, "another server leads", func() (err error) {
		second, err = c.Leader(ctx)
		return err
	})
	must.NotEq(t, first, second)
	must.NoError(t, second.WaitReady(ctx))
	client, err = c.client(second)
	must.NoError(t, err)
	pair, _, err := client.KV().Get("a", nil)
	must.NoError(t, err)
	must.Eq(t, "1", string(pair.Value))

	// When the killed one starts again, then it has the key, too.
	must.NoError(t, first.Restart(ctx))
	client, err = c.client(first)
	must.NoError(t, err)
	pair, _, err = client.KV().Get("a", nil)
	must.NoError(t, err)
	must.Eq(t, "1", string(pair.Value))

	// While a server is paused it does not answer; after Resume it does.
	must.NoError(t, first.Pause())
	brief, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	_, _, err = client.KV().Get("a", (&api.QueryOptions{AllowStale: true}).WithContext(brief))
	must.ErrorIs(t, err, context.DeadlineExceeded)
	must.NoError(t, first.Resume())
	must.NoError(t, first.WaitReady(ctx))

	// When all stop, one of them paused, then nothing is left.
	must.NoError(t, second.Pause())
	must.NoError(t, c.Stop())
	leavesNothing(t, c.group)
}

func TestAgentThatCannotStart(t *testing.T) {
	NeedServers(t)
	// Given an agent whose port is taken, when it starts, then the error says why.
	c, err := StartConsul(limited(t), ConsulConfig{})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, c.Stop()) })
	addr, err := netip.ParseAddrPort(c.Addr())
	must.NoError(t, err)
	_, err = StartConsul(limited(t), ConsulConfig{HTTPPort: int(addr.Port())})
	must.ErrorContains(t, err, "address already in use")
	must.False(t, errors.Is(err, context.DeadlineExceeded))
}
