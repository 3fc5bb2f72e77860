package consul

import (
	"context"
	"crypto/rand"
	"errors"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/internal/backoff"
)

const (
	// maxSegmentSize is the number of transactions after which a segment is full. A reader
	// reads the current segment again for each change. The writes that are under way when
	// the next one is opened are made again.
	maxSegmentSize = 64
	// openWithin is how long a replica waits at most until it opens the next segment. So
	// most often one replica has done it before the others try.
	openWithin = 400 * time.Millisecond
	// portions is how many segments the kept changes are divided into at least, by time
	// and by number. Changes are dropped by segments.
	portions = 8
	// dropAtATime is how many segments one transaction drops.
	dropAtATime = 2
)

// segmentSize is the number of transactions after which a segment is full.
func (c *changeLog) segmentSize() int {
	return min(max(c.retention.Max/portions, 1), maxSegmentSize)
}

// lookAtSize makes run open the next segment if the current one is full.
func (c *changeLog) lookAtSize(part someSegments) {
	n := 0
	for _, pair := range part.pairs {
		if c.store.keys.segmentOf(pair.Key) == part.head.Segment {
			n++
		}
	}
	if n < c.segmentSize() {
		return
	}
	select {
	case c.full <- part.head.Segment:
	default:
	}
}

// run opens segments and drops old changes until ctx ends. Every replica does so.
func (c *changeLog) run(ctx context.Context) {
	var told backoff.Throttle
	pause := backoff.Backoff{Min: time.Second, Max: time.Minute}
	tick := time.NewTicker(c.retention.Age / portions)
	defer tick.Stop()
	for ctx.Err() == nil {
		if err := c.tidy(ctx); err != nil && ctx.Err() == nil {
			c.store.log.Log(told.Level(), "changes_not_tidied", "error", err)
			_ = backoff.Sleep(ctx, pause.Next())
			continue
		}
		pause.Reset()
		told.Reset()
		c.awaitWork(ctx, tick.C)
	}
}

// awaitWork returns at the next tick, once the current segment has been full for a while,
// or when ctx ends.
func (c *changeLog) awaitWork(ctx context.Context, tick <-chan time.Time) {
	for {
		select {
		case segment := <-c.full:
			_ = backoff.Sleep(ctx, backoff.Jitter(openWithin))
			if c.current().Segment == segment {
				return
			}
		case <-tick:
			return
		case <-ctx.Done():
			return
		}
	}
}

// tidy opens the next segment if the current one is full or old, and drops what is older
// than the retention.
func (c *changeLog) tidy(ctx context.Context) error {
	for more := true; more && ctx.Err() == nil; {
		if err := c.moved(ctx, 0); err != nil {
			return err
		}
		var err error
		if more, err = c.tidyOnce(ctx); err != nil {
			return err
		}
	}
	return nil
}

// segment is a summary of a segment.
type segment struct {
	transactions int
	changes      int
	first, last  time.Time // of its changes
	index        uint64    // of its last change
}

// tidyOnce makes one step of tidy. It returns true if there may be more to do.
func (c *changeLog) tidyOnce(ctx context.Context) (more bool, err error) {
	keys, old := c.store.keys, c.current()
	ops := []*api.KVTxnOp{{Verb: api.KVGetOrEmpty, Key: keys.eventsHead()}}
	for n := old.Oldest; n <= old.Segment; n++ {
		if n < old.Oldest+dropAtATime || n+1 >= old.Segment {
			ops = append(ops, &api.KVTxnOp{Verb: api.KVGetTree, Key: keys.segment(n)})
		}
	}
	pairs, err := c.store.retryTxn(ctx, ops...)
	if err != nil {
		return false, err
	}
	stands, err := headIn(pairs, keys.eventsHead())
	if err != nil {
		return false, err
	}
	if c.take(stands); stands.index != old.index {
		return true, nil // another replica changed it
	}
	next := c.plan(old, c.summarize(pairs[1:]), c.now())
	if next == old {
		return false, nil
	}
	return next.Oldest == old.Oldest+dropAtATime, c.replace(ctx, old, next)
}

func (c *changeLog) summarize(pairs []*api.KVPair) map[uint64]segment {
	segments := make(map[uint64]segment)
	for _, pair := range pairs {
		n := c.store.keys.segmentOf(pair.Key)
		s := segments[n]
		s.transactions++
		s.index = max(s.index, pair.ModifyIndex)
		for _, change := range c.decode(pair) {
			s.changes++
			if s.first.IsZero() || change.Time.Before(s.first) {
				s.first = change.Time
			}
			if change.Time.After(s.last) {
				s.last = change.Time
			}
		}
		segments[n] = s
	}
	return segments
}

// plan returns the head that shall replace the old one. It needs the current segment, the
// one before, and the oldest ones, dropAtATime at most. Only segments before the
// current one can be dropped, because the last index of the current one is not known.
func (c *changeLog) plan(old head, segments map[uint64]segment, now time.Time) head {
	next, current := old, segments[old.Segment]
	if old.Segment > old.Oldest {
		next.Kept += segments[old.Segment-1].changes
	}
	for next.Oldest < old.Segment && next.Oldest < old.Oldest+dropAtATime {
		s := segments[next.Oldest]
		if now.Sub(s.last) < c.retention.Age && next.Kept-s.changes+current.changes < c.retention.Max {
			break
		}
		next.Oldest++
		next.Kept -= s.changes
		next.Dropped = max(next.Dropped, s.index)
	}
	isOld := current.transactions > 0 && now.Sub(current.first) >= c.retention.Age/portions
	switch {
	case isOld, current.transactions >= c.segmentSize():
		next.Segment++
	case old.Segment > next.Oldest:
		next.Kept -= segments[old.Segment-1].changes
	}
	return next
}

// replace writes the next head over the old one, and deletes the segments that are dropped
// with it. It does nothing if another replica changed the head.
func (c *changeLog) replace(ctx context.Context, old, next head) error {
	keys := c.store.keys
	pairs, err := c.store.followTxn(ctx, func() []*api.KVTxnOp {
		ops := []*api.KVTxnOp{
			c.store.identity.unmoved(),
			{Verb: api.KVCAS, Key: keys.eventsHead(), Index: old.index, Value: next.encode()},
			{Verb: api.KVSet, Key: keys.eventsChanged(), Value: []byte(rand.Text())}, // tells the others of the head
		}
		for n := old.Oldest; n < next.Oldest; n++ {
			ops = append(ops, &api.KVTxnOp{Verb: api.KVDeleteTree, Key: keys.segment(n)})
		}
		return ops
	})
	if errors.Is(err, errRolledBack) {
		return c.moved(ctx, old.index)
	}
	if err != nil {
		return err
	}
	written, err := pick(pairs, keys.eventsHead())
	if err != nil {
		return err
	}
	next.index = written.ModifyIndex
	c.take(next)
	return nil
}

// now returns the time that changes have.
func (c *changeLog) now() time.Time {
	if c.store.clock == nil {
		return time.Now()
	}
	return c.store.clock.Now()
}
