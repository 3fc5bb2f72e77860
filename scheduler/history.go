package scheduler

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel/metric"

	"github.com/bivouac/bivouac/internal/broadcast"
)

const (
	// maxHistory bounds the changes that a replica keeps in memory, in bytes. About
	// 40,000 changes of the usual size fit.
	maxHistory = 16 << 20

	// historyWait is how long a read of the store waits for a new change.
	historyWait = time.Minute

	// maxPart is about how many changes a reader takes at a time.
	maxPart = 256
)

// history keeps the newest changes of the store in memory, for any number of readers.
// One loop, follow, adds what is new and wakes the readers. No reader keeps the loop
// waiting: a reader that is too slow misses changes, and learns that it does.
type history struct {
	store   Store
	most    int // bytes of changes
	metrics *historyMetrics
	turn    chan struct{} // has one place, taken while the store is read for readers

	mu      sync.Mutex
	grown   broadcast.Cond
	ring    *ring // replaced if changes may be missing; nil: not loaded
	missing bool  // changes may be missing although none is known
	begun   int   // the number of the newest refresh
	done    int   // the number of the newest refresh that succeeded
}

func newHistory(store Store, meter metric.Meter, now func() time.Time) (*history, error) {
	metrics, err := newHistoryMetrics(meter, now)
	h := &history{store: store, most: maxHistory, metrics: metrics, turn: make(chan struct{}, 1)}
	h.grown.L = &h.mu
	return h, errors.Join(err, h.observe(meter))
}

// follow adds new changes until the store cannot be read or ctx ends.
func (h *history) follow(ctx context.Context) error {
	for {
		if err := h.read(ctx, historyWait); err != nil {
			h.mu.Lock()
			h.missing = h.ring != nil && h.ring.last == 0
			h.mu.Unlock()
			return err
		}
	}
}

// refresh adds all changes that were stored before it was called. Callers that come at
// the same time share one read of the store.
func (h *history) refresh(ctx context.Context) error {
	h.mu.Lock()
	before := h.begun
	h.mu.Unlock()
	return h.inTurn(ctx, func() error {
		h.mu.Lock()
		shared := h.done > before // that refresh began after this call
		if !shared {
			h.begun++
		}
		h.mu.Unlock()
		if shared {
			return nil
		}
		if err := h.read(ctx, 0); err != nil {
			return err
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		h.done = h.begun
		return nil
	})
}

// inTurn calls f when no other call of inTurn runs.
func (h *history) inTurn(ctx context.Context, f func() error) error {
	select {
	case h.turn <- struct{}{}:
		defer func() { <-h.turn }()
		return f()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// read adds the changes that are newer than the known ones. If there is none it waits for
// one, at most as long as wait says.
func (h *history) read(ctx context.Context, wait time.Duration) error {
	for {
		h.mu.Lock()
		ring, anew := h.ring, h.ring == nil || h.missing
		var after uint64
		if !anew {
			after = ring.last
		}
		h.mu.Unlock()
		if anew {
			wait = 0
		}
		changes, err := h.store.Changes(ctx, after, wait)
		if errors.Is(err, ErrIndexTooOld) {
			anew = true
			changes, err = h.store.Changes(ctx, 0, 0)
		}
		if err != nil {
			return fmt.Errorf("read changes: %w", err)
		}
		if h.add(ctx, ring, anew, changes) {
			return nil
		}
	}
}

// add adds changes that were read for a ring. With anew they replace those in the ring.
// It returns false if the ring has been replaced meanwhile.
func (h *history) add(ctx context.Context, ring *ring, anew bool, changes []Change) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ring != ring {
		return false
	}
	switch {
	case ring == nil:
		h.ring = newRing(h.most, 0)
	case anew && (ring.last != 0 || len(changes) > 0): // safeguard: report of a gap to readers
		h.ring = newRing(h.most, ring.end()+1) // no reader's position is in it
	}
	h.missing = false
	added := h.ring.add(changes)
	if !anew {
		h.metrics.heard(ctx, added)
	}
	if len(added) > 0 || h.ring != ring {
		h.grown.Broadcast()
	}
	return true
}

// all returns the changes that are kept, and the position after them. The caller must
// have called refresh.
func (h *history) all() ([]Change, int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clip(h.ring.changes), h.ring.end()
}

// find returns the position after the changes up to an index. It returns ErrIndexTooOld
// if changes after it are missing, or if it is an index of another store. A caller who does
// not see all changes gets that error for every index that is not of a kept change that the
// caller sees: trying indexes would otherwise show when others' changes happen. refresh must
// have been called before.
func (h *history) find(ctx context.Context, index uint64, seesAll bool, sees func(Change) bool) (int, error) {
	for {
		ring, position, isKept, isUnknown := h.lookFor(index, seesAll, sees)
		switch {
		case isKept:
			return position, nil
		case !isUnknown:
			return 0, indexTooOld(index)
		}
		if err := h.inTurn(ctx, func() error { return h.ask(ctx, ring, index) }); err != nil {
			return 0, err
		}
	}
}

// lookFor looks for an index in the ring, for find. isUnknown is true if only the store knows
// whether changes after the index are missing.
func (h *history) lookFor(index uint64, seesAll bool, sees func(Change) bool) (ring *ring, position int, isKept, isUnknown bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	ring, position = h.ring, h.ring.after(index)
	if !seesAll {
		return ring, position, slices.ContainsFunc(ring.at(index), sees), false
	}
	isKept = ring.complete <= index && index <= ring.known
	return ring, position, isKept, ring.tooOld < index && !isKept
}

// ask asks the store whether it has all changes after an index, and tells the ring.
func (h *history) ask(ctx context.Context, ring *ring, index uint64) error {
	_, err := h.store.Changes(ctx, index, 0)
	h.mu.Lock()
	defer h.mu.Unlock()
	if errors.Is(err, ErrIndexTooOld) {
		if len(ring.changes) > 0 && index < ring.complete { // else it may be of another store
			ring.tooOld = max(ring.tooOld, index)
		}
		return indexTooOld(index)
	}
	if err != nil {
		return fmt.Errorf("read changes: %w", err)
	}
	ring.confirm(index)
	return nil
}

func indexTooOld(index uint64) error { return fmt.Errorf("index %d: %w", index, ErrIndexTooOld) }

// part returns changes from a position on, with complete transactions.
func (h *history) part(position int) ([]Change, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	part, ok := h.ring.part(position, maxPart)
	if !ok {
		return nil, ErrIndexTooOld
	}
	return part, nil
}

// wait waits until part returns something for the position.
func (h *history) wait(ctx context.Context, position int) error {
	return h.grown.Wait(ctx, func() bool { return position < h.ring.start || position < h.ring.end() })
}
