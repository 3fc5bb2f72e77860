package nomad

import (
	"context"
	"encoding/json"
	"slices"
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

// wait stops all and waits until they have ended.
func (f *followers) wait() {
	for _, one := range f.all {
		one.stop()
	}
	f.ran.Wait()
}

// followBound follows what one helper has bound, until ctx ends.
func (d *Driver) followBound(ctx context.Context, nodeID, address string) {
	defer d.helpers.setHeard(nodeID, false)
	if d.Current(ctx) != nil { // before that, the cache keeps no claims
		return
	}
	pause := backoff.Backoff{Min: minReopen, Max: maxReopen}
	var told backoff.Throttle
	known := ""
	for ctx.Err() == nil {
		bound, err := d.readBound(ctx, nodeID, address, known)
		if ctx.Err() != nil {
			return
		}
		// A helper that is down is not asked at each create. What it had bound until now is known.
		d.helpers.setHeard(nodeID, true)
		if err != nil {
			d.logger.Log(told.Level(), "node_helper_unheard", "node_id", nodeID, "address", address, "error", err)
			_ = backoff.Sleep(ctx, pause.Next()) // the loop sees that ctx has ended
			known = ""
			continue
		}
		known = bound.Version
		pause.Reset()
		told.Reset()
		_ = backoff.Sleep(ctx, boundPause) // as above
	}
}

// readBound reads what a helper has bound, once that is not as in the known version any
// more, or after nodeapi.BoundWait.
func (d *Driver) readBound(ctx context.Context, nodeID, address, known string) (nodeapi.Bound, error) {
	ctx, cancel := context.WithTimeout(ctx, nodeapi.BoundWait+askLimit)
	defer cancel()
	bound, err := d.helper.Bound(ctx, address, known)
	for _, order := range bound.Orders { // safeguard: hearing of claims
		d.noteClaim(nodeID, order)
	}
	return bound, err
}

// noteClaim records what the helper of a node has bound.
func (d *Driver) noteClaim(nodeID string, order nodeapi.Order) {
	var meta map[string]string
	if json.Unmarshal([]byte(order.Note), &meta) != nil {
		return // of another program
	}
	spec, ok := jobs.SpecOf(meta)
	if ok && spec.SessionID == order.SessionID && spec.ChatID == order.ChatID {
		d.cache.setClaim(jobs.ID(order.SessionID), nodeID, claim{order.AllocID, meta})
	}
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

// maxAsked is how many helpers a question is sent to at a time.
const maxAsked = 16

// askBound asks the helpers that are not followed for the jobs of the spares that a chat has
// claimed. What a helper does not answer is not known.
func (d *Driver) askBound(ctx context.Context, chatID string) []string {
	if d.helper == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, claimLimit)
	defer cancel()
	if _, known := d.helpers.on(""); !known {
		if _, err := d.readHelpers(ctx, 0); err != nil {
			d.logger.Debug("nomad_helpers_unknown", "error", err)
		}
	}
	var mu sync.Mutex
	var jobIDs []string
	var g errgroup.Group
	g.SetLimit(maxAsked)
	for nodeID, address := range d.helpers.unheard() {
		g.Go(func() error {
			bound, err := d.helper.Bound(ctx, address, "")
			if err != nil {
				d.logger.Debug("node_helper_unheard", "node_id", nodeID, "address", address, "error", err)
			}
			for _, order := range bound.Orders { // safeguard: hearing of claims
				if order.ChatID != chatID {
					continue
				}
				jobID := jobs.ID(order.SessionID)
				if _, err := d.read(ctx, jobID); err != nil { // else the cache may not know the job
					continue
				}
				d.noteClaim(nodeID, order)
				mu.Lock()
				jobIDs = append(jobIDs, jobID)
				mu.Unlock()
			}
			return nil
		})
	}
	_ = g.Wait() // its functions return no error
	slices.Sort(jobIDs)
	return jobIDs
}
