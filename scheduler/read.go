package scheduler

import (
	"context"
	"fmt"

	"github.com/google/uuid"
)

// Get returns the chat's session with the current state of its sandbox, and the index for
// a next, blocking Get. If the chat has no session, it returns ErrNotFound and an index.
func (s *Scheduler) Get(ctx context.Context, chatID uuid.UUID, block Block) (Session, uint64, error) {
	session, index, err := s.Store.Get(ctx, chatID, block)
	if err != nil {
		return Session{}, 0, fmt.Errorf("get: %w", err)
	}
	if session == nil {
		return Session{}, index, fmt.Errorf("get: chat %s: %w", chatID, ErrNotFound)
	}
	return s.observe(ctx, *session), index, nil
}

// List returns a page of the sessions as they are recorded.
func (s *Scheduler) List(ctx context.Context, query Query) (Page, error) {
	if query.PerPage < 1 || query.PerPage > MaxPerPage {
		return Page{}, invalid("per_page", fmt.Sprintf("is not from 1 to %d", MaxPerPage))
	}
	page, err := s.Store.List(ctx, query)
	if err != nil {
		return Page{}, fmt.Errorf("list: %w", err)
	}
	return page, nil
}
