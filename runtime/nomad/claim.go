package nomad

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

const (
	// claimLimit is how long Claim takes at most. It is also the limit of a helper's Look.
	claimLimit = 5 * time.Second
	// claimStayOpen is how long a connection to a spare has to stay open. The spare's
	// network is up, so Docker's proxy closes a connection to a spare that does not listen
	// within milliseconds.
	claimStayOpen = 250 * time.Millisecond
)

var errNoHelpers = fmt.Errorf("%w: no node helpers are configured", errors.ErrUnsupported)

// Claim implements [runtime.Claimer]. The helper on the spare's node gives the spare its
// volume, because Nomad cannot: it replaces the allocation if the job changes. For the same
// reason only the helper knows what a spare was claimed for. Other drivers learn that from
// it; see [Driver.FindChat].
//
// Meanwhile Claim makes the template's ready check once, and reads the node from Nomad: it
// refuses a spare that does not answer, and one whose node takes no new sandboxes: it is
// drained, not eligible, down or forgotten. Claim takes 5 seconds at most.
func (d *Driver) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	if d.helper == nil {
		return runtime.Sandbox{}, fmt.Errorf("nomad: claim: %w", errNoHelpers)
	}
	if err := spec.Validate(); err != nil {
		return runtime.Sandbox{}, fmt.Errorf("nomad: claim: %w: %w", runtime.ErrInvalid, err)
	}
	if spec.Pool != "" {
		return runtime.Sandbox{}, fmt.Errorf("nomad: claim: %w: the spec has the pool %q, and not a chat", runtime.ErrInvalid, spec.Pool)
	}
	limited, cancel := context.WithTimeout(ctx, claimLimit)
	defer cancel()
	sandbox, err := d.claim(limited, spec)
	switch {
	case err == nil:
		return sandbox, nil
	case ctx.Err() != nil:
		return runtime.Sandbox{}, fmt.Errorf("nomad: claim: %w", ctx.Err())
	case limited.Err() != nil:
		return runtime.Sandbox{}, fmt.Errorf("nomad: claim session %s: %w: no answer within %v: %w", spec.SessionID, runtime.ErrUnavailable, claimLimit, err)
	default:
		return runtime.Sandbox{}, fmt.Errorf("nomad: claim session %s: %w", spec.SessionID, err)
	}
}

func (d *Driver) claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	jobID := jobs.ID(spec.SessionID)
	_, done := d.cache.await(jobID) // so that the cache tells if the job goes meanwhile
	defer done()
	s, err := d.look(ctx, jobID)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	if _, err := d.claimable(s, spec); err != nil {
		return runtime.Sandbox{}, err
	}
	alloc := s.sandboxAlloc()
	address, err := d.helperOf(ctx, alloc)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	order, err := d.bindOrder(spec, alloc)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	var checks sync.WaitGroup
	var spareErr, nodeErr error
	checks.Go(func() { spareErr = d.checkSpare(ctx, spec.SessionID, alloc) })
	checks.Go(func() { nodeErr = d.checkNode(ctx, alloc) })
	bindErr := d.helper.Bind(ctx, address, order)
	checks.Wait()
	if errors.Is(bindErr, runtime.ErrConflict) {
		// Whose it is must be known before anybody ends it.
		if bound, err := d.readBound(ctx, address, ""); err == nil {
			d.noteClaims(alloc.NodeID, bound)
		}
	}
	if bindErr != nil {
		return runtime.Sandbox{}, fmt.Errorf("helper on node %s: %w", nodeName(alloc), bindErr)
	}
	if err := cmp.Or(spareErr, nodeErr); err != nil {
		return runtime.Sandbox{}, err
	}
	d.cache.setReady(jobID, alloc.ID)
	d.noteClaim(alloc.NodeID, order)
	if now, _ := d.cache.get(jobID); now.known || now.gone {
		s = now
	}
	sandbox, err := d.claimable(s, spec)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	sandbox.State = runtime.StateRunning // it has answered
	return sandbox, nil
}

// claimable returns the spare of the spec's session, or why it cannot be claimed. Whether it
// has been claimed is known to the helper, and to this driver if it has heard of it.
func (d *Driver) claimable(s state, spec runtime.Spec) (runtime.Sandbox, error) {
	if err := d.notForeign(s); err != nil {
		return runtime.Sandbox{}, err
	}
	sandbox, ok := d.sandbox(s)
	switch {
	case !ok:
		return runtime.Sandbox{}, runtime.ErrNotFound
	case sandbox.Pool == "":
		return runtime.Sandbox{}, fmt.Errorf("%w: it is not a spare", runtime.ErrConflict)
	case sandbox.ChatID != "" && sandbox.ChatID != spec.ChatID:
		return runtime.Sandbox{}, fmt.Errorf("%w: it was given to chat %s", runtime.ErrConflict, sandbox.ChatID)
	}
	if err := d.fit(s, runtime.Spec{SessionID: spec.SessionID, Pool: sandbox.Pool}); err != nil {
		return runtime.Sandbox{}, err
	}
	switch {
	case sandbox.ContainerID == "":
		return runtime.Sandbox{}, fmt.Errorf("%w: it has not been placed yet", runtime.ErrNotReady)
	case sandbox.State != runtime.StateRunning && sandbox.State != runtime.StateStarting:
		return runtime.Sandbox{}, fmt.Errorf("%w: it is %s: %s", runtime.ErrNotReady, sandbox.State, sandbox.Reason)
	}
	return sandbox, nil
}

// checkSpare makes the ready check of a spare once.
func (d *Driver) checkSpare(ctx context.Context, sessionID string, alloc *api.AllocationListStub) error {
	settings := d.template.Ready()
	check := settings.Check
	check.Dial = d.dial
	check.StayOpen = min(check.StayOpen, claimStayOpen)
	if err := check.Once(ctx, endpointOf(alloc, settings.Port), sessionID); err != nil { // safeguard: no claim of a spare that does not answer
		return fmt.Errorf("%w: %w", runtime.ErrNotReady, err)
	}
	return nil
}

// prepareClaim lets the helper find a spare that has become ready.
func (d *Driver) prepareClaim(ctx context.Context, sessionID string, alloc *api.AllocationListStub) error {
	address, err := d.helperOf(ctx, alloc)
	if err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, claimLimit)
	defer cancel()
	if err := d.helper.Look(limited, address, d.orderOf(sessionID, alloc)); err != nil {
		if ctx.Err() == nil && limited.Err() != nil {
			err = fmt.Errorf("%w: no answer within %v", runtime.ErrUnavailable, claimLimit)
		}
		return fmt.Errorf("nomad: helper on node %s: %w", nodeName(alloc), err)
	}
	return nil
}
