package consul

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/scheduler"
)

// changeLog keeps the changes of sessions in Consul, so that every replica sees the same
// ones in the same order.
//
// The changes of a transaction are the value of one key, which the transaction itself
// sets. All keys of a transaction get the same ModifyIndex. That is the index of the
// changes, and orders them.
//
// The keys are in numbered folders, the segments. The head names the current one. Every
// transaction with changes checks that the head is unchanged, and tries again with the new
// head otherwise. So all changes in a segment have lower indexes than those in the next
// one, and a segment that is no longer the current one never changes. A reader reads only
// the segment that it read last, and those since.
//
// Once the current segment is full or old, a replica opens the next one. The oldest
// segments are deleted in the transaction that writes so to the head. A reader that has
// not read them finds that out from the head.
type changeLog struct {
	store     *Store
	retention scheduler.Retention
	readers   scheduler.Places
	full      chan uint64 // the number of the current segment, once it is full

	mu        sync.Mutex
	known     head      // as last read or written; index 0: not known
	last      position  // how far the last reader has read
	restUntil time.Time // no read begins before
}

// head is the value of the key events/head.
type head struct {
	Segment uint64 `json:"segment"` // the current segment
	Oldest  uint64 `json:"oldest"`  // the oldest segment that is kept
	Kept    int    `json:"kept"`    // number of changes in the kept segments, without the two newest ones
	Dropped uint64 `json:"dropped"` // a change that was dropped has this index at most

	index uint64 // ModifyIndex of the key
}

func newChangeLog(store *Store, retention scheduler.Retention) *changeLog {
	return &changeLog{
		store:     store,
		retention: retention.OrDefault(),
		readers:   scheduler.NewPlaces(maxReaders, "waiting", "already %d readers of changes"),
		full:      make(chan uint64, 1),
	}
}

// ops returns the operations that store a note's changes in the current segment. They
// fail if that is no longer the current one. They also fail if an earlier try stored the
// changes in another segment.
func (c *changeLog) ops(n *note) []*api.KVTxnOp {
	if n.value == nil {
		return nil
	}
	keys, current := c.store.keys, c.current()
	key := keys.segment(current.Segment) + n.id
	ops := []*api.KVTxnOp{{Verb: api.KVCheckIndex, Key: keys.eventsHead(), Index: current.index}} // safeguard: check of the segment
	for _, earlier := range n.tried {
		if earlier != key {
			ops = append(ops, &api.KVTxnOp{Verb: api.KVCheckNotExists, Key: earlier}) // safeguard: single storing of changes
		}
	}
	if !slices.Contains(n.tried, key) {
		n.tried = append(n.tried, key)
	}
	return append(ops,
		&api.KVTxnOp{Verb: api.KVSet, Key: key, Value: n.value},
		&api.KVTxnOp{Verb: api.KVSet, Key: keys.eventsChanged(), Value: []byte(n.id)})
}

func (c *changeLog) current() head {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.known
}

// take records the head as it was read or written.
func (c *changeLog) take(h head) {
	if h.Segment == 0 {
		h = head{}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.known = h
}

// learn records the head as a reader found it, unless a newer one is known.
func (c *changeLog) learn(h head) {
	if h.Segment == 0 || h.index > c.current().index {
		c.take(h)
	}
}

// moved returns nil once the head is known to have another index than the one at which a
// transaction did not find it.
func (c *changeLog) moved(ctx context.Context, index uint64) error {
	for range maxMoves {
		if c.current().index != index {
			return nil
		}
		key := c.store.keys.eventsHead()
		pairs, err := c.store.retryTxn(ctx, &api.KVTxnOp{Verb: api.KVGetOrEmpty, Key: key})
		if err != nil {
			return err
		}
		h, err := headIn(pairs, key)
		if err != nil {
			return err
		}
		if h.Segment != 0 {
			c.take(h)
			return nil
		}
		if err := c.begin(ctx, h.index); err != nil {
			return err
		}
	}
	return undecidable("the head of changes (key %s) is not known yet", c.store.keys.eventsHead())
}

// begin writes the head of a log without changes, if the key has that index, 0 for no key.
// It deletes all changes, because without a head their order is not known.
func (c *changeLog) begin(ctx context.Context, index uint64) error {
	keys := c.store.keys
	first := head{Segment: 1, Oldest: 1}
	_, err := c.store.followTxn(ctx, func() []*api.KVTxnOp {
		return []*api.KVTxnOp{
			c.store.identity.unmoved(),
			{Verb: api.KVDeleteCAS, Key: keys.eventsHead(), Index: index},
			{Verb: api.KVDeleteTree, Key: keys.events()},
			{Verb: api.KVSet, Key: keys.eventsHead(), Value: first.encode()},
			{Verb: api.KVSet, Key: keys.eventsChanged(), Value: []byte(rand.Text())},
		}
	})
	if errors.Is(err, errRolledBack) {
		return nil // another replica just did
	}
	if err == nil && index != 0 {
		c.store.log.Warn("changes_dropped", "reason", "key "+keys.eventsHead()+" could not be read")
	}
	return err
}

func (h head) encode() []byte {
	value, _ := json.Marshal(h) // numbers only
	return value
}

// headIn returns the head as a transaction read it. Its segment is 0 if the key does not
// exist or cannot be read.
func headIn(pairs []*api.KVPair, key string) (head, error) {
	pair, err := pick(pairs, key)
	if err != nil {
		return head{}, err
	}
	var h head
	if json.Unmarshal(pair.Value, &h) != nil || h.Oldest < 1 || h.Oldest > h.Segment {
		h = head{}
	}
	h.index = pair.ModifyIndex
	h.Dropped = max(h.Dropped, pair.CreateIndex) // what was there before is not known
	return h, nil
}

// NoteChange implements [scheduler.Store].
func (s *Store) NoteChange(ctx context.Context, change scheduler.Change) error {
	if err := s.noteChange(ctx, change); err != nil {
		return fmt.Errorf("consul: note a change: %w", err)
	}
	return nil
}

func (s *Store) noteChange(ctx context.Context, change scheduler.Change) error {
	if err := s.identity.stands(ctx); err != nil {
		return err
	}
	if err := s.changes.moved(ctx, 0); err != nil {
		return err
	}
	n, err := newNote(rand.Text(), []scheduler.Change{change})
	if err != nil {
		return err
	}
	_, err = s.followTxn(ctx, func() []*api.KVTxnOp {
		return append([]*api.KVTxnOp{s.identity.unmoved()}, s.changes.ops(&n)...)
	})
	if errors.Is(err, errRolledBack) {
		return nil // an earlier try stored it
	}
	return err
}
