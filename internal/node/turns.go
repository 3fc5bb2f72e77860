package node

import (
	"context"
	"fmt"
	"sync"

	"github.com/bivouac/bivouac/runtime"
)

// turns lets one order at a time work on an allocation. Its zero value is ready for use. It
// uses no memory for allocations that nobody works on.
type turns struct {
	mu   sync.Mutex
	busy map[string]chan struct{} // closed at the end of the turn
}

// take waits for the allocation's turn, until ctx ends.
func (t *turns) take(ctx context.Context, allocID string) (leave func(), err error) {
	for {
		leave, busy := t.try(allocID)
		if busy == nil {
			return leave, nil
		}
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: another order for the allocation is being carried out: %w", runtime.ErrUnavailable, ctx.Err())
		}
	}
}

// try takes the allocation's turn if it is free. Otherwise it returns what is closed at the
// end of the turn.
func (t *turns) try(allocID string) (leave func(), busy <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if busy := t.busy[allocID]; busy != nil {
		return nil, busy
	}
	if t.busy == nil {
		t.busy = make(map[string]chan struct{})
	}
	done := make(chan struct{})
	t.busy[allocID] = done
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.busy, allocID)
		close(done)
	}, nil
}
