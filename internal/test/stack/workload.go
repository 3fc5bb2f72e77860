package stack

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
)

// WorkloadToken runs a job whose task has a workload identity for the audience, and returns
// the task's token. It is removed with the test.
func WorkloadToken(t testing.TB, client *api.Client, jobID, audience string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "token")
	task := api.NewTask("bot", "raw_exec").
		SetConfig("command", "/bin/sh").
		SetConfig("args", []string{"-c", fmt.Sprintf(`cat "$NOMAD_SECRETS_DIR/nomad_bivouac.jwt" >%q`, path)})
	task.Identities = []*api.WorkloadIdentity{{Name: "bivouac", Audience: []string{audience}, TTL: time.Hour, File: true}}
	job := api.NewBatchJob(jobID, jobID, api.GlobalRegion, api.JobDefaultPriority).
		AddTaskGroup(api.NewTaskGroup("bot", 1).AddTask(task))
	if _, _, err := client.Jobs().Register(job, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, _, err := client.Jobs().Deregister(jobID, true, nil); err != nil {
			t.Error(err)
		}
	})
	for opts := new(api.QueryOptions); ; {
		allocs, meta, err := client.Jobs().Allocations(jobID, false, opts.WithContext(t.Context()))
		if err != nil {
			t.Fatal(err)
		}
		opts.WaitIndex = meta.LastIndex
		for _, alloc := range allocs {
			switch alloc.ClientStatus {
			case api.AllocClientStatusComplete:
				token, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				return string(token)
			case api.AllocClientStatusFailed:
				t.Fatalf("the task of %s failed", jobID)
			}
		}
	}
}
