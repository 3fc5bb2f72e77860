package consul

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/scheduler"
)

const (
	// relist is how often all minutes of the past in the expiry index are listed.
	relist = 5 * time.Minute
	// lookBack is how far back minutes are read even if they were empty before: a
	// replica whose clock is behind may still write there.
	lookBack = 10 * time.Minute
	// bucketsAtATime is how many minutes one transaction reads.
	bucketsAtATime = 16
)

// buckets remembers which minutes of the expiry index were not empty when last read,
// so that the empty ones of the past need not be read.
type buckets struct {
	mu     sync.Mutex
	known  map[string]struct{}
	listed time.Time
	looked time.Time // the time up to which minutes were read last, by the replicas' clock
}

// Count implements [scheduler.Store]. It reads the keys of records, and the index of those
// in flight.
func (s *Store) Count(ctx context.Context) (int, error) {
	count, err := s.count(ctx)
	if err != nil {
		return 0, fmt.Errorf("consul: count: %w", err)
	}
	return count, nil
}

func (s *Store) count(ctx context.Context) (int, error) {
	if err := s.identity.stands(ctx); err != nil {
		return 0, err
	}
	inFlight, err := s.retryTxn(ctx, &api.KVTxnOp{Verb: api.KVGetTree, Key: s.keys.flight()})
	if err != nil {
		return 0, err
	}
	count, err := s.countRecords(ctx)
	for _, pair := range inFlight {
		if string(pair.Value) == string(scheduler.StateCreating) {
			count--
		}
	}
	return max(count, 0), err
}

// countRecords counts the keys of records. It lists about as many keys at a time as Scan
// reads records, so that no request takes long.
func (s *Store) countRecords(ctx context.Context) (int, error) {
	first, _, err := s.list(ctx, s.keys.shard(0), "", scheduler.Block{})
	if err != nil {
		return 0, err
	}
	const hexDigits = "0123456789abcdef"
	var parts []string
	switch n := len(first); {
	case n*scheduler.Shards <= scanned:
		parts = []string{s.keys.records()}
	case n*len(hexDigits) <= scanned:
		for _, digit := range hexDigits { // the first one of a shard's name
			parts = append(parts, s.keys.records()+string(digit))
		}
	default:
		for shard := range scheduler.Shards {
			parts = append(parts, s.keys.shard(shard))
		}
	}
	count := 0
	for _, part := range parts {
		keys, _, err := s.list(ctx, part, "", scheduler.Block{})
		if err != nil {
			return 0, err
		}
		count += len(keys)
	}
	return count, nil
}

// InFlight implements [scheduler.Store].
func (s *Store) InFlight(ctx context.Context) ([]scheduler.Session, error) {
	if err := s.identity.stands(ctx); err != nil {
		return nil, fmt.Errorf("consul: list in flight: %w", err)
	}
	keys, _, err := s.list(ctx, s.keys.flight(), "", scheduler.Block{})
	if err != nil {
		return nil, fmt.Errorf("consul: list in flight: %w", err)
	}
	var inFlight []scheduler.Session
	for chunk := range slices.Chunk(keys, maxOps) {
		sessions, err := s.indexed(ctx, chunk)
		if err != nil {
			return nil, fmt.Errorf("consul: list in flight: %w", err)
		}
		inFlight = append(inFlight, sessions...)
	}
	return inFlight, nil
}

// Expired implements [scheduler.Store]. If nothing has expired, it makes one
// transaction, which reads the minutes of lookBack with at most the entries that
// expire within the current minute. It makes one more for every 16 further minutes
// with expired entries, and one for every 64 sessions that it returns. Every 5
// minutes it also lists the names of all earlier minutes with entries, in some 40
// requests, for which Consul reads the entries of those minutes only.
func (s *Store) Expired(ctx context.Context, now time.Time, limit int) ([]scheduler.Session, error) {
	expired, err := s.expired(ctx, now, limit)
	if err != nil {
		return nil, fmt.Errorf("consul: list expired: %w", err)
	}
	return expired, nil
}

func (s *Store) expired(ctx context.Context, now time.Time, limit int) ([]scheduler.Session, error) {
	if err := s.identity.stands(ctx); err != nil {
		return nil, err
	}
	if err := s.listBuckets(ctx, now); err != nil {
		return nil, err
	}
	var expired []scheduler.Session
	for batch := range slices.Chunk(s.dueBuckets(now), bucketsAtATime) {
		if len(expired) >= limit {
			break
		}
		due, err := s.readBuckets(ctx, batch, now)
		if err != nil {
			return nil, err
		}
		for chunk := range slices.Chunk(due, maxOps) {
			if len(expired) >= limit {
				break
			}
			sessions, err := s.indexed(ctx, chunk)
			if err != nil {
				return nil, err
			}
			for _, session := range sessions {
				if session.Expired(now) && len(expired) < limit {
					expired = append(expired, session)
				}
			}
		}
	}
	return expired, nil
}

// listBuckets lists the minutes in the expiry index that are due at now, if it is time to.
// To list all minutes, Consul would read all entries.
func (s *Store) listBuckets(ctx context.Context, now time.Time) error {
	s.buckets.mu.Lock()
	due := s.buckets.known == nil || time.Since(s.buckets.listed) >= relist ||
		now.Sub(s.buckets.looked) > lookBack // such as after the machine slept
	s.buckets.mu.Unlock()
	if !due {
		return nil
	}
	began := time.Now()
	known := make(map[string]struct{})
	for _, part := range upTo(bucketOf(now)) {
		folders, _, err := s.list(ctx, s.keys.expiry()+part, "/", scheduler.Block{})
		if err != nil {
			return err
		}
		for _, folder := range folders {
			known[strings.TrimSuffix(strings.TrimPrefix(folder, s.keys.expiry()), "/")] = struct{}{}
		}
	}
	s.buckets.mu.Lock()
	defer s.buckets.mu.Unlock()
	s.buckets.known, s.buckets.listed = known, began
	return nil
}

// upTo returns prefixes that the names of a minute and of all earlier ones have, and no
// name of a later one.
func upTo(bucket string) []string {
	prefixes := []string{bucket}
	for i := range len(bucket) {
		for digit := byte('0'); digit < bucket[i]; digit++ {
			prefixes = append(prefixes, bucket[:i]+string(digit))
		}
	}
	return prefixes
}

// dueBuckets returns the minutes to read, the earliest first. It marks those within
// lookBack as not empty until they are read, so that a minute that leaves lookBack
// without being read is not forgotten.
func (s *Store) dueBuckets(now time.Time) []string {
	s.buckets.mu.Lock()
	defer s.buckets.mu.Unlock()
	s.buckets.looked = now
	for t := now.Add(-lookBack); !t.After(now); t = t.Add(time.Minute) {
		s.buckets.known[bucketOf(t)] = struct{}{}
	}
	var due []string
	for bucket := range maps.Keys(s.buckets.known) {
		if bucket <= bucketOf(now) {
			due = append(due, bucket)
		}
	}
	slices.Sort(due)
	return due
}

// readBuckets returns the index entries in these minutes that are due at now, the
// earliest first, and records which minutes are empty.
func (s *Store) readBuckets(ctx context.Context, batch []string, now time.Time) ([]string, error) {
	ops := make([]*api.KVTxnOp, len(batch))
	for i, bucket := range batch {
		ops[i] = &api.KVTxnOp{Verb: api.KVGetTree, Key: s.keys.bucket(bucket)}
	}
	pairs, err := s.retryTxn(ctx, ops...)
	if err != nil {
		return nil, err
	}

	empty := make(map[string]struct{}, len(batch))
	for _, bucket := range batch {
		empty[bucket] = struct{}{}
	}
	type entry struct {
		key     string
		expires time.Time
	}
	var due []entry
	for _, pair := range pairs {
		bucket, _, _ := strings.Cut(strings.TrimPrefix(pair.Key, s.keys.expiry()), "/")
		delete(empty, bucket)
		// An entry that cannot be parsed counts as due, so that its record is read.
		expires, err := time.Parse(time.RFC3339Nano, string(pair.Value))
		if err != nil || !expires.After(now) {
			due = append(due, entry{pair.Key, expires})
		}
	}
	slices.SortFunc(due, func(a, b entry) int { return a.expires.Compare(b.expires) })

	s.buckets.mu.Lock()
	defer s.buckets.mu.Unlock()
	for bucket := range empty {
		delete(s.buckets.known, bucket)
	}
	keys := make([]string, len(due))
	for i, e := range due {
		keys[i] = e.key
	}
	return keys, nil
}

// indexed reads the records that index entries point to, at most maxOps, in the same
// order. It logs and leaves out a record that cannot be read. It removes an entry
// that its record should not have.
func (s *Store) indexed(ctx context.Context, entries []string) ([]scheduler.Session, error) {
	var ops []*api.KVTxnOp
	var readable []string
	for _, entry := range entries {
		chatID, err := chatOf(entry)
		if err != nil {
			s.log.Warn("index_entry_skipped", "key", entry, "error", err)
			continue
		}
		readable = append(readable, entry)
		ops = append(ops, &api.KVTxnOp{Verb: api.KVGetOrEmpty, Key: s.keys.record(chatID)})
	}
	if len(ops) == 0 {
		return nil, nil
	}
	pairs, err := s.retryTxn(ctx, ops...)
	if err != nil {
		return nil, err
	}

	sessions := make([]scheduler.Session, 0, len(readable))
	for i, entry := range readable {
		pair, err := pick(pairs, ops[i].Key)
		if err != nil {
			return nil, err
		}
		var session *scheduler.Session
		if pair.ModifyIndex != 0 {
			if session = s.decode(pair); session == nil {
				continue // keep the entry: it may be right
			}
		}
		if _, fits := s.keys.index(session, "")[entry]; !fits {
			if err := s.repair(ctx, entry, pair); err != nil {
				return nil, err
			}
			continue
		}
		sessions = append(sessions, *session)
	}
	return sessions, nil
}

// repair removes an index entry that does not fit the record as it was read, unless
// one of them has changed since. Most often a write has just changed the record and
// removed the entry after the index was read.
func (s *Store) repair(ctx context.Context, entry string, record *api.KVPair) error {
	stands, _, err := s.get(ctx, entry, scheduler.Block{})
	if err != nil || stands == nil {
		return err
	}
	unchanged := &api.KVTxnOp{Verb: api.KVCheckIndex, Key: record.Key, Index: record.ModifyIndex}
	if record.ModifyIndex == 0 {
		unchanged = &api.KVTxnOp{Verb: api.KVCheckNotExists, Key: record.Key}
	}
	_, err = s.retryTxn(ctx, unchanged,
		&api.KVTxnOp{Verb: api.KVDeleteCAS, Key: entry, Index: stands.ModifyIndex})
	switch {
	case err == nil:
		s.log.Warn("index_entry_removed", "key", entry)
		return nil
	case errors.Is(err, errRolledBack):
		return nil
	default:
		return err
	}
}
