package scheduler

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/google/uuid"
)

const (
	// eventHeartbeat is how often Events yields something.
	eventHeartbeat = 10 * time.Second

	// eventWait bounds the reads of the store before Events yields something.
	eventWait = 10 * time.Second
)

// EventQuery selects changes.
type EventQuery struct {
	// After selects the changes after this index. 0 selects all that are kept, and nil
	// those that happen from now on.
	After   *uint64
	AgentID string       // empty: of all AI agents
	ChatID  uuid.UUID    // zero: of all chats
	Types   []ChangeType // empty: all
	Follow  bool         // wait for more; else end after the changes that are kept
}

// selects reports whether the query selects a change.
func (q EventQuery) selects(c Change) bool {
	return (q.AgentID == "" || c.AgentID == q.AgentID) &&
		(q.ChatID == uuid.Nil || c.ChatID == q.ChatID) &&
		(len(q.Types) == 0 || slices.Contains(q.Types, c.Type)) &&
		(q.After == nil || c.Index > *q.After)
}

// EventBatch is the selected changes of one transaction.
type EventBatch struct {
	Index   uint64
	Changes []Change // none in a heartbeat
}

// Events yields the changes that the query selects and the caller may see, in the order of
// their indexes. All replicas yield the same. A reader goes on at another replica, or at
// another time, with the Index of its last batch in After.
//
// The first batch has no changes. Its Index is where to go on if no other batch follows.
// After that, batches without changes and without an index are heartbeats: with
// query.Follow, no 10 seconds pass without a batch.
//
// The errors are ErrInvalid for an unknown type; ErrPermissionDenied, if the query names an
// AI agent whose sessions the caller may not see; ErrIndexTooOld, if changes that the query
// might select are no longer kept, at the beginning or later if the reader is too slow; an
// error of the store, at the beginning; and that of ctx. While the store cannot be read, Events yields heartbeats, and
// later what was missed.
func (s *Scheduler) Events(ctx context.Context, query EventQuery) iter.Seq2[EventBatch, error] {
	return func(yield func(EventBatch, error) bool) {
		reader, index, err := s.openEvents(ctx, query)
		if err != nil {
			yield(EventBatch{}, fmt.Errorf("events: %w", err))
			return
		}
		s.history.metrics.readers.Add(ctx, 1)
		defer s.history.metrics.readers.Add(ctx, -1)
		if !yield(EventBatch{Index: index}, nil) {
			return
		}
		if err := reader.run(ctx, func(batch EventBatch) bool { return yield(batch, nil) }); err != nil {
			if errors.Is(err, ErrIndexTooOld) {
				s.history.metrics.cut.Add(ctx, 1)
			}
			yield(EventBatch{}, fmt.Errorf("events: %w", err))
		}
	}
}

// History returns the kept changes of one chat that the caller may see, oldest first.
func (s *Scheduler) History(ctx context.Context, chatID uuid.UUID) ([]Change, error) {
	var changes []Change
	for batch, err := range s.Events(ctx, EventQuery{After: new(uint64), ChatID: chatID}) {
		if err != nil {
			return nil, err
		}
		changes = append(changes, batch.Changes...)
	}
	return changes, nil
}

// eventReader reads changes of a history.
type eventReader struct {
	history  *history
	selects  func(Change) bool
	position int
	end      int // where to stop; -1: nowhere
}

// openEvents returns a reader for the query, and the index at which it begins.
func (s *Scheduler) openEvents(ctx context.Context, query EventQuery) (*eventReader, uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, eventWait)
	defer cancel()
	caller := CallerFrom(ctx)
	for _, what := range query.Types {
		if !slices.Contains(changeTypes, what) {
			return nil, 0, fmt.Errorf("%w: unknown type %.64q (available: %s)", ErrInvalid, what, changeTypeNames())
		}
	}
	if query.AgentID != "" {
		if err := caller.require(CapRead, query.AgentID); err != nil {
			return nil, 0, err
		}
	}
	if err := s.history.refresh(ctx); err != nil {
		return nil, 0, err
	}
	sees := func(c Change) bool {
		if c.Pool != "" {
			return caller.readsAll()
		}
		return caller.May(CapRead, c.AgentID)
	}
	reader := &eventReader{
		history: s.history,
		selects: func(c Change) bool { return query.selects(c) && sees(c) },
		end:     -1,
	}
	kept, end := s.history.all()
	if !query.Follow {
		reader.end = end
	}
	switch {
	case query.After == nil:
		reader.position = end
		for _, change := range slices.Backward(kept) {
			if sees(change) {
				return reader, change.Index, nil
			}
		}
		return reader, 0, nil
	case *query.After == 0:
		reader.position = end - len(kept)
		return reader, 0, nil
	default:
		var err error
		reader.position, err = s.history.find(ctx, *query.After, caller.readsAll(), sees)
		return reader, *query.After, err
	}
}

// run yields batches until the end of what the reader reads, or until yield returns
// false.
func (r *eventReader) run(ctx context.Context, yield func(EventBatch) bool) error {
	heard := time.Now()
	for r.position != r.end {
		part, err := r.history.part(r.position)
		if err != nil {
			return err
		}
		if r.end >= 0 {
			part = part[:min(len(part), r.end-r.position)]
		}
		r.position += len(part)
		for batch := range batches(part, r.selects) {
			if !yield(batch) {
				return nil
			}
			heard = time.Now()
		}
		if len(part) == 0 {
			waiting, cancel := context.WithDeadline(ctx, heard.Add(eventHeartbeat))
			_ = r.history.wait(waiting, r.position)
			cancel()
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
		if time.Since(heard) >= eventHeartbeat {
			if !yield(EventBatch{}) {
				return nil
			}
			heard = time.Now()
		}
	}
	return nil
}

// batches returns the selected changes of each transaction that has some.
func batches(changes []Change, selects func(Change) bool) iter.Seq[EventBatch] {
	return func(yield func(EventBatch) bool) {
		for len(changes) > 0 {
			batch := EventBatch{Index: changes[0].Index}
			for len(changes) > 0 && changes[0].Index == batch.Index {
				if selects(changes[0]) {
					batch.Changes = append(batch.Changes, changes[0])
				}
				changes = changes[1:]
			}
			if len(batch.Changes) > 0 && !yield(batch) {
				return
			}
		}
	}
}
