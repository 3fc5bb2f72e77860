package fakeruntime

import (
	"context"
	"fmt"
	"reflect"

	"github.com/bivouac/bivouac/runtime"
)

// SetVariant sets what Info returns as the variant. At first it is "1".
func (d *Driver) SetVariant(variant string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.variant = variant
}

// Claim implements [runtime.Claimer]. A claimed sandbox keeps its pool. If Claim is made
// to fail after its effect, the sandbox belongs to the chat.
func (d *Driver) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	if err := d.ask(ctx, OpClaim, spec.SessionID, Before); err != nil {
		return runtime.Sandbox{}, err
	}
	if err := ctx.Err(); err != nil {
		return runtime.Sandbox{}, err
	}
	claimed, err := d.claim(spec)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	if err := d.ask(ctx, OpClaim, spec.SessionID, After); err != nil {
		return runtime.Sandbox{}, err
	}
	return claimed, nil
}

func (d *Driver) claim(spec runtime.Spec) (runtime.Sandbox, error) {
	if err := spec.Validate(); err != nil {
		return runtime.Sandbox{}, fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	if spec.Pool != "" {
		return runtime.Sandbox{}, fmt.Errorf("%w: a claim has no pool", runtime.ErrInvalid)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	s, ok := d.sandboxes[spec.SessionID]
	switch {
	case !ok || s.hid:
		return runtime.Sandbox{}, fmt.Errorf("%w: %s", runtime.ErrNotFound, spec.SessionID)
	case d.ended[spec.SessionID]:
		return runtime.Sandbox{}, fmt.Errorf("%w: %s was stopped", runtime.ErrConflict, spec.SessionID)
	case s.spec.Pool == "":
		return runtime.Sandbox{}, fmt.Errorf("%w: %s is not a spare", runtime.ErrConflict, spec.SessionID)
	case s.spec.AccessToken != spec.AccessToken:
		return runtime.Sandbox{}, fmt.Errorf("%w: %s has another access token", runtime.ErrConflict, spec.SessionID)
	case s.claim != nil && !reflect.DeepEqual(*s.claim, spec):
		return runtime.Sandbox{}, fmt.Errorf("%w: %s was claimed with another spec", runtime.ErrConflict, spec.SessionID)
	case s.State != runtime.StateRunning:
		return runtime.Sandbox{}, fmt.Errorf("%w: %s is %s: %s", runtime.ErrNotReady, spec.SessionID, s.State, s.Reason)
	}
	if s.claim == nil {
		s.claim = &spec
		s.serve(spec)
		d.count(spec.ChatID)
	}
	return s.Sandbox, nil
}
