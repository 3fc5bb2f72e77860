package consul

import (
	"context"
	"fmt"
	"maps"

	"github.com/bivouac/bivouac/scheduler"
)

// Adopt restores the identity of a store that lost it. It writes the identity that
// this replica had, or otherwise the one in the sandboxes that run under its name.
// If these have several identities, instance chooses one. If the store has an
// identity, Adopt changes nothing. Errors wrap [scheduler.ErrInvalid] or
// [scheduler.ErrUnavailable].
func (s *Store) Adopt(ctx context.Context, instance string) (Identity, error) {
	own, _ := s.identity.known()
	if own.Instance != "" && instance != "" && instance != own.Instance {
		return Identity{}, fmt.Errorf("consul: adopt: %w: this replica belongs to instance %s, not %s", scheduler.ErrInvalid, own.Instance, instance)
	}
	next := own
	var err error
	if own.Instance == "" {
		next, err = s.identity.adoptable(ctx, instance)
	}
	if err == nil {
		// If the store has an identity, it stays. Only the write shows that: this
		// replica may not have noticed yet that its identity was lost.
		_, err = s.identity.write(ctx, next, 0)
	}
	if err == nil {
		err = s.identity.written(ctx)
	}
	if err != nil {
		return Identity{}, fmt.Errorf("consul: adopt: %w", err)
	}
	own, _ = s.identity.known()
	return own, nil
}

// adoptable returns the identity in the running sandboxes.
func (i *identity) adoptable(ctx context.Context, instance string) (Identity, error) {
	running, err := i.running(ctx)
	if err != nil {
		return Identity{}, err
	}
	if instance != "" {
		maps.DeleteFunc(running, func(other string, _ int) bool { return other != instance })
	}
	switch len(running) {
	case 0:
		return Identity{}, fmt.Errorf("%w: no sandbox runs under the name %q", scheduler.ErrInvalid, i.config.Instance)
	case 1:
	default:
		return Identity{}, fmt.Errorf("%w: sandboxes of several instances run (%s): choose one with -instance", scheduler.ErrInvalid, counts(running))
	}
	next, err := i.fresh(ctx)
	if err != nil {
		return Identity{}, err
	}
	for found := range running {
		if found == i.config.Instance {
			next.LegacyInstance = found
		} else {
			next.Instance = found
		}
	}
	return next, nil
}

// Forget writes a fresh identity to a store that has none. It returns how many
// sandboxes run under its name; from now on they belong to another instance. A
// replica that had another identity ends. Errors wrap [scheduler.ErrInvalid] or
// [scheduler.ErrUnavailable].
func (s *Store) Forget(ctx context.Context) (Identity, map[string]int, error) {
	next, left, err := s.identity.forget(ctx)
	if err != nil {
		return Identity{}, nil, fmt.Errorf("consul: forget: %w", err)
	}
	return next, left, nil
}

func (i *identity) forget(ctx context.Context) (Identity, map[string]int, error) {
	own, stands := i.known()
	if stands {
		return Identity{}, nil, fmt.Errorf("%w: the identity %s exists (key %s), so there is nothing to forget",
			scheduler.ErrInvalid, own.Instance, i.store.keys.identity())
	}
	records, err := i.hasRecords(ctx)
	if err != nil {
		return Identity{}, nil, err
	}
	if records {
		return Identity{}, nil, fmt.Errorf("%w: there are records below %s, and their sandboxes would belong to another instance: run `bivouac operator adopt`",
			scheduler.ErrInvalid, i.store.keys.records())
	}
	left, err := i.running(ctx)
	if err != nil {
		return Identity{}, nil, err
	}
	next, err := i.fresh(ctx)
	if err != nil {
		return Identity{}, nil, err
	}
	first, err := i.write(ctx, next, 0)
	switch {
	case err != nil:
		return Identity{}, nil, err
	case !first:
		return Identity{}, nil, undecidable("another replica has just written the identity")
	case own.Instance == "":
		err = i.written(ctx)
	}
	return next, left, err
}
