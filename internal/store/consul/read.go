package consul

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/scheduler"
)

// Get implements [scheduler.Store] with one request.
func (s *Store) Get(ctx context.Context, chatID uuid.UUID, block scheduler.Block) (*scheduler.Session, uint64, error) {
	session, index, err := s.getRecord(ctx, chatID, block)
	if err != nil {
		return nil, 0, fmt.Errorf("consul: get chat %s: %w", chatID, err)
	}
	return session, index, nil
}

func (s *Store) getRecord(ctx context.Context, chatID uuid.UUID, block scheduler.Block) (*scheduler.Session, uint64, error) {
	if err := s.awaitTime(ctx); err != nil {
		return nil, 0, err
	}
	if err := s.identity.stands(ctx); err != nil {
		return nil, 0, err
	}
	leave, err := s.park(block)
	if err != nil {
		return nil, 0, err
	}
	defer leave()
	key := s.keys.record(chatID)
	pair, index, err := s.get(ctx, key, block)
	if err == nil && pair == nil && block.Index != 0 {
		err = s.identity.confirm(ctx) // the wait ended because something was removed
	}
	if err != nil || pair == nil {
		return nil, index, err
	}
	session, _, err := decodeRecord(key, chatID, pair.Value)
	return session, index, err
}

// List implements [scheduler.Store]. Records are in the order of their keys: by
// shard and chat, or by chat for one agent.
func (s *Store) List(ctx context.Context, query scheduler.Query) (scheduler.Page, error) {
	page, err := s.listPage(ctx, query)
	if err != nil {
		return scheduler.Page{}, fmt.Errorf("consul: list: %w", err)
	}
	return page, nil
}

func (s *Store) listPage(ctx context.Context, query scheduler.Query) (scheduler.Page, error) {
	if query.PerPage < 1 || query.PerPage > scheduler.MaxPerPage {
		return scheduler.Page{}, fmt.Errorf("%w: per_page is %d, but must be from 1 to %d",
			scheduler.ErrInvalid, query.PerPage, scheduler.MaxPerPage)
	}
	if err := s.identity.stands(ctx); err != nil {
		return scheduler.Page{}, err
	}
	leave, err := s.park(query.Block)
	if err != nil {
		return scheduler.Page{}, err
	}
	defer leave()

	// Read one more than fits, to know whether another page follows.
	var page scheduler.Page
	if query.AgentID == "" {
		page, err = s.listAll(ctx, query, query.PerPage+1)
	} else {
		page, err = s.listAgent(ctx, query, query.PerPage+1)
	}
	if err == nil && len(page.Sessions) == 0 && query.Block.Index != 0 {
		err = s.identity.confirm(ctx) // as in getRecord
	}
	if err != nil {
		return scheduler.Page{}, err
	}
	if len(page.Sessions) > query.PerPage {
		page.Sessions = slices.Clip(page.Sessions[:query.PerPage])
		page.NextToken = token(page.Sessions[query.PerPage-1].ChatID, query.AgentID)
	}
	return page, nil
}

// listAll reads shard after shard until it has enough records. It reads more shards at
// a time the emptier they are. So few records need few requests, and of many records
// only few are read in vain.
func (s *Store) listAll(ctx context.Context, query scheduler.Query, enough int) (scheduler.Page, error) {
	after, err := parseToken(query.NextToken, query.AgentID)
	if err != nil {
		return scheduler.Page{}, err
	}
	// Read before the records, so that a change in between ends the next
	// blocking read at once.
	_, index, err := s.get(ctx, s.keys.changed(), query.Block)
	if err != nil {
		return scheduler.Page{}, err
	}

	page := scheduler.Page{Index: index}
	shard, lastKey := 0, ""
	if after != uuid.Nil {
		shard, lastKey = shardOf(after), s.keys.record(after)
	}
	var found, read density // what the query includes, and all records
	for shard < scheduler.Shards && len(page.Sessions) < enough {
		batch := min(found.batch(shard, enough-len(page.Sessions)), read.batch(shard, scanned))
		pairs, err := s.readShards(ctx, shard, batch)
		if err != nil {
			return scheduler.Page{}, err
		}
		shard += batch
		for _, pair := range pairs {
			if pair.Key > lastKey && len(page.Sessions) < enough {
				session, err := s.understand(pair)
				if err != nil {
					page.Damaged = s.appendDamaged(page.Damaged, pair, err)
					continue
				}
				if query.Include == nil || query.Include(*session) {
					page.Sessions = append(page.Sessions, *session)
				}
			}
		}
		found = density{found.shards + batch, len(page.Sessions) + len(page.Damaged)}
		read = density{read.shards + batch, read.records + len(pairs)}
	}
	return page, nil
}

// density is how many records of a kind some shards had.
type density struct{ shards, records int }

// batch returns how many shards to read next, from one shard on, to find some records.
// At first it is one.
func (d density) batch(shard, records int) int {
	if d.shards == 0 {
		return 1
	}
	return min(1+records*d.shards/(d.records+1), maxOps, scheduler.Shards-shard)
}

// readShards reads the records of a number of shards in one transaction.
func (s *Store) readShards(ctx context.Context, first, number int) ([]*api.KVPair, error) {
	ops := make([]*api.KVTxnOp, number)
	for i := range ops {
		ops[i] = &api.KVTxnOp{Verb: api.KVGetTree, Key: s.keys.shard(first + i)}
	}
	return s.retryTxn(ctx, ops...)
}

// scanned is about how many records are read at a time at most.
const scanned = 4096

// Scan implements [scheduler.Store]. It makes at most two requests.
func (s *Store) Scan(ctx context.Context, shard int) (part scheduler.Part, next int, err error) {
	if err := s.identity.stands(ctx); err != nil {
		return scheduler.Part{}, 0, fmt.Errorf("consul: scan: %w", err)
	}
	var seen density
	for range 2 { // the first shard says how many records to expect in the others
		batch := seen.batch(shard, scanned-seen.records)
		if seen.records >= scanned || batch < 1 {
			break
		}
		pairs, err := s.readShards(ctx, shard, batch)
		if err != nil {
			return scheduler.Part{}, 0, fmt.Errorf("consul: scan: %w", err)
		}
		for _, pair := range pairs {
			session, err := s.understand(pair)
			if err != nil {
				part.Damaged = s.appendDamaged(part.Damaged, pair, err)
				continue
			}
			part.Sessions = append(part.Sessions, *session)
		}
		shard, seen = shard+batch, density{seen.shards + batch, seen.records + len(pairs)}
	}
	return part, shard, nil
}

// listAgent reads the keys of the AI agent's index, and then the records of the page.
func (s *Store) listAgent(ctx context.Context, query scheduler.Query, enough int) (scheduler.Page, error) {
	after, err := parseToken(query.NextToken, query.AgentID)
	if err != nil {
		return scheduler.Page{}, err
	}
	prefix := s.keys.agent(query.AgentID)
	keys, index, err := s.list(ctx, prefix, "", query.Block)
	if err != nil {
		return scheduler.Page{}, err
	}
	if after != uuid.Nil {
		next, found := slices.BinarySearch(keys, prefix+after.String())
		if found {
			next++
		}
		keys = keys[next:]
	}

	page := scheduler.Page{Index: index}
	for len(keys) > 0 && len(page.Sessions) < enough {
		missing := enough - len(page.Sessions)
		if query.Include != nil {
			missing = maxOps // it may include few of them
		}
		chunk := keys[:min(len(keys), maxOps, missing)]
		keys = keys[len(chunk):]
		sessions, err := s.indexed(ctx, chunk)
		if err != nil {
			return scheduler.Page{}, err
		}
		for _, session := range sessions {
			if session.AgentID != query.AgentID { // only the hash is the same
				continue
			}
			if query.Include == nil || query.Include(session) {
				page.Sessions = append(page.Sessions, session)
			}
		}
	}
	return page, nil
}

// decode decodes a record. If it cannot, it logs why and returns nil.
func (s *Store) decode(pair *api.KVPair) *scheduler.Session {
	session, _ := s.understand(pair)
	return session
}

// understand decodes a record. If it cannot, it logs why and returns the error.
func (s *Store) understand(pair *api.KVPair) (*scheduler.Session, error) {
	chatID, err := chatOf(pair.Key)
	var session *scheduler.Session
	if err == nil && pair.Key != s.keys.record(chatID) {
		err = fmt.Errorf("%w: %s: the key is not the one of the chat's record", scheduler.ErrDamaged, pair.Key)
	}
	if err == nil {
		session, _, err = decodeRecord(pair.Key, chatID, pair.Value)
	}
	switch {
	case errors.Is(err, scheduler.ErrNewerRecord): // the scheduler reports it, once
		s.log.Debug("record_skipped", "key", pair.Key, "error", err)
		return nil, err
	case err != nil:
		s.log.Warn("record_skipped", "key", pair.Key, "error", err)
		return nil, err
	}
	return session, nil
}

// appendDamaged adds a record that cannot be read, if its key is the one of a
// chat's record.
func (s *Store) appendDamaged(damaged []scheduler.DamagedRecord, pair *api.KVPair, err error) []scheduler.DamagedRecord {
	chatID, noChat := chatOf(pair.Key)
	if noChat != nil || pair.Key != s.keys.record(chatID) {
		return damaged
	}
	return append(damaged, scheduler.DamagedRecord{ChatID: chatID, Err: err})
}

// token encodes the last chat of a page and the list's AI agent.
func token(last uuid.UUID, agentID string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(last.String() + "/" + agentID))
}

func parseToken(token, agentID string) (after uuid.UUID, err error) {
	if token == "" {
		return uuid.Nil, nil
	}
	raw, err := base64.RawURLEncoding.DecodeString(token)
	if err == nil {
		chat, agent, _ := strings.Cut(string(raw), "/")
		if after, err = uuid.Parse(chat); err == nil && agent == agentID {
			return after, nil
		}
	}
	return uuid.Nil, fmt.Errorf("%w: next_token does not come from this list", scheduler.ErrInvalid)
}
