package nomad_test

import (
	"net/netip"
	"testing"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/nomad"
)

// TestFindChat checks that a driver finds a chat's sandboxes by itself, with
// the data that their records had.
func TestFindChat(t *testing.T) {
	t.Parallel()
	r := openShared(t, rawExec(t, nil))
	spec := newSpec(t, r)
	spec.AgentID = `a{b}$%"`
	made, err := r.Create(patiently(t), spec, ignore)
	must.NoError(t, err)
	must.NoError(t, r.Current(patiently(t)))
	// A driver that follows no events has to ask Nomad, which also has jobs
	// with other meta or none.
	other, err := nomad.New(nomad.Config{Client: r.client, Template: r.template, Instance: r.instance, Logger: hclog.NewNullLogger()})
	must.NoError(t, err)
	foreign := api.NewBatchJob("bivouac-"+uuid.NewString(), "somebody's", "global", 50)
	task := api.NewTask("main", "raw_exec")
	task.Config = map[string]any{"command": "/bin/true"}
	foreign.AddTaskGroup(api.NewTaskGroup("main", 1).AddTask(task))
	foreign.Datacenters = []string{"*"}
	_, _, err = r.client.Jobs().Register(foreign, nil)
	must.NoError(t, err)
	t.Cleanup(func() {
		_, _, err := r.client.Jobs().Deregister(*foreign.ID, true, nil)
		must.NoError(t, err)
	})

	for name, driver := range map[string]*nomad.Driver{"from_memory": r.Driver, "by_asking_Nomad": other} {
		t.Run(name, func(t *testing.T) {
			found, err := driver.FindChat(patiently(t), spec.ChatID, "")
			must.NoError(t, err)
			must.Len(t, 1, found)
			must.Eq(t, made.ContainerID, found[0].ContainerID)
			must.Eq(t, made.Endpoint, found[0].Endpoint)
			must.Eq(t, spec, runtime.Spec{
				SessionID: found[0].SessionID, ChatID: found[0].ChatID, AgentID: found[0].AgentID,
				VolumeHostPath: found[0].VolumeHostPath, CreatedAt: found[0].CreatedAt, ExpiresAt: found[0].ExpiresAt,
			})
			must.Less(t, patience, found[0].RegisteredAt.Sub(found[0].CreatedAt).Abs())
			none, err := driver.FindChat(patiently(t), uuid.NewString(), "")
			must.NoError(t, err)
			must.SliceEmpty(t, none)
			others, err := driver.FindChat(patiently(t), spec.ChatID, spec.SessionID)
			must.NoError(t, err)
			must.SliceEmpty(t, others)
		})
	}

	t.Run("and_asks_a_sandbox_whether_it_answers", func(t *testing.T) {
		answers, err := r.Answers(patiently(t), spec.SessionID, made.Endpoint)
		must.NoError(t, err)
		must.True(t, answers)
		answers, err = r.Answers(patiently(t), uuid.NewString(), made.Endpoint)
		must.NoError(t, err)
		must.False(t, answers, must.Sprint("another session has this port"))
		answers, err = r.Answers(patiently(t), spec.SessionID, runtime.Endpoint{IP: netip.MustParseAddr("127.0.0.1"), Port: 1})
		must.NoError(t, err)
		must.False(t, answers)
	})

	must.NoError(t, r.Delete(patiently(t), spec.SessionID))
	for _, driver := range []*nomad.Driver{r.Driver, other} {
		found, err := driver.FindChat(patiently(t), spec.ChatID, "")
		must.NoError(t, err)
		must.SliceEmpty(t, found)
	}
}
