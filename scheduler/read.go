package scheduler

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/backoff"
)

// Get returns the chat's session with the current state of its sandbox, and the index for
// a next, blocking Get. The session has its access token only if the caller may write to
// it. If the chat has no session that the caller may see, Get returns ErrNotFound and an
// index.
func (s *Scheduler) Get(ctx context.Context, chatID uuid.UUID, block Block) (Session, uint64, error) {
	caller := CallerFrom(ctx)
	session, index, err := readScoped(ctx, caller, block, func(ctx context.Context, block Block) (*Session, uint64, error) {
		session, index, err := s.Store.Get(ctx, chatID, block)
		if session != nil && !caller.May(CapRead, session.AgentID) {
			session = nil
		}
		return session, index, err
	})
	if err != nil {
		return Session{}, 0, fmt.Errorf("get: %w", err)
	}
	if session == nil {
		return Session{}, index, fmt.Errorf("get: chat %s: %w", chatID, ErrNotFound)
	}
	seen := s.observe(ctx, *session)
	if !caller.May(CapWrite, seen.AgentID) {
		seen.AccessToken = ""
	}
	return seen, index, nil
}

// List returns a page of the sessions as they are recorded, without those that the
// caller may not see. It does not call the query's Include for those. It returns
// ErrPermissionDenied if the query names an AI agent whose sessions the caller may not
// see.
func (s *Scheduler) List(ctx context.Context, query Query) (Page, error) {
	if query.PerPage < 1 || query.PerPage > MaxPerPage {
		return Page{}, invalid("per_page", fmt.Sprintf("is not from 1 to %d", MaxPerPage))
	}
	caller := CallerFrom(ctx)
	if query.AgentID != "" {
		if err := caller.require(CapRead, query.AgentID); err != nil {
			return Page{}, fmt.Errorf("list: %w", err)
		}
	}
	readsAll := caller.readsAll()
	if include := query.Include; !readsAll {
		query.Include = func(session Session) bool {
			return caller.May(CapRead, session.AgentID) && (include == nil || include(session))
		}
	}
	page, index, err := readScoped(ctx, caller, query.Block, func(ctx context.Context, block Block) (Page, uint64, error) {
		query.Block = block
		page, err := s.Store.List(ctx, query)
		index := page.Index
		if !readsAll {
			page.Damaged, page.Index = nil, 0
		}
		return page, index, err
	})
	if err != nil {
		return Page{}, fmt.Errorf("list: %w", err)
	}
	page.Index = index
	return page, nil
}

// Pauses of readScoped. A caller learns of a change later by at most the last of them.
const (
	minReread = 10 * time.Millisecond
	maxReread = time.Second
)

// readScoped makes a read that may block. If the caller may not see all sessions, the
// store's index and the end of its wait would show when sessions of others change. Then
// the index is a fingerprint of what the caller may see, and the read waits until that
// changes. Each change of others makes it read again, so it pauses in between: a list
// would otherwise read the whole store for each of them.
func readScoped[T any](
	ctx context.Context, caller Caller, block Block, read func(context.Context, Block) (T, uint64, error),
) (T, uint64, error) {
	if caller.readsAll() {
		return read(ctx, block)
	}
	var inner Block
	pause := backoff.Backoff{Min: minReread, Max: maxReread}
	for began := time.Now(); ; {
		value, index, err := read(ctx, inner)
		if err != nil {
			return value, 0, err
		}
		seen, err := fingerprint(value)
		left := block.Wait - time.Since(began)
		if err != nil || seen != block.Index || left <= 0 {
			return value, seen, err
		}
		if inner.Index != 0 {
			if err := backoff.Sleep(ctx, min(pause.Next(), left)); err != nil {
				return value, 0, err
			}
			left = max(block.Wait-time.Since(began), time.Millisecond)
		}
		inner = Block{Index: index, Wait: left}
	}
}

// fingerprint returns a number that differs for different values. It is never 0, and it
// fits in an int64, because openapi.json promises that for an index.
func fingerprint(value any) (uint64, error) {
	text, err := json.Marshal(value)
	if err != nil {
		return 0, fmt.Errorf("fingerprint: %w", err)
	}
	hash := fnv.New64a()
	_, _ = hash.Write(text) // never fails
	return hash.Sum64()>>1 | 1, nil
}

// lockVisible takes the chat's lock for a caller. It returns ErrNotFound for a session that
// the caller may not see.
func (s *Scheduler) lockVisible(ctx context.Context, caller Caller, chatID uuid.UUID) (Lease, error) {
	if err := s.checkVisible(ctx, caller, chatID); err != nil {
		return nil, err
	}
	return s.lockChecked(ctx, caller, chatID, LockWait)
}

// checkVisible returns ErrNotFound if the chat has a session that the caller may not see.
// It must be called before the caller waits for anything: a wait would show that the chat
// is in use.
func (s *Scheduler) checkVisible(ctx context.Context, caller Caller, chatID uuid.UUID) error {
	if caller.readsAll() {
		return nil
	}
	current, _, err := s.Store.Get(ctx, chatID, Block{})
	if err != nil {
		return err
	}
	if current != nil && !caller.May(CapRead, current.AgentID) {
		return ErrNotFound
	}
	return nil
}

// lockChecked takes the chat's lock after checkVisible. It returns ErrNotFound if the chat
// has another session by now, which the caller may not see.
func (s *Scheduler) lockChecked(ctx context.Context, caller Caller, chatID uuid.UUID, wait time.Duration) (Lease, error) {
	lease, err := s.lock(ctx, chatID, wait)
	if err != nil {
		return nil, err
	}
	if current := lease.Session(); current != nil && !caller.May(CapRead, current.AgentID) {
		s.release(ctx, lease)
		return nil, ErrNotFound
	}
	return lease, nil
}
