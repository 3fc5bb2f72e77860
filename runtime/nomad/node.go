package nomad

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/runtime"
)

// checkNode refuses a spare on a node that takes no new sandboxes. If the node is drained,
// Nomad lets a batch job run on, for an hour by default, and the spare would end then. If it
// has just missed its heartbeat, the spare ends when the node is back, and until then it
// answers.
func (d *Driver) checkNode(ctx context.Context, alloc *api.AllocationListStub) error {
	why, err := d.readNode(ctx, alloc)
	if err == nil && why != "" {
		err = fmt.Errorf("%w: %s", runtime.ErrNotReady, why)
	}
	return err
}

// nodeAge is how old what is known about a node may be when a spare is looked at.
const nodeAge = 5 * time.Second

// eligibility is what a driver has read lately of nodes with spares.
type eligibility struct {
	mu    sync.Mutex
	known map[string]seenNode // by the node's ID
}

type seenNode struct {
	at  time.Time
	why string // why it takes no new sandboxes, or ""
}

// get returns what was read of a node lately. It forgets what is older.
func (e *eligibility) get(nodeID string) (why string, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	maps.DeleteFunc(e.known, func(_ string, node seenNode) bool { return time.Since(node.at) > nodeAge })
	node, ok := e.known[nodeID]
	return node.why, ok
}

func (e *eligibility) set(nodeID, why string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.known == nil {
		e.known = make(map[string]seenNode)
	}
	e.known[nodeID] = seenNode{time.Now(), why}
}

// whyNoChat returns why no chat should get a spare that runs, or "" if that is not known.
func (d *Driver) whyNoChat(ctx context.Context, alloc *api.AllocationListStub) string {
	if why, ok := d.eligibility.get(alloc.NodeID); ok {
		return why
	}
	why, _ := d.readNode(ctx, alloc) // an error is not known to be a reason; a claim reads it again
	d.eligibility.set(alloc.NodeID, why)
	return why
}

// readNode returns why the allocation's node takes no new sandboxes, or "" if it does.
func (d *Driver) readNode(ctx context.Context, alloc *api.AllocationListStub) (why string, err error) {
	var nodes []*api.NodeListStub // much shorter than the node
	err = d.ask(ctx, func(opts *api.QueryOptions) (err error) {
		opts.Prefix = alloc.NodeID
		nodes, _, err = d.client.Nodes().List(opts)
		return err
	})
	if err != nil {
		return "", failed(ctx, "read node "+alloc.NodeID, err)
	}
	if len(nodes) == 0 {
		return "Nomad does not know node " + nodeName(alloc) + " any more", nil
	}
	if why := whyNotEligible(nodes[0]); why != "" {
		return "node " + nodeName(alloc) + " takes no new sandboxes: it is " + why, nil
	}
	return "", nil
}

// whyNotEligible returns why a node takes no new sandboxes, or "" if it does.
func whyNotEligible(node *api.NodeListStub) string {
	switch {
	case node.Drain:
		return "being drained"
	case node.SchedulingEligibility == api.NodeSchedulingIneligible:
		return "not eligible"
	case node.Status != api.NodeStatusReady:
		return cmp.Or(node.Status, "in an unknown state")
	}
	return ""
}
