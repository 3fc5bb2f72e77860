package memory

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/bivouac/bivouac/scheduler"
)

// Retain sets how long changes are kept. Call it before the store is used.
func (s *Store) Retain(retention scheduler.Retention) { s.retention = retention.OrDefault() }

// Changes implements [scheduler.Store].
func (s *Store) Changes(ctx context.Context, after uint64, wait time.Duration) ([]scheduler.Change, error) {
	waiting, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	var found []scheduler.Change
	var err error
	_ = s.changed.Wait(waiting, func() bool { // if it ends early, there is none
		if after != 0 && after < s.dropped || after > s.index {
			err = fmt.Errorf("memory: changes after %d: %w", after, scheduler.ErrIndexTooOld)
			return true
		}
		first, _ := slices.BinarySearchFunc(s.changes, after+1, func(c scheduler.Change, index uint64) int {
			return cmp.Compare(c.Index, index)
		})
		found = slices.Clone(s.changes[first:])
		return len(found) > 0
	})
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	return found, nil
}

// NoteChange implements [scheduler.Store].
func (s *Store) NoteChange(ctx context.Context, change scheduler.Change) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("memory: note a change: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.index++
	s.keep(change)
	s.changed.Broadcast()
	return nil
}

// keep stores changes with the current index, and drops the oldest. The caller holds mu.
func (s *Store) keep(changes ...scheduler.Change) {
	for _, change := range changes {
		change = change.Plain()
		change.Index = s.index
		s.changes = append(s.changes, change)
	}
	if len(changes) == 0 {
		return
	}
	oldest := s.changes[len(s.changes)-1].Time.Add(-s.retention.Age)
	n := max(0, len(s.changes)-s.retention.Max)
	for n < len(s.changes) && s.changes[n].Time.Before(oldest) {
		n++
	}
	for n > 0 && n < len(s.changes) && s.changes[n].Index == s.changes[n-1].Index {
		n-- // all of a transaction or none
	}
	if n > 0 {
		s.dropped = s.changes[n-1].Index
		s.changes = slices.Delete(s.changes, 0, n)
	}
}
