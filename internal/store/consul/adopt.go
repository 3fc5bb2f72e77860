package consul

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/bivouac/bivouac/scheduler"
)

// Adopt restores the identity of a store that lost it. It writes the identity that
// this replica had. If the replica started after the loss, instance must be the ID in
// sandboxes that run under its name: these could also be another Bivouac's. If the
// store has an identity, Adopt changes nothing. Errors wrap [scheduler.ErrInvalid] or
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

// adoptable returns the identity of an instance whose sandboxes run under this
// replica's name.
func (i *identity) adoptable(ctx context.Context, instance string) (Identity, error) {
	running, err := i.running(ctx)
	switch {
	case err != nil:
		return Identity{}, err
	case len(running) == 0:
		return Identity{}, fmt.Errorf("%w: no sandbox runs under the name %q", scheduler.ErrInvalid, i.config.Instance)
	case running[instance] == 0:
		return Identity{}, fmt.Errorf("%w: this server started after the loss and does not know its instance ID. To take over the sandboxes of an instance, run %s. If they all belong to another Bivouac, run `bivouac operator forget`",
			scheduler.ErrInvalid, adoptCommands(running))
	}
	next, err := i.fresh(ctx)
	if err != nil {
		return Identity{}, err
	}
	if instance == i.config.Instance {
		next.LegacyInstance = instance
	} else {
		next.Instance = instance
	}
	return next, nil
}

// adoptCommands returns the command that adopts each instance.
func adoptCommands(running map[string]int) string {
	var commands []string
	for _, instance := range slices.Sorted(maps.Keys(running)) {
		commands = append(commands, fmt.Sprintf("`bivouac operator adopt -instance=%s` (%d sandboxes)", instance, running[instance]))
	}
	return strings.Join(commands, " or ")
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
		return Identity{}, nil, fmt.Errorf("%w: there are records below %s, and their sandboxes would belong to another instance: run `bivouac operator adopt -instance=ID`",
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
