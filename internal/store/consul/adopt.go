package consul

import (
	"context"
	"fmt"
	"maps"

	"github.com/bivouac/bivouac/scheduler"
)

// Adopt gives a store that lost its identity the one that this replica had, or
// else the one that the sandboxes bear which run under its name: of several,
// instance says which. It changes nothing if an identity stands. Errors wrap
// [scheduler.ErrInvalid] or [scheduler.ErrUnavailable].
func (s *Store) Adopt(ctx context.Context, instance string) (Identity, error) {
	own, _ := s.identity.known()
	if own.Instance != "" && instance != "" && instance != own.Instance {
		return Identity{}, fmt.Errorf("consul: adopt: %w: this replica is of instance %s, not %s", scheduler.ErrInvalid, own.Instance, instance)
	}
	next := own
	var err error
	if own.Instance == "" {
		next, err = s.identity.adoptable(ctx, instance)
	}
	if err == nil {
		// If an identity stands, it stays. Only the write tells: this replica may not
		// have seen yet that its own was lost.
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

// adoptable returns the identity that the sandboxes bear which run.
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
		return Identity{}, fmt.Errorf("%w: sandboxes of several instances run (%s): say which to adopt with -instance", scheduler.ErrInvalid, counts(running))
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

// Forget gives a store that has no identity a fresh one, and returns how many
// sandboxes run under its name and are another's from now on. A replica that had
// another identity ends. Errors wrap [scheduler.ErrInvalid] or
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
		return Identity{}, nil, fmt.Errorf("%w: the identity %s stands (key %s), so there is nothing to forget",
			scheduler.ErrInvalid, own.Instance, i.store.keys.identity())
	}
	records, err := i.hasRecords(ctx)
	if err != nil {
		return Identity{}, nil, err
	}
	if records {
		return Identity{}, nil, fmt.Errorf("%w: records stand below %s, whose sandboxes would be another's: run `bivouac operator adopt`",
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
		return Identity{}, nil, undecidable("the identity was written meanwhile")
	case own.Instance == "":
		err = i.written(ctx)
	}
	return next, left, err
}
