package nomad_test

import (
	"testing"
	"time"

	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// TestGuard_stops_a_job_whose_node_was_lost covers a lost node. Nomad has given
// up the node's allocation, and its next evaluation of the job would start
// another one, although the old process may still live. So the guard stops the
// job, and the reported state of the sandbox does not change.
func TestGuard_stops_a_job_whose_node_was_lost(t *testing.T) {
	n, r := cluster(t)
	reports := watch(t, r)
	spec, sandbox := create(t, r)
	jobID := jobs.ID(spec.SessionID)

	must.NoError(t, n.Clients[0].Kill())
	lost := awaitReport(t, reports, spec.SessionID, runtime.StateLost)
	must.StrContains(t, lost.Reason, "the sandbox may still run")
	must.Wait(t, wait.InitialSuccess(wait.Timeout(time.Minute), wait.Gap(50*time.Millisecond), wait.BoolFunc(func() bool {
		job, _, err := r.client.Jobs().Info(jobID, nil)
		must.NoError(t, err)
		return *job.Stop
	})))
	must.True(t, answers(sandbox.Endpoint))

	must.NoError(t, n.Clients[0].Start())
	dead := awaitReport(t, reports, spec.SessionID, runtime.StateDead)
	must.StrContains(t, dead.Reason, "was lost")
	_, _, err := r.client.Jobs().ForceEvaluate(jobID, nil)
	must.NoError(t, err)
	allocs, _, err := r.client.Jobs().Allocations(jobID, true, nil)
	must.NoError(t, err)
	must.Len(t, 1, allocs)
}
