package nomad_test

import (
	"net"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// cluster returns a Nomad that counts its client as lost within seconds.
func cluster(t *testing.T) (*stack.Nomad, replica) {
	t.Helper()
	stack.NeedServers(t)
	n, err := stack.StartNomad(patiently(t), stack.NomadConfig{
		Servers: 1, Clients: 1, HeartbeatGrace: time.Second, MinHeartbeatTTL: time.Second,
	})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, n.Stop()) })
	client, err := n.Client()
	must.NoError(t, err)
	return n, open(t, client, rawExec(t, nil), "test-"+uuid.NewString())
}

func answers(endpoint runtime.Endpoint) bool {
	conn, err := net.DialTimeout("tcp", endpoint.AddrPort().String(), time.Second)
	return err == nil && conn.Close() == nil
}

// TestStop_does_not_believe_that_a_lost_sandbox_ended kills a client's agent,
// whose sandbox runs on. Stop must neither report that the sandbox ended nor
// wait, because others would wait behind it. Nomad starts no replacement. When
// the agent is back, Stop sees the end.
func TestStop_does_not_believe_that_a_lost_sandbox_ended(t *testing.T) {
	n, r := cluster(t)
	reports := watch(t, r)
	spec, sandbox := create(t, r)
	must.NoError(t, n.Clients[0].Kill())
	lost := awaitReport(t, reports, spec.SessionID, runtime.StateLost)
	must.StrContains(t, lost.Reason, "the sandbox may still run")
	must.True(t, answers(sandbox.Endpoint))

	err := r.Stop(patiently(t), spec.SessionID)
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	must.ErrorContains(t, err, "the sandbox may still run")
	must.True(t, answers(sandbox.Endpoint))

	must.NoError(t, n.Clients[0].Start())
	awaitReport(t, reports, spec.SessionID, runtime.StateDead)
	must.NoError(t, r.Stop(patiently(t), spec.SessionID))
	must.False(t, answers(sandbox.Endpoint))
	allocs, _, err := r.client.Jobs().Allocations(jobs.ID(spec.SessionID), true, nil)
	must.NoError(t, err)
	must.Len(t, 1, allocs)
	must.Eq(t, api.AllocClientStatusComplete, allocs[0].ClientStatus)
}

// TestStop_does_not_wait_for_a_node_that_was_removed checks that Stop does not
// block on a node that an operator has removed from Nomad.
func TestStop_does_not_wait_for_a_node_that_was_removed(t *testing.T) {
	n, r := cluster(t)
	reports := watch(t, r)
	spec, sandbox := create(t, r)
	must.NoError(t, n.Clients[0].Kill())
	awaitReport(t, reports, spec.SessionID, runtime.StateLost)
	alloc, _, err := r.client.Allocations().Info(sandbox.ContainerID, nil)
	must.NoError(t, err)
	_, _, err = r.client.Nodes().Purge(alloc.NodeID, &api.QueryOptions{})
	must.NoError(t, err)
	must.NoError(t, r.Stop(patiently(t), spec.SessionID))
}

// TestSandbox_of_a_partitioned_node_is_not_replaced covers a node that was
// unreachable and comes back. Nomad counted its sandbox as lost, so the client
// now ends it. No replacement was started.
func TestSandbox_of_a_partitioned_node_is_not_replaced(t *testing.T) {
	n, r := cluster(t)
	reports := watch(t, r)
	spec, sandbox := create(t, r)
	must.NoError(t, n.Clients[0].Pause())
	awaitReport(t, reports, spec.SessionID, runtime.StateLost)
	must.NoError(t, n.Clients[0].Resume())
	dead := awaitReport(t, reports, spec.SessionID, runtime.StateDead)
	must.StrContains(t, dead.Reason, "was lost")
	must.False(t, answers(sandbox.Endpoint))
	allocs, _, err := r.client.Jobs().Allocations(jobs.ID(spec.SessionID), true, nil)
	must.NoError(t, err)
	must.Len(t, 1, allocs)
}
