package consul

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/scheduler"
)

const (
	// maxReaders bounds the readers of changes at a time. The scheduler needs one.
	maxReaders = 8
	// minRest and maxRest bound the time between two reads. It is restFactor times what the
	// read took, so that many changes are read together if Consul is busy.
	minRest    = 50 * time.Millisecond
	maxRest    = time.Second
	restFactor = 4
	// changesWait is how long one request waits for a change. The wait does not end early
	// if Consul's index goes back, because it lost or restored its data.
	changesWait = 10 * time.Second
	// segmentsAtATime is how many segments one transaction reads.
	segmentsAtATime = 8
)

// position is how far a reader has read.
type position struct {
	index   uint64 // of the last change that was returned, or where the reader began
	read    bool   // a change with that index was read
	segment uint64 // the one of that change; all later changes are in it or in later ones
	changed uint64 // index of the key events/changed
}

// Changes implements [scheduler.Store]. A call that continues where the last one ended
// makes a request that waits for a change, and one that reads the segment. Others first
// read all that is kept.
func (s *Store) Changes(ctx context.Context, after uint64, wait time.Duration) ([]scheduler.Change, error) {
	changes, err := s.changes.await(ctx, after, wait)
	if err != nil {
		return nil, fmt.Errorf("consul: changes after %d: %w", after, err)
	}
	return changes, nil
}

// await returns the changes after an index, and waits for one if there is none.
func (c *changeLog) await(ctx context.Context, after uint64, wait time.Duration) ([]scheduler.Change, error) {
	leave, err := c.readers.Enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	until := time.Now().Add(wait)
	from, known := c.position(after)
	for {
		if err := c.store.identity.stands(ctx); err != nil {
			return nil, err
		}
		over := false
		if known {
			if over, err = c.awaitWake(ctx, from.changed, until); err != nil {
				return nil, err
			}
		}
		changes, next, err := c.read(ctx, after, from)
		if err != nil {
			return nil, err
		}
		if wait > 0 || after == 0 { // otherwise it is only a question about an index
			c.setPosition(next)
		}
		if len(changes) > 0 || over {
			return changes, nil
		}
		from, known = next, true
	}
}

// position returns the last reader's position, if that is where a reader continues.
func (c *changeLog) position(after uint64) (from position, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.last.segment == 0 || c.last.index != after {
		return position{index: after}, false
	}
	return c.last, true
}

func (c *changeLog) setPosition(p position) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last = p
}

// awaitWake waits until the key events/changed no longer has that index, or until the time
// is over.
func (c *changeLog) awaitWake(ctx context.Context, index uint64, until time.Time) (over bool, err error) {
	for {
		left := time.Until(until)
		if left <= 0 {
			return true, ctx.Err()
		}
		block := scheduler.Block{Index: index, Wait: min(left, changesWait)}
		pair, _, err := c.store.get(ctx, c.store.keys.eventsChanged(), block)
		if err != nil || pair == nil || pair.ModifyIndex != index {
			return false, err
		}
	}
}

// read returns the changes with an index greater than after, and how far it read. It
// begins with the position's segment, or with the oldest one.
func (c *changeLog) read(ctx context.Context, after uint64, from position) ([]scheduler.Change, position, error) {
	if err := c.rest(ctx); err != nil {
		return nil, position{}, err
	}
	defer c.restAfter(time.Now())
	if err := c.moved(ctx, 0); err != nil {
		return nil, position{}, err
	}
	var found []scheduler.Change
	seen := false // a change with the index after
	at := position{index: after}
	begins := from.segment == 0
	for next := cmp.Or(from.segment, c.current().Oldest); ; {
		part, err := c.readSegments(ctx, next)
		if err != nil {
			return nil, position{}, err
		}
		h := part.head
		switch {
		case after != 0 && from.segment > h.Segment: // the store was set back
			return nil, position{}, scheduler.ErrIndexTooOld
		case after != 0 && next <= h.Oldest && at.index < h.Dropped: // safeguard: report of a gap in the changes
			return nil, position{}, scheduler.ErrIndexTooOld
		case next < h.Oldest && at.index < h.Dropped:
			found, at = nil, position{index: after} // dropped while it was read
			fallthrough
		case next < h.Oldest, next > h.Segment, begins && next != h.Oldest:
			next = h.Oldest
			continue
		}
		begins = false
		for _, pair := range part.pairs {
			seen = seen || pair.ModifyIndex == after
			if pair.ModifyIndex >= max(at.index, 1) {
				at.index, at.read, at.segment = pair.ModifyIndex, true, c.store.keys.segmentOf(pair.Key)
			}
			if pair.ModifyIndex > after {
				found = append(found, c.decode(pair)...)
			}
		}
		if next += segmentsAtATime; next <= h.Segment {
			continue
		}
		if after > part.latest || from.read && !seen && after != h.Dropped { // it is of another store
			return nil, position{}, scheduler.ErrIndexTooOld
		}
		slices.SortStableFunc(found, func(a, b scheduler.Change) int { return cmp.Compare(a.Index, b.Index) })
		at.segment, at.changed = cmp.Or(at.segment, h.Segment), part.changed
		return found, at, nil
	}
}

// rest waits until the next read may begin.
func (c *changeLog) rest(ctx context.Context) error {
	c.mu.Lock()
	left := time.Until(c.restUntil)
	c.mu.Unlock()
	return backoff.Sleep(ctx, left)
}

// restAfter sets when the next read may begin, after one that began at a time.
func (c *changeLog) restAfter(began time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	c.restUntil = now.Add(min(max(restFactor*now.Sub(began), minRest), maxRest))
}

// decode returns the changes that a key holds. If it cannot, it logs why.
func (c *changeLog) decode(pair *api.KVPair) []scheduler.Change {
	changes, err := changesIn(pair)
	if err != nil {
		c.store.log.Warn("changes_skipped", "key", pair.Key, "error", err)
	}
	return changes
}

// someSegments is what one transaction read.
type someSegments struct {
	head    head
	changed uint64        // index of the key events/changed
	latest  uint64        // the greatest index that any change of the store can have
	pairs   []*api.KVPair // of the segments
}

// readSegments reads the segments from a number on, segmentsAtATime at most.
func (c *changeLog) readSegments(ctx context.Context, first uint64) (someSegments, error) {
	keys := c.store.keys
	ops := []*api.KVTxnOp{
		{Verb: api.KVGetOrEmpty, Key: keys.eventsHead()},
		{Verb: api.KVGetOrEmpty, Key: keys.eventsChanged()},
		{Verb: api.KVGetOrEmpty, Key: keys.changed()},
	}
	single := len(ops)
	for n := range uint64(segmentsAtATime) {
		ops = append(ops, &api.KVTxnOp{Verb: api.KVGetTree, Key: keys.segment(first + n)})
	}
	for range maxMoves {
		pairs, err := c.store.retryTxn(ctx, ops...)
		if err != nil {
			return someSegments{}, err
		}
		part := someSegments{pairs: pairs[min(single, len(pairs)):]}
		if part.head, err = headIn(pairs, keys.eventsHead()); err != nil {
			return someSegments{}, err
		}
		if c.learn(part.head); part.head.Segment == 0 {
			if err := c.moved(ctx, 0); err != nil {
				return someSegments{}, err
			}
			continue
		}
		if part.changed, err = indexOf(pairs, keys.eventsChanged()); err != nil {
			return someSegments{}, err
		}
		records, err := indexOf(pairs, keys.changed())
		if err != nil {
			return someSegments{}, err
		}
		part.latest = max(part.head.index, part.changed, records)
		c.lookAtSize(part)
		return part, nil
	}
	return someSegments{}, undecidable("the changes (key %s) are deleted again and again", keys.eventsHead())
}

// indexOf returns the ModifyIndex of a key that a transaction read, 0 if it does not exist.
func indexOf(pairs []*api.KVPair, key string) (uint64, error) {
	pair, err := pick(pairs, key)
	if err != nil {
		return 0, err
	}
	return pair.ModifyIndex, nil
}
