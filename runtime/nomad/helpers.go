package nomad

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// helperWait is how long Nomad may hold back an answer that would tell nothing new.
const helperWait = time.Minute

// Helper talks to the node helpers. There is one on each node with spares; see
// [Driver.Claim]. address is the helper's HOST:PORT. It is a [nodeapi.Client].
type Helper interface {
	// Look lets the helper find the order's sandbox, so that Bind is fast later. The order
	// has no chat, AI agent and volume.
	Look(ctx context.Context, address string, order nodeapi.Order) error
	// Bind makes the volume of the order the sandbox's workspace, and writes the file with
	// the session.
	Bind(ctx context.Context, address string, order nodeapi.Order) error
	// Bound returns what the helper has bound. If that is known, it waits for a change, for
	// nodeapi.BoundWait at most.
	Bound(ctx context.Context, address, known string) (nodeapi.Bound, error)
}

// helpers is what a driver knows about the node helpers.
type helpers struct {
	mu        sync.Mutex
	addresses map[string]string // by the node's ID; nil: not read yet
	heard     map[string]bool   // the nodes whose helper was asked what it has bound, and is followed
}

func (h *helpers) set(addresses map[string]string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.addresses = addresses
}

// all returns the addresses of all helpers by the ID of their node.
func (h *helpers) all() map[string]string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return maps.Clone(h.addresses)
}

// on returns the address of a node's helper, or "" if it has none. known is false if the
// addresses have not been read yet.
func (h *helpers) on(nodeID string) (address string, known bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.addresses[nodeID], h.addresses != nil
}

// followHelpers keeps the addresses of the helpers up to date, and what they have bound,
// until ctx ends.
func (d *Driver) followHelpers(ctx context.Context) {
	followers := followers{d: d, all: make(map[string]follower)}
	defer followers.ran.Wait() // ctx ends them
	pause := backoff.Backoff{Min: minReopen, Max: maxReopen}
	var told backoff.Throttle
	var index uint64
	for ctx.Err() == nil {
		next, err := d.readHelpers(ctx, index)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			index = 0
			d.logger.Log(told.Level(), "nomad_helpers_unknown", "error", err)
			_ = backoff.Sleep(ctx, pause.Next()) // the loop sees that ctx has ended
			continue
		case next < index:
			next = 0 // Nomad has lost its state
		}
		index = next
		pause.Reset()
		told.Reset()
		followers.set(ctx, d.helpers.all())
	}
}

// readHelpers reads the addresses of the helpers, once they have changed after an index
// of Nomad, or after a minute.
func (d *Driver) readHelpers(ctx context.Context, after uint64) (index uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, helperWait+askLimit)
	defer cancel()
	var services []*api.ServiceRegistration
	err = d.query(ctx, limits{"helpers", nil, 0}, func(opts *api.QueryOptions) error {
		opts.WaitIndex, opts.WaitTime = after, helperWait
		if d.helperNamespace != "" {
			opts.Namespace = d.helperNamespace
		}
		found, meta, err := d.client.Services().Get(nodeapi.Service, opts)
		if err == nil {
			services, index = found, max(meta.LastIndex, 1) // 0 would not wait
		}
		return err
	})
	if err != nil {
		return 0, unfit(ctx, "list the services "+nodeapi.Service, err, needs("the capability read-job in the namespace of the node helpers"))
	}
	newest := make(map[string]*api.ServiceRegistration)
	for _, service := range services {
		if old := newest[service.NodeID]; old == nil || old.CreateIndex < service.CreateIndex {
			newest[service.NodeID] = service
		}
	}
	addresses := make(map[string]string)
	for nodeID, service := range newest {
		addresses[nodeID] = net.JoinHostPort(service.Address, strconv.Itoa(service.Port))
	}
	d.helpers.set(addresses)
	return index, nil
}

// helperOf returns the address of the helper on the allocation's node, or ErrNotPlaced if
// there is none.
func (d *Driver) helperOf(ctx context.Context, alloc *api.AllocationListStub) (string, error) {
	address, known := d.helpers.on(alloc.NodeID)
	if !known {
		if _, err := d.readHelpers(ctx, 0); err != nil {
			return "", err
		}
		address, _ = d.helpers.on(alloc.NodeID)
	}
	if address == "" {
		return "", fmt.Errorf("nomad: %w: node %s runs no helper (bivouac node)", runtime.ErrNotPlaced, nodeName(alloc))
	}
	return address, nil
}

// bindOrder returns the order to give the spare to the spec's chat.
func (d *Driver) bindOrder(spec runtime.Spec, alloc *api.AllocationListStub) (nodeapi.Order, error) {
	meta := jobs.MetaOf(spec)
	meta[jobs.MetaInstance] = d.instance.id
	note, err := json.Marshal(meta)
	if err != nil {
		return nodeapi.Order{}, fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	order := d.orderOf(spec.SessionID, alloc)
	order.ChatID, order.AgentID, order.VolumeHostPath, order.Note = spec.ChatID, spec.AgentID, spec.VolumeHostPath, string(note)
	return order, nil
}

// orderOf returns what a helper needs to find the spare.
func (d *Driver) orderOf(sessionID string, alloc *api.AllocationListStub) nodeapi.Order {
	task := d.template.SpareTask(sessionID)
	return nodeapi.Order{
		SessionID: sessionID, AllocID: alloc.ID,
		Task: task.Name, TaskDriver: task.Driver, Target: task.Workspace,
	}
}
