package nomadmodel_test

import (
	"strings"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/simulate/nomadmodel"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// TestModelLosesNodesAsNomadDoes compares how the model and a real Nomad lose a
// node.
func TestModelLosesNodesAsNomadDoes(t *testing.T) {
	for name, ask := range map[string]func(*probe){
		"as Bivouac has it":            (*probe).lostNode,
		"without the disconnect block": (*probe).lostNodeWithoutDisconnect,
	} {
		t.Run(name, func(t *testing.T) { compareLosses(t, ask) })
	}
}

// compareLosses compares the model with a Nomad that only this test uses.
func compareLosses(t *testing.T, ask func(*probe)) {
	stack.NeedServers(t)
	nomad, err := stack.StartNomad(t.Context(), stack.NomadConfig{
		Servers: 1, Clients: 2, HeartbeatGrace: time.Second, MinHeartbeatTTL: time.Second,
		Drivers: []string{"raw_exec"},
	})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, nomad.Stop()) })
	p := realProbe(t, nomad)
	p.agentDies = func(i int) { must.NoError(t, nomad.Clients[i].Kill()) }
	p.agentIsBack = func(i int) { must.NoError(t, nomad.Clients[i].Start()) }
	compare(t, p, modelProbe(t, nomadmodel.Config{Nodes: 2, LostAfter: 2 * time.Second}), ask)
}

// lostNode shows that Nomad gives up an allocation on a lost node and does not
// replace it at first. The next evaluation of the job replaces it, although the
// old process lives.
func (p *probe) lostNode() {
	job := p.job()
	p.first(job)
	p.awaitProcess(*job.ID, true)
	p.awaitClient(*job.ID, "running")
	node := p.nodeOf(*job.ID)
	p.agentDies(node)
	p.awaitClient(*job.ID, "lost")
	p.awaitDecided(*job.ID, 3)
	p.look(*job.ID)

	_, _, err := p.client.Jobs().ForceEvaluate(*job.ID, nil)
	p.see("evaluated once more: error %v", err)
	p.await("a second process", func() bool { return len(p.living(*job.ID)) == 2 })
	p.awaitClient(*job.ID, "running")
	p.look(*job.ID)

	p.agentIsBack(node)
	p.awaitClient(*job.ID, "complete")
	p.look(*job.ID)
	p.deregister(*job.ID, false)
	p.awaitProcess(*job.ID, false)
}

// lostNodeWithoutDisconnect shows what the disconnect block is for. Without it,
// Nomad replaces the allocation at once, although the old process lives.
func (p *probe) lostNodeWithoutDisconnect() {
	job := p.job()
	job.TaskGroups[0].Disconnect = nil
	p.first(job)
	p.awaitProcess(*job.ID, true)
	p.awaitClient(*job.ID, "running")
	node := p.nodeOf(*job.ID)
	p.agentDies(node)
	p.await("a second process", func() bool { return len(p.living(*job.ID)) == 2 })
	p.await("the second runs", func() bool {
		allocs := p.allocs(*job.ID)
		return len(allocs) == 2 && allocs[1].ClientStatus == "running"
	})
	p.look(*job.ID)

	p.agentIsBack(node)
	p.await("the first is ended", func() bool { return len(p.living(*job.ID)) == 1 })
	p.deregister(*job.ID, false)
	p.awaitProcess(*job.ID, false)
}

// nodeOf returns the number of the node that runs the job's only allocation,
// from the end of the node's name. The model numbers its nodes from 1.
func (p *probe) nodeOf(jobID string) int {
	name := p.allocs(jobID)[0].NodeName
	if strings.HasSuffix(name, "client-1") || name == "node-2" {
		return 1
	}
	return 0
}
