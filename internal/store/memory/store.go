// Package memory keeps records and locks in this process's memory. It is for -dev,
// and for tests that must be fast and deterministic.
//
// A [Store] fulfils the same contract as any other store, and a [Locker] is one
// replica's view of it. The package starts no goroutine and waits only on channels
// and timers, so it works inside a [testing/synctest] bubble.
//
// Nothing outlives the process.
package memory

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/broadcast"
	"github.com/bivouac/bivouac/internal/store/chatmutex"
	"github.com/bivouac/bivouac/scheduler"
)

// defaultWait is how long a blocking read waits by default.
const defaultWait = 5 * time.Minute

// Store is a [scheduler.Store]. Make one with [NewStore].
type Store struct {
	locks chatmutex.Mutex

	mu      sync.Mutex
	records map[uuid.UUID]record
	index   uint64 // of the last change
	removed uint64 // index of the last removal, the index of reads that find nothing

	spares      map[uuid.UUID]scheduler.Spare // by session ID
	sparesIndex uint64                        // of the last change of a spare

	changes   []scheduler.Change
	dropped   uint64 // index of the last change that is no longer kept
	retention scheduler.Retention
	changed   broadcast.Cond // a record changed, or a change was stored
}

type record struct {
	session scheduler.Session
	index   uint64 // of its last change
	unread  error  // why it cannot be read; nil: it can
}

// NewStore returns an empty store.
func NewStore() *Store {
	s := &Store{
		records: make(map[uuid.UUID]record),
		index:   1, // an index is never 0
		removed: 1,

		spares:      make(map[uuid.UUID]scheduler.Spare),
		sparesIndex: 1,

		retention: scheduler.Retention{}.OrDefault(),
	}
	s.changed.L = &s.mu
	return s
}

// Damage makes the chat's record unreadable, as an edit by hand could. It is for
// tests.
func (s *Store) Damage(chatID uuid.UUID) { s.spoil(chatID, scheduler.ErrDamaged) }

// Outdate makes the chat's record one that only a newer version may read. It is
// for tests.
func (s *Store) Outdate(chatID uuid.UUID) { s.spoil(chatID, scheduler.ErrNewerRecord) }

func (s *Store) spoil(chatID uuid.UUID, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.records[chatID]
	r.unread = fmt.Errorf("%w: chat %s", why, chatID)
	s.records[chatID] = r
}

// Get implements [scheduler.Store].
func (s *Store) Get(ctx context.Context, chatID uuid.UUID, block scheduler.Block) (*scheduler.Session, uint64, error) {
	var found *scheduler.Session
	var unread error
	index, err := s.read(ctx, block, func() uint64 {
		r, ok := s.records[chatID]
		unread = r.unread
		if !ok {
			found = nil
			return s.removed
		}
		found = &r.session
		return r.index
	})
	err = cmp.Or(err, unread)
	if err != nil {
		return nil, 0, fmt.Errorf("memory: get chat %s: %w", chatID, err)
	}
	return found, index, nil
}

// List implements [scheduler.Store].
func (s *Store) List(ctx context.Context, query scheduler.Query) (scheduler.Page, error) {
	if query.PerPage < 1 || query.PerPage > scheduler.MaxPerPage {
		return scheduler.Page{}, fmt.Errorf("memory: list: %w: per_page is %d, but must be from 1 to %d",
			scheduler.ErrInvalid, query.PerPage, scheduler.MaxPerPage)
	}
	after, err := parseToken(query.NextToken)
	if err != nil {
		return scheduler.Page{}, fmt.Errorf("memory: list: %w", err)
	}

	var page scheduler.Page
	index, err := s.read(ctx, query.Block, func() uint64 {
		index := s.removed
		page.Damaged = nil
		for chatID, r := range s.records {
			if r.unread != nil && query.AgentID == "" && query.NextToken == "" { // all on the first page
				page.Damaged = append(page.Damaged, scheduler.DamagedRecord{ChatID: chatID, Err: r.unread})
			}
		}
		page.Sessions = s.selectWhere(func(r record) bool {
			if query.AgentID != "" && r.session.AgentID != query.AgentID {
				return false
			}
			index = max(index, r.index)
			if query.NextToken != "" && compareIDs(r.session.ChatID, after) <= 0 {
				return false
			}
			return query.Include == nil || query.Include(r.session)
		})
		return index
	})
	if err != nil {
		return scheduler.Page{}, fmt.Errorf("memory: list: %w", err)
	}
	slices.SortFunc(page.Sessions, byChat)
	if len(page.Sessions) > query.PerPage {
		page.Sessions = slices.Clip(page.Sessions[:query.PerPage])
		page.NextToken = token(page.Sessions[query.PerPage-1].ChatID)
	}
	page.Index = index
	return page, nil
}

// Scan implements [scheduler.Store]. It returns everything at once.
func (s *Store) Scan(ctx context.Context, _ int) (part scheduler.Part, next int, err error) {
	if _, err := s.read(ctx, scheduler.Block{}, func() uint64 {
		part.Sessions = s.selectWhere(func(record) bool { return true })
		for chatID, r := range s.records {
			if r.unread != nil {
				part.Damaged = append(part.Damaged, scheduler.DamagedRecord{ChatID: chatID, Err: r.unread})
			}
		}
		return s.index
	}); err != nil {
		return scheduler.Part{}, 0, fmt.Errorf("memory: scan: %w", err)
	}
	slices.SortFunc(part.Sessions, byChat)
	return part, scheduler.Shards, nil
}

// Expired implements [scheduler.Store].
func (s *Store) Expired(ctx context.Context, now time.Time, limit int) ([]scheduler.Session, error) {
	var expired []scheduler.Session
	if _, err := s.read(ctx, scheduler.Block{}, func() uint64 {
		expired = s.selectWhere(func(r record) bool {
			return r.session.State != scheduler.StateCreating && r.session.Expired(now)
		})
		return s.index
	}); err != nil {
		return nil, fmt.Errorf("memory: list expired: %w", err)
	}
	slices.SortFunc(expired, func(a, b scheduler.Session) int {
		return cmp.Or(a.ExpiresAt.Compare(b.ExpiresAt), byChat(a, b))
	})
	return expired[:min(len(expired), max(limit, 0))], nil
}

// InFlight implements [scheduler.Store].
func (s *Store) InFlight(ctx context.Context) ([]scheduler.Session, error) {
	var inFlight []scheduler.Session
	if _, err := s.read(ctx, scheduler.Block{}, func() uint64 {
		inFlight = s.selectWhere(func(r record) bool { return !r.session.Settled() })
		return s.index
	}); err != nil {
		return nil, fmt.Errorf("memory: list in flight: %w", err)
	}
	slices.SortFunc(inFlight, byChat)
	return inFlight, nil
}

// CountAgents implements [scheduler.Store].
func (s *Store) CountAgents(ctx context.Context, prefix string) (int, error) {
	var n int
	if _, err := s.read(ctx, scheduler.Block{}, func() uint64 {
		n = len(s.selectWhere(func(r record) bool { return strings.HasPrefix(r.session.AgentID, prefix) }))
		return 0
	}); err != nil {
		return 0, fmt.Errorf("memory: count: %w", err)
	}
	return n, nil
}

// Count implements [scheduler.Store].
func (s *Store) Count(ctx context.Context) (int, error) {
	var count int
	if _, err := s.read(ctx, scheduler.Block{}, func() uint64 {
		count = 0
		for _, r := range s.records {
			if r.session.State != scheduler.StateCreating && r.unread == nil {
				count++
			}
		}
		return s.index
	}); err != nil {
		return 0, fmt.Errorf("memory: count: %w", err)
	}
	return count, nil
}

// read calls look, which returns the index of what it read. It calls look again at
// each change, until that index is above block's or block's time is over.
func (s *Store) read(ctx context.Context, block scheduler.Block, look func() uint64) (uint64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	waiting := ctx
	if block.Index != 0 {
		var cancel context.CancelFunc
		waiting, cancel = context.WithTimeout(ctx, cmp.Or(block.Wait, defaultWait))
		defer cancel()
	}
	var index uint64
	err := s.changed.Wait(waiting, func() bool {
		index = look()
		foreign := block.Index > s.index // from before a restart
		return block.Index == 0 || index > block.Index || foreign
	})
	if err != nil && ctx.Err() != nil {
		return 0, ctx.Err()
	}
	return index, nil
}

// selectWhere returns the sessions of all matching records. The caller holds mu.
func (s *Store) selectWhere(match func(record) bool) []scheduler.Session {
	var selected []scheduler.Session
	for _, r := range s.records {
		if r.unread == nil && match(r) {
			selected = append(selected, r.session)
		}
	}
	return selected
}

// put replaces a chat's record, or removes it if next is nil. The caller holds mu, and
// broadcasts afterwards.
func (s *Store) put(chatID uuid.UUID, next *scheduler.Session) {
	before, stood := s.records[chatID]
	s.index++
	if next == nil {
		delete(s.records, chatID)
	} else {
		s.records[chatID] = record{session: *next, index: s.index}
	}
	// A record that moves to another AI agent disappears from the first one's list.
	if next == nil || stood && before.session.AgentID != next.AgentID {
		s.removed = s.index
	}
}

func byChat(a, b scheduler.Session) int { return compareIDs(a.ChatID, b.ChatID) }

func compareIDs(a, b uuid.UUID) int { return bytes.Compare(a[:], b[:]) }

// token encodes the last chat of a page.
func token(last uuid.UUID) string { return base64.RawURLEncoding.EncodeToString(last[:]) }

func parseToken(token string) (after uuid.UUID, err error) {
	if token == "" {
		return uuid.Nil, nil
	}
	raw, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil {
		return uuid.Nil, fmt.Errorf("%w: next_token", scheduler.ErrInvalid)
	}
	last, err := uuid.FromBytes(raw)
	if err != nil {
		return uuid.Nil, fmt.Errorf("%w: next_token", scheduler.ErrInvalid)
	}
	return last, nil
}
