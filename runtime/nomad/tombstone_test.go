package nomad_test

import (
	"math/rand/v2"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/simulate/network"
	"github.com/bivouac/bivouac/internal/test/simulate/nomadmodel"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/nomad"
)

// TestStop_makes_a_late_registration_fail covers a registration that is still
// in transit when its session is stopped. Nomad, here a model of it, must
// refuse it.
func TestStop_makes_a_late_registration_fail(t *testing.T) {
	template := rawExec(t, nil)
	synctest.Test(t, func(t *testing.T) {
		started := 0
		model := nomadmodel.New(t.Context(), nomadmodel.Config{
			Nodes: 1, Capacity: 1,
			Rand:    func(name string) *rand.Rand { return rand.New(rand.NewPCG(1, uint64(len(name)))) },
			Started: func(nomadmodel.Process) { started++ },
			Ended:   func(nomadmodel.Process) {},
		})
		client, err := api.NewClient(&api.Config{HttpClient: &http.Client{Transport: network.Direct{Server: model}}})
		must.NoError(t, err)
		driver, err := nomad.New(nomad.Config{
			Client: client, Template: template, Instance: "test", Logger: hclog.NewNullLogger(),
		})
		must.NoError(t, err)
		spec := runtime.Spec{
			SessionID: "11111111-1111-4111-8111-111111111111", ChatID: "22222222-2222-4222-8222-222222222222",
			AgentID: "agent-1", VolumeHostPath: "/volume", ExpiresAt: time.Now().Add(time.Hour),
		}

		must.NoError(t, driver.Stop(t.Context(), spec.SessionID))
		must.NoError(t, driver.Delete(t.Context(), spec.SessionID))

		late, err := template.Job(spec, "test")
		must.NoError(t, err)
		_, _, err = client.Jobs().EnforceRegister(late, 0, nil)
		must.ErrorContains(t, err, "job already exists")
		job, _, err := client.Jobs().Info(jobs.ID(spec.SessionID), nil)
		must.NoError(t, err)
		must.True(t, *job.Stop)
		must.Zero(t, started)
	})
}
