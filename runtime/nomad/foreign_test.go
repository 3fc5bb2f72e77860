package nomad_test

import (
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/nomad"
)

// TestForeignJobs_are_left_alone covers jobs that are named like a session's
// job but belong to another Bivouac or were damaged by hand. The driver logs
// them and never lists, stops or returns them.
func TestForeignJobs_are_left_alone(t *testing.T) {
	t.Parallel()
	damages := map[string]func(meta map[string]string) map[string]string{
		"no meta": func(map[string]string) map[string]string { return nil },
		"another instance": func(meta map[string]string) map[string]string {
			meta[jobs.MetaInstance] = "another-bivouac"
			return meta
		},
		"another session": func(meta map[string]string) map[string]string {
			meta[jobs.MetaSessionID] = uuid.NewString()
			return meta
		},
		"no session": func(meta map[string]string) map[string]string {
			delete(meta, jobs.MetaSessionID)
			return meta
		},
	}
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := openShared(t, rawExec(t, nil))
			must.NoError(t, r.Current(patiently(t)))
			ours, _ := create(t, r)
			spec := runtime.Spec{
				SessionID: uuid.NewString(), ChatID: uuid.NewString(), AgentID: "agent-1",
				VolumeHostPath: t.TempDir(), CreatedAt: time.Now(), ExpiresAt: time.Now().Add(time.Hour),
			}
			job, err := r.template.Job(spec, r.instance)
			must.NoError(t, err)
			job.Meta = damage(job.Meta)
			_, _, err = r.client.Jobs().Register(job, nil)
			must.NoError(t, err)
			t.Cleanup(func() {
				_, _, err := r.client.Jobs().Deregister(*job.ID, true, nil)
				must.NoError(t, err)
			})

			_, err = r.Create(patiently(t), spec, ignore)
			must.ErrorIs(t, err, runtime.ErrConflict)
			must.ErrorContains(t, err, *job.ID)
			_, err = r.Inspect(patiently(t), spec.SessionID)
			must.ErrorIs(t, err, runtime.ErrConflict)
			must.ErrorContains(t, err, *job.ID)
			must.ErrorIs(t, r.Stop(patiently(t), spec.SessionID), runtime.ErrConflict)
			must.ErrorIs(t, r.Delete(patiently(t), spec.SessionID), runtime.ErrConflict)

			// If the job were ours, the guard would stop it after this second
			// registration.
			_, _, err = r.client.Jobs().Register(job, nil)
			must.NoError(t, err)
			must.Eq(t, []string{ours.SessionID}, listed(t, r))
			must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.Gap(50*time.Millisecond), wait.BoolFunc(func() bool {
				allocs, _, err := r.client.Jobs().Allocations(*job.ID, false, nil)
				must.NoError(t, err)
				return len(allocs) == 1 && allocs[0].ClientStatus == api.AllocClientStatusRunning
			})), must.Sprint("it runs"))
			standing, _, err := r.client.Jobs().Info(*job.ID, nil)
			must.NoError(t, err)
			must.False(t, *standing.Stop)
		})
	}
}

func listed(t *testing.T, r replica) []string {
	t.Helper()
	var ids []string
	for sandbox, err := range r.List(patiently(t)) {
		must.NoError(t, err)
		ids = append(ids, sandbox.SessionID)
	}
	return ids
}

// TestInstance_owns_what_bears_its_legacy_name covers jobs from before the
// instance had its own ID. They have the configured name as their instance.
func TestInstance_owns_what_bears_its_legacy_name(t *testing.T) {
	t.Parallel()
	before := openShared(t, rawExec(t, nil))
	must.NoError(t, before.Current(patiently(t)))
	_, old := create(t, before)
	after := openWithLegacy(t, before.client, before.template, before.instance+"-1", before.instance)
	must.NoError(t, after.Current(patiently(t)))
	_, fresh := create(t, after)

	counts, err := before.Instances(patiently(t))
	must.NoError(t, err)
	must.Eq(t, 1, counts[before.instance])
	must.Eq(t, 1, counts[after.instance])
	must.SliceContainsAll(t, []string{old.SessionID, fresh.SessionID}, listed(t, after))
	must.Eq(t, []string{old.SessionID}, listed(t, before))
	_, err = before.Inspect(patiently(t), fresh.SessionID)
	must.ErrorIs(t, err, runtime.ErrConflict)

	seen, err := after.Inspect(patiently(t), old.SessionID)
	must.NoError(t, err)
	must.Eq(t, old.ContainerID, seen.ContainerID)
	must.NoError(t, after.Delete(patiently(t), old.SessionID))
	must.NoError(t, after.Delete(patiently(t), fresh.SessionID))
	counts, err = before.Instances(patiently(t))
	must.NoError(t, err)
	must.MapNotContainsKeys(t, counts, []string{before.instance, after.instance})
}

func TestCreate_without_an_instance_is_refused(t *testing.T) {
	driver, err := nomad.New(nomad.Config{Client: &api.Client{}, Template: rawExec(t, nil), Logger: hclog.NewNullLogger()})
	must.NoError(t, err)
	_, err = driver.Create(t.Context(), runtime.Spec{}, ignore)
	must.ErrorIs(t, err, runtime.ErrUnavailable)
}
