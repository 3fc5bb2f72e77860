package memory

import (
	"bytes"
	"context"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/scheduler"
)

// Spares implements [scheduler.Store].
func (s *Store) Spares(ctx context.Context, block scheduler.Block) ([]scheduler.Spare, uint64, error) {
	var spares []scheduler.Spare
	index, err := s.read(ctx, block, func() uint64 {
		spares = nil
		for _, spare := range s.spares {
			spares = append(spares, spare)
		}
		return s.sparesIndex
	})
	if err != nil {
		return nil, 0, fmt.Errorf("memory: list spares: %w", err)
	}
	slices.SortFunc(spares, func(a, b scheduler.Spare) int { return bytes.Compare(a.SessionID[:], b.SessionID[:]) })
	return spares, index, nil
}

// FindSpare implements [scheduler.Store].
func (s *Store) FindSpare(ctx context.Context, sessionID uuid.UUID) (found *scheduler.Spare, chatID uuid.UUID, err error) {
	if _, err := s.read(ctx, scheduler.Block{}, func() uint64 {
		if spare, ok := s.spares[sessionID]; ok {
			found = &spare
			return s.index
		}
		for _, r := range s.records {
			if r.session.Warm && r.session.SessionID == sessionID {
				chatID = r.session.ChatID
			}
		}
		return s.index
	}); err != nil {
		return nil, uuid.Nil, fmt.Errorf("memory: find spare %s: %w", sessionID, err)
	}
	return found, chatID, nil
}

// PutSpare implements [scheduler.Store].
func (s *Store) PutSpare(ctx context.Context, spare scheduler.Spare) (scheduler.Spare, error) {
	err := s.changeSpare(ctx, spare, func() {
		spare.CreatedAt, spare.Version = spare.CreatedAt.Round(0).UTC(), s.index
		s.spares[spare.SessionID] = spare
	})
	if err != nil {
		return scheduler.Spare{}, fmt.Errorf("memory: write spare %s: %w", spare.SessionID, err)
	}
	return spare, nil
}

// RemoveSpare implements [scheduler.Store].
func (s *Store) RemoveSpare(ctx context.Context, spare scheduler.Spare) error {
	s.mu.Lock()
	_, stands := s.spares[spare.SessionID]
	s.mu.Unlock()
	if !stands {
		return ctx.Err()
	}
	if err := s.changeSpare(ctx, spare, func() { delete(s.spares, spare.SessionID) }); err != nil {
		return fmt.Errorf("memory: remove spare %s: %w", spare.SessionID, err)
	}
	return nil
}

// changeSpare calls change if the spare still has its version.
func (s *Store) changeSpare(ctx context.Context, spare scheduler.Spare, change func()) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.spares[spare.SessionID].Version != spare.Version {
		return scheduler.ErrSpareTaken
	}
	s.index++
	s.sparesIndex = s.index
	change()
	s.changed.Broadcast()
	return nil
}
