package nomad

import (
	"testing"

	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"
)

func TestHasEnded_believes_the_client_and_not_the_servers(t *testing.T) {
	dead, running := &api.TaskState{State: "dead"}, &api.TaskState{State: "running"}
	for _, c := range []struct {
		status string
		tasks  []*api.TaskState
		ended  bool
	}{
		{api.AllocClientStatusPending, nil, false},
		{api.AllocClientStatusRunning, []*api.TaskState{dead, running}, false},
		{api.AllocClientStatusComplete, []*api.TaskState{dead, dead}, true},
		{api.AllocClientStatusComplete, []*api.TaskState{dead, running}, false},
		{api.AllocClientStatusComplete, nil, true}, // stopped before it began
		{api.AllocClientStatusFailed, []*api.TaskState{dead}, true},
		{api.AllocClientStatusLost, nil, false},
		{api.AllocClientStatusLost, []*api.TaskState{dead, running}, false},
		{api.AllocClientStatusLost, []*api.TaskState{dead, dead}, true}, // it was complete before it was lost
		{api.AllocClientStatusUnknown, []*api.TaskState{dead}, true},
		{api.AllocClientStatusUnknown, []*api.TaskState{running}, false},
	} {
		alloc := &api.AllocationListStub{ClientStatus: c.status, TaskStates: make(map[string]*api.TaskState)}
		for i, task := range c.tasks {
			alloc.TaskStates[string(rune('a'+i))] = task
		}
		must.Eq(t, c.ended, hasEnded(alloc), must.Sprintf("%s with tasks %v", c.status, c.tasks))
	}
}
