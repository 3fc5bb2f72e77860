package nomadmodel_test

import (
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/simulate/nomadmodel"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// TestModelRebootsNodesAsNomadDoes compares how the model and a real Nomad see
// a reboot. A node that is back before it counts as lost starts its tasks
// again, in the same allocations.
func TestModelRebootsNodesAsNomadDoes(t *testing.T) {
	stack.NeedServers(t)
	nomad, err := stack.StartNomad(t.Context(), stack.NomadConfig{
		Servers: 1, Clients: 1, HeartbeatGrace: time.Minute, Drivers: []string{"raw_exec"},
	})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, nomad.Stop()) })
	model := modelProbe(t, nomadmodel.Config{Nodes: 1, LostAfter: time.Minute})
	compare(t, realProbe(t, nomad), model, (*probe).nodeReboot)
}

func (p *probe) nodeReboot() { p.runsAgainAfter(p.nodeReboots) }
