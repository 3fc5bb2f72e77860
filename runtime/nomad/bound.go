package nomad

import (
	"context"
	"encoding/json"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/jobs"
)

// A spare does not name the chat that claimed it: its job cannot be changed. Its node helper
// has written down what it has bound. A driver follows all helpers, so that it can find and
// describe a claimed spare as any other sandbox.

// boundPause is how long a driver waits between two reads of what a helper has bound, so that
// many claims in a row do not make it read as many times.
const boundPause = 50 * time.Millisecond

// followers follow what the helpers have bound.
type followers struct {
	d   *Driver
	all map[string]follower // by the node's ID
	ran sync.WaitGroup
}

type follower struct {
	address string
	stop    context.CancelFunc
}

// set has exactly the helpers at these addresses followed, by the node's ID, until ctx ends.
func (f *followers) set(ctx context.Context, addresses map[string]string) {
	for nodeID, one := range f.all {
		if addresses[nodeID] != one.address {
			one.stop()
			delete(f.all, nodeID)
		}
	}
	for nodeID, address := range addresses {
		if _, ok := f.all[nodeID]; ok {
			continue
		}
		ctx, stop := context.WithCancel(ctx)
		f.all[nodeID] = follower{address, stop}
		f.ran.Go(func() { f.d.followBound(ctx, nodeID, address) })
	}
}

// followBound follows what one helper has bound, until ctx ends.
func (d *Driver) followBound(ctx context.Context, nodeID, address string) {
	defer d.helpers.setHeard(nodeID, false)
	pause := backoff.Backoff{Min: minReopen, Max: maxReopen}
	var told backoff.Throttle
	known := ""
	for d.Current(ctx) == nil { // otherwise the cache may not know the spares
		_, breaks := d.cache.stream()
		bound, err := d.readBound(ctx, address, known)
		if ctx.Err() != nil {
			return
		}
		// A helper that is down is not asked at each create.
		d.helpers.setHeard(nodeID, true)
		if err != nil {
			d.logger.Log(told.Level(), "node_helper_unheard", "node_id", nodeID, "address", address, "error", err)
			_ = backoff.Sleep(ctx, pause.Next()) // the loop sees that ctx has ended
			known = ""
			continue
		}
		known = bound.Version
		told.Reset()
		all := d.noteClaims(nodeID, bound)
		if current, after := d.cache.stream(); !all || !current || after != breaks {
			known = "" // the cache did not know a spare
			_ = backoff.Sleep(ctx, pause.Next())
			continue
		}
		pause.Reset()
		_ = backoff.Sleep(ctx, boundPause)
	}
}

// readBound reads what a helper has bound, once that is not as in the known version any
// more, or after nodeapi.BoundWait.
func (d *Driver) readBound(ctx context.Context, address, known string) (nodeapi.Bound, error) {
	limit := nodeapi.BoundWait + askLimit
	if known == "" { // it answers at once
		limit = claimLimit
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return d.helper.Bound(ctx, address, known)
}

// noteClaims records what the helper of a node has bound. It returns false if the cache does
// not know one of the spares.
func (d *Driver) noteClaims(nodeID string, bound nodeapi.Bound) bool {
	all := true
	for _, order := range bound.Orders { // safeguard: hearing of claims
		all = d.noteClaim(nodeID, order) && all
	}
	return all
}

// noteClaim records what the helper of a node has bound. It returns false if the cache does
// not know the spare.
func (d *Driver) noteClaim(nodeID string, order nodeapi.Order) bool {
	claim, ok := d.claimOf(order)
	return !ok || d.cache.setClaim(jobs.ID(order.SessionID), nodeID, claim)
}

// claimOf returns the claim that an order was for. ok is false if it is not of this instance.
func (d *Driver) claimOf(order nodeapi.Order) (c claim, ok bool) {
	var meta map[string]string
	if json.Unmarshal([]byte(order.Note), &meta) != nil || !d.instance.owns(meta[jobs.MetaInstance]) {
		return claim{}, false
	}
	spec, ok := jobs.SpecOf(meta)
	return claim{order.AllocID, meta}, ok && spec.SessionID == order.SessionID && spec.ChatID == order.ChatID
}

func (h *helpers) setHeard(nodeID string, heard bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.heard == nil {
		h.heard = make(map[string]bool)
	}
	if heard {
		h.heard[nodeID] = true
	} else {
		delete(h.heard, nodeID)
	}
}

// unheard returns the addresses of the helpers that have to be asked what they have bound,
// by the node's ID.
func (h *helpers) unheard() map[string]string {
	h.mu.Lock()
	defer h.mu.Unlock()
	unheard := make(map[string]string)
	for nodeID, address := range h.addresses {
		if !h.heard[nodeID] {
			unheard[nodeID] = address
		}
	}
	return unheard
}

// heardAll reports whether unheard would return none, and the addresses have been read.
func (h *helpers) heardAll() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for nodeID := range h.addresses {
		if !h.heard[nodeID] {
			return false
		}
	}
	return h.addresses != nil
}

// maxAsked is how many helpers a question is sent to at a time.
const maxAsked = 16

// askBound asks the helpers that are not followed for the jobs of the spares that a chat has
// claimed, or all helpers. What a helper does not answer is not known.
func (d *Driver) askBound(ctx context.Context, chatID string, all bool) ([]string, error) {
	if d.helper == nil || !all && d.helpers.heardAll() {
		return nil, nil
	}
	limited, cancel := context.WithTimeout(ctx, claimLimit)
	defer cancel()
	if _, known := d.helpers.on(""); !known {
		if _, err := d.readHelpers(limited, 0); err != nil {
			d.logger.Debug("nomad_helpers_unknown", "error", err)
		}
	}
	addresses := d.helpers.unheard()
	if all {
		addresses = d.helpers.all()
	}
	var mu sync.Mutex
	var jobIDs []string
	g, askCtx := errgroup.WithContext(ctx)
	g.SetLimit(maxAsked)
	for nodeID, address := range addresses {
		g.Go(func() error {
			bound, err := d.helper.Bound(limited, address, "")
			if err != nil {
				d.logger.Debug("node_helper_unheard", "node_id", nodeID, "address", address, "error", err)
			}
			for _, order := range bound.Orders { // safeguard: hearing of claims
				if _, ours := d.claimOf(order); !ours || order.ChatID != chatID {
					continue
				}
				jobID := jobs.ID(order.SessionID)
				if _, err := d.read(askCtx, jobID); err != nil { // else the cache may not know the spare
					return err
				}
				d.noteClaim(nodeID, order)
				mu.Lock()
				jobIDs = append(jobIDs, jobID)
				mu.Unlock()
			}
			return nil
		})
	}
	return jobIDs, g.Wait()
}
