package nomad

import (
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// fullState returns the state of a running sandbox with everything that is packed.
func fullState(t testing.TB) (jobID string, s state) {
	t.Helper()
	template, err := jobs.Load("docker", nil)
	must.NoError(t, err)
	now := time.Date(2026, 5, 4, 3, 2, 1, 987654321, time.UTC)
	job, err := template.Job(runtime.Spec{
		SessionID: spareID, ChatID: chatID, AgentID: "agent-1", VolumeHostPath: "/srv/volumes/" + chatID,
		CreatedAt: now, ExpiresAt: now.Add(time.Hour), Owner: "someone", Labels: map[string]string{"team": "one"},
	}, "test")
	must.NoError(t, err)
	s = state{known: true, whole: true, ready: chatID, collected: spareID, job: jobFieldsOf(job)}
	s.claim = claim{chatID, jobs.MetaOf(claimOf(chatID))}
	s.job.Stop, s.job.CreateIndex, s.job.ModifyIndex, s.job.JobModifyIndex, s.job.SubmitTime = true, 10_000_000, 10_000_004, 10_000_001, now.UnixNano()
	s.job.Meta["of_the_template"] = "x"
	s.allocs = []*api.AllocationListStub{{
		ID: chatID, JobID: s.job.ID, Namespace: "prod", NodeID: spareID, NodeName: "node-1",
		DesiredStatus: "run", DesiredDescription: "d", ClientStatus: "running", ClientDescription: "c", PreemptedByAllocation: "p",
		CreateIndex: 5, ModifyIndex: 6, CreateTime: 7, ModifyTime: 8,
		AllocatedResources: &api.AllocatedResources{
			Tasks:  map[string]*api.AllocatedTaskResources{"sandbox": nil, "helper": nil},
			Shared: api.AllocatedSharedResources{Ports: []api.PortMapping{{Label: "http", Value: 20000, HostIP: "10.0.0.1"}}},
		},
		TaskStates: map[string]*api.TaskState{
			"sandbox": {State: taskRunning, StartedAt: now, Events: []*api.TaskEvent{{Type: api.TaskStarted, Time: 9, DisplayMessage: "m", Details: map[string]string{"a": "b"}}}},
			"helper":  {State: taskDead, Failed: true, Restarts: 3, StartedAt: now, FinishedAt: now.Add(time.Second)},
		},
	}, {ID: "second", JobID: s.job.ID, TaskStates: map[string]*api.TaskState{}}}
	s.evals = map[string]*api.Evaluation{
		chatID: {ID: chatID, Status: "complete", CreateIndex: 1, ModifyIndex: 2},
		"e": {
			ID: "e", Status: "failed", StatusDescription: "s", WaitUntil: now, CreateIndex: 3, ModifyIndex: 4,
			FailedTGAllocs: map[string]*api.AllocationMetric{"sandbox": {NodesEvaluated: 1, ConstraintFiltered: map[string]int{"c": 1}}},
		},
	}
	return s.job.ID, s
}

func TestPack(t *testing.T) {
	t.Run("keeps_a_whole_state", func(t *testing.T) {
		jobID, s := fullState(t)
		must.Eq(t, s, pack(s, true).unpack(jobID))
	})
	t.Run("does_not_change_the_state", func(t *testing.T) {
		jobID, s := fullState(t)
		pack(s, false).unpack(jobID)
		_, want := fullState(t)
		must.Eq(t, want, s)
	})
	t.Run("keeps_a_meta_that_was_edited", func(t *testing.T) {
		for key, value := range map[string]string{
			jobs.MetaSessionID: "other", jobs.MetaSpec: "other", jobs.MetaChatID: "0C7A4F9E-6A53-4B4C-9F0C-3B2F5D1E8A77",
			jobs.MetaCreatedAt: "2026-05-04T03:02:01+02:00", jobs.MetaExpiresAt: "3026-05-04T03:02:01Z", jobs.MetaInstance: "",
		} {
			jobID, s := fullState(t)
			s.job.Meta[key] = value
			must.Eq(t, s.job.Meta, pack(s, true).unpack(jobID).job.Meta)
			delete(s.job.Meta, key)
			must.Eq(t, s.job.Meta, pack(s, true).unpack(jobID).job.Meta)
		}
	})
	t.Run("keeps_nothing_of_a_job_that_is_not_known", func(t *testing.T) {
		must.Eq(t, state{}, packed{}.unpack("x"))
		must.False(t, pack(state{}, true).unpack("x").known)
	})
	for name, events := range map[string]bool{"main_ended": true, "restarted_twice": true, "client_rebooted": true} {
		t.Run("keeps_the_events_of_"+name, func(t *testing.T) {
			s := stateWith(captured(t, name), "web")
			got := pack(s, false).unpack(s.job.ID)
			must.Eq(t, events, len(got.allocs[0].TaskStates["web"].Events) > 0)
			must.Eq(t, runOver(s.job, s.allocs[0]), runOver(got.job, got.allocs[0]))
			must.Eq(t, surplus(s), surplus(got))
		})
	}
	t.Run("drops_the_events_of_a_sandbox_that_runs_as_it_should_until_they_are_read_again", func(t *testing.T) {
		jobID, s := fullState(t)
		alloc := s.allocs[0]
		s.allocs, s.job.Stop = s.allocs[:1], false
		got := pack(s, false).unpack(jobID)
		must.SliceEmpty(t, got.allocs[0].TaskStates["sandbox"].Events)
		must.Eq(t, surplus(s), surplus(got))
		got, news := got.withAlloc(alloc)
		must.False(t, news)
		must.Eq(t, alloc, got.allocs[0])
	})
}

func BenchmarkPack(b *testing.B) {
	jobID, s := fullState(b)
	for b.Loop() {
		pack(s, false)
	}
	b.ReportMetric(float64(len(pack(s, false).own)), "bytes")
	_ = jobID
}

func BenchmarkUnpack(b *testing.B) {
	jobID, s := fullState(b)
	p := pack(s, false)
	for b.Loop() {
		p.unpack(jobID)
	}
}
