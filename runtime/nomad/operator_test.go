package nomad_test

import (
	"testing"

	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

func create(t *testing.T, r replica) (runtime.Spec, runtime.Sandbox) {
	t.Helper()
	spec := newSpec(t, r)
	sandbox, err := r.Create(patiently(t), spec, ignore)
	must.NoError(t, err)
	return spec, sandbox
}

// awaitReport returns the first report of the session in the given state.
func awaitReport(t *testing.T, reports <-chan runtime.Sandbox, sessionID string, state runtime.State) runtime.Sandbox {
	t.Helper()
	for report := range reports {
		if report.SessionID == sessionID && report.State == state {
			return report
		}
	}
	t.Fatalf("no report of %s being %s", sessionID, state)
	return runtime.Sandbox{}
}

func TestWatch_says_that_an_operator_stopped_the_job(t *testing.T) {
	t.Parallel()
	r := openShared(t, rawExec(t, nil))
	reports := watch(t, r)
	spec, sandbox := create(t, r)

	_, _, err := r.client.Jobs().Deregister(jobs.ID(spec.SessionID), false, nil)
	must.NoError(t, err)

	lost := awaitReport(t, reports, spec.SessionID, runtime.StateLost)
	must.Eq(t, "being stopped: stopped by an operator in Nomad", lost.Reason)
	dead := awaitReport(t, reports, spec.SessionID, runtime.StateDead)
	must.Eq(t, "stopped by an operator in Nomad", dead.Reason)
	must.Eq(t, sandbox.ContainerID, dead.ContainerID)
}

// TestGuard_stops_a_second_allocation covers an allocation that an operator
// stops. Nomad replaces it, but the replacement is not the session's sandbox:
// the driver never returns it and stops it.
func TestGuard_stops_a_second_allocation(t *testing.T) {
	t.Parallel()
	r := openShared(t, rawExec(t, nil))
	reports := watch(t, r)
	spec, sandbox := create(t, r)

	_, err := r.client.Allocations().Stop(&api.Allocation{ID: sandbox.ContainerID}, nil)
	must.NoError(t, err)

	dead := awaitReport(t, reports, spec.SessionID, runtime.StateDead)
	must.Eq(t, sandbox.ContainerID, dead.ContainerID)
	must.StrContains(t, dead.Reason, "stopped by an operator in Nomad")
	job, _, err := r.client.Jobs().Info(jobs.ID(spec.SessionID), nil)
	must.NoError(t, err)
	must.True(t, *job.Stop)
	_, err = r.Create(patiently(t), spec, ignore)
	must.ErrorIs(t, err, runtime.ErrConflict)
	must.NoError(t, r.Stop(patiently(t), spec.SessionID))
	allocs, _, err := r.client.Jobs().Allocations(jobs.ID(spec.SessionID), true, nil)
	must.NoError(t, err)
	for _, alloc := range allocs {
		must.Eq(t, api.AllocClientStatusComplete, alloc.ClientStatus)
	}
}

// TestGuard_stops_what_overwrites_a_tombstone covers a late registration. Nomad
// checks the index of a registration before it applies it, not at the same
// time, so a registration that passes the check just before a tombstone is
// written overwrites the tombstone. The guard stops the result.
func TestGuard_stops_what_overwrites_a_tombstone(t *testing.T) {
	t.Parallel()
	r := openShared(t, rawExec(t, nil))
	must.NoError(t, r.Current(patiently(t)))
	spec := newSpec(t, r)
	must.NoError(t, r.Stop(patiently(t), spec.SessionID))
	reports := watch(t, r)

	late, err := r.template.Job(spec, r.instance)
	must.NoError(t, err)
	_, _, err = r.client.Jobs().Register(late, nil)
	must.NoError(t, err)

	dead := awaitReport(t, reports, spec.SessionID, runtime.StateDead)
	must.NotEq(t, "", dead.Reason)
	must.NoError(t, r.Stop(patiently(t), spec.SessionID))
}

func TestList_leaves_out_what_is_not_ours(t *testing.T) {
	t.Parallel()
	r := openShared(t, rawExec(t, nil))
	ours, _ := create(t, r)
	other := openShared(t, rawExec(t, nil))
	create(t, other)
	tombstone := newSpec(t, r)
	must.NoError(t, r.Stop(patiently(t), tombstone.SessionID))

	damaged := r.template.Tombstone("damaged-"+ours.SessionID, r.instance)
	damaged.Meta = nil
	_, _, err := r.client.Jobs().Register(damaged, nil)
	must.NoError(t, err)
	t.Cleanup(func() {
		_, _, err := r.client.Jobs().Deregister(*damaged.ID, true, nil)
		must.NoError(t, err)
	})

	var listed []string
	for sandbox, err := range r.List(t.Context()) {
		must.NoError(t, err)
		listed = append(listed, sandbox.SessionID)
	}
	must.Eq(t, []string{ours.SessionID}, listed)
}

// TestInspect_sees_what_another_replica_made checks that a replica sees another
// replica's sandbox without any communication between the two.
func TestInspect_sees_what_another_replica_made(t *testing.T) {
	t.Parallel()
	one := openShared(t, rawExec(t, nil))
	two := open(t, one.client, one.template, one.instance)
	spec, sandbox := create(t, one)
	found, err := two.Inspect(t.Context(), spec.SessionID)
	must.NoError(t, err)
	must.Eq(t, sandbox.ContainerID, found.ContainerID)
	must.Eq(t, sandbox.Endpoint, found.Endpoint)
	must.Eq(t, spec.ChatID, found.ChatID)
}

// TestStop_holds_for_other_replicas checks that no replica can create a sandbox
// for a session that any replica has stopped.
func TestStop_holds_for_other_replicas(t *testing.T) {
	t.Parallel()
	one := openShared(t, rawExec(t, nil))
	two := open(t, one.client, one.template, one.instance)
	spec, _ := create(t, one)
	must.NoError(t, two.Stop(patiently(t), spec.SessionID))
	_, err := one.Create(patiently(t), spec, ignore)
	must.ErrorIs(t, err, runtime.ErrConflict)
	found, err := one.Inspect(t.Context(), spec.SessionID)
	must.NoError(t, err)
	must.Eq(t, runtime.StateDead, found.State)
}

// TestDelete_by_two_replicas_at_once covers two Deletes at the same time. One
// of them purges the job, and Nomad answers the other with an error. Both must
// succeed.
func TestDelete_by_two_replicas_at_once(t *testing.T) {
	t.Parallel()
	one := openShared(t, rawExec(t, nil))
	two := open(t, one.client, one.template, one.instance)
	for range 5 {
		spec, _ := create(t, one)
		must.NoError(t, one.Stop(patiently(t), spec.SessionID))
		other := make(chan error, 1)
		go func() { other <- two.Delete(patiently(t), spec.SessionID) }()
		must.NoError(t, one.Delete(patiently(t), spec.SessionID))
		must.NoError(t, <-other)
	}
}
