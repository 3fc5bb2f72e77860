package nomad_test

import (
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/stack"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/conformance"
)

func TestConformance_raw_exec(t *testing.T) { conform(t, rawExec(t, nil)) }

func TestConformance_docker(t *testing.T) {
	template, err := jobs.Load("docker", map[string]string{"image": stack.DockerForTest(t)})
	must.NoError(t, err)
	conform(t, template)
}

// conform runs the suite on the shared Nomad.
func conform(t *testing.T, template *jobs.Template) {
	client, err := stack.NomadForTest(t).Client()
	must.NoError(t, err)
	driver := open(t, client, template, "test-"+uuid.NewString())
	conformance.Run(t, conformance.Harness{
		Open: func(*testing.T) runtime.Driver { return driver.Driver },
		Kill: func(t *testing.T, sandbox runtime.Sandbox) {
			opts := (&api.QueryOptions{}).WithContext(within(t, 10*time.Second))
			alloc, _, err := client.Allocations().Info(sandbox.ContainerID, opts)
			must.NoError(t, err)
			must.NoError(t, client.Allocations().Signal(alloc, opts, "sandbox", "SIGKILL"))
		},
		Leftovers: func(t *testing.T, sessionID string) []string {
			job, _, err := client.Jobs().Info(jobs.ID(sessionID), nil)
			if err != nil || job.Meta[jobs.MetaTombstone] != "" {
				return nil
			}
			return []string{"job " + *job.ID}
		},
		Demo: true,
	})
}
