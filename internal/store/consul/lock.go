package consul

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/scheduler"
)

// Lock implements [scheduler.Locker].
func (s *Store) Lock(ctx context.Context, chatID uuid.UUID, wait time.Duration) (scheduler.Lease, error) {
	return s.lock(ctx, chatID, wait, (*Lease).read)
}

// LockDamaged implements [scheduler.Locker].
func (s *Store) LockDamaged(ctx context.Context, chatID uuid.UUID, wait time.Duration) (scheduler.Lease, error) {
	return s.lock(ctx, chatID, wait, (*Lease).readDamaged)
}

// lock takes the chat's lock and reads the record with read.
func (s *Store) lock(ctx context.Context, chatID uuid.UUID, wait time.Duration, read readRecord) (scheduler.Lease, error) {
	if err := s.awaitTime(ctx); err != nil {
		return nil, fmt.Errorf("consul: lock chat %s: %w", chatID, err)
	}
	until := time.Now().Add(wait)
	if err := s.identity.stands(ctx); err != nil {
		return nil, fmt.Errorf("consul: lock chat %s: %w", chatID, err)
	}
	unlock, err := s.chats.Lock(ctx, chatID, wait) // safeguard: chat mutex
	if err != nil {
		return nil, fmt.Errorf("consul: lock chat %s: %w", chatID, err)
	}
	lease, err := s.lockKey(ctx, chatID, wait, until, read)
	if err != nil {
		unlock()
		return nil, fmt.Errorf("consul: lock chat %s: %w", chatID, err)
	}
	lease.unlock = unlock
	return lease, nil
}

// lockKey takes the chat's lock key, for which other replicas may compete.
func (s *Store) lockKey(ctx context.Context, chatID uuid.UUID, wait time.Duration, until time.Time, read readRecord) (*Lease, error) {
	waiting, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	pause := backoff.Backoff{Min: 2 * time.Millisecond, Max: 200 * time.Millisecond}
	for {
		hold, err := s.session.current(ctx)
		if err != nil {
			return nil, err
		}
		lease, refused := s.tryLock(ctx, hold, chatID, read)
		if moved, ok := errors.AsType[*movedError](refused); ok {
			if err := s.follow(ctx, moved); err != nil {
				return nil, err
			}
			continue
		}
		if !errors.Is(refused, errRolledBack) {
			return lease, refused
		}
		if wait > 0 {
			err = s.awaitFree(waiting, hold, chatID, pause.Next())
		}
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case waiting.Err() != nil:
			return nil, fmt.Errorf("%w: waited %v: %w", scheduler.ErrLockTimeout, wait, refused)
		case err != nil:
			return nil, err
		}
	}
}

// tryLock takes the lock key and reads the record, in one transaction. It returns
// errRolledBack if somebody else has the key, and a movedError if the identity has
// changed or is gone.
func (s *Store) tryLock(ctx context.Context, h *heldSession, chatID uuid.UUID, read readRecord) (*Lease, error) {
	lease := &Lease{store: s, hold: h, chatID: chatID, id: rand.Text(), lost: make(chan struct{})}
	if !h.add(lease) {
		return nil, fmt.Errorf("%w: the hold just ended", errRolledBack)
	}
	lockKey, recordKey := s.keys.lock(chatID), s.keys.record(chatID)
	// The same lease can repeat this without further effect.
	pairs, err := retry(ctx, func(ctx context.Context) ([]*api.KVPair, error) {
		pairs, err := s.txn(ctx,
			&api.KVTxnOp{Verb: api.KVLock, Key: lockKey, Value: []byte(lease.id), Session: h.session},
			&api.KVTxnOp{Verb: api.KVGetOrEmpty, Key: recordKey},
			s.identity.unmoved())
		if err != nil && !isMoved(err) && !isBusy(err) && !errors.Is(err, errRolledBack) {
			lease.unanswered = true
		}
		return pairs, err
	})
	if err != nil {
		h.remove(lease)
		if lease.unanswered {
			s.abandon(h, lease) // a try may have been applied, or may still be
		}
		return nil, err
	}

	locked, err := pick(pairs, lockKey)
	if err == nil {
		lease.lockIndex = locked.ModifyIndex
		err = read(lease, pairs)
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		if releaseErr := lease.giveUp(context.WithoutCancel(ctx)); releaseErr != nil {
			s.log.Warn("lock_release_failed", "chat_id", chatID, "error", releaseErr)
		}
		return nil, err
	}
	return lease, nil
}

// awaitFree returns when it makes sense to try again to take the chat's lock key, or
// when ctx ends. While another Consul session has the key it waits for a change,
// unless too many requests already do; then it polls.
func (s *Store) awaitFree(ctx context.Context, h *heldSession, chatID uuid.UUID, pause time.Duration) error {
	pair, index, err := s.get(ctx, s.keys.lock(chatID), scheduler.Block{})
	if err != nil {
		return err
	}
	if pair == nil || pair.Session == "" || pair.Session == h.session {
		// The key is free now, or has the lock-delay of a Consul session that ended, or
		// our own Consul session is gone. A renewal will show the last case.
		s.session.look()
		return backoff.Sleep(ctx, pause)
	}
	if !s.awaited.TryAcquire(1) {
		return backoff.Sleep(ctx, backoff.Jitter(crowdedPause))
	}
	defer s.awaited.Release(1)
	until, _ := ctx.Deadline()
	_, _, err = s.get(ctx, s.keys.lock(chatID), scheduler.Block{Index: index, Wait: time.Until(until)})
	return err
}

// crowdedPause is the pause between two tries for a lock if too many requests already
// wait for a change.
const crowdedPause = time.Second

// leftoverLock is a lock key that an operation may have left in Consul. The request for it
// got no answer and may have been applied, or may still be.
type leftoverLock struct {
	key   string
	since time.Time
}

// strayLimit is how long a request without an answer may still be applied.
const strayLimit = time.Minute

// abandon makes clearStrays delete a lock key that the lease may have in Consul.
func (s *Store) abandon(h *heldSession, lease *Lease) {
	h.mu.Lock()
	h.leftovers[lease.id] = leftoverLock{key: s.keys.lock(lease.chatID), since: time.Now()} // safeguard: clearing of stray locks
	h.mu.Unlock()
	s.session.look()
}

// clearLeftovers deletes the lock keys that were left behind. It looks for each of them
// again and again, until strayLimit has passed.
func (s *Store) clearLeftovers(ctx context.Context, h *heldSession) {
	h.mu.Lock()
	strays := maps.Clone(h.leftovers)
	h.mu.Unlock()
	if len(strays) == 0 {
		return
	}
	until := h.until() // must not delay the next renewal or the end of the hold
	if limit := time.Now().Add(renewTimeout); limit.Before(until) {
		until = limit
	}
	ctx, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	oldestFirst := func(a, b string) int {
		return cmp.Or(strays[a].since.Compare(strays[b].since), cmp.Compare(a, b))
	}
	for _, id := range slices.SortedFunc(maps.Keys(strays), oldestFirst) {
		left := strays[id]
		if err := s.clearStray(ctx, h, id, left.key); err != nil {
			s.log.Debug("lock_cleanup_failed", "key", left.key, "error", err)
			return
		}
		if time.Since(left.since) > strayLimit {
			h.mu.Lock()
			delete(h.leftovers, id)
			h.mu.Unlock()
		}
	}
}

// clearStray deletes the lock key if it belongs to that lease. It also deletes it if
// somebody overwrote it by hand: then it has our Consul session, but none of our leases
// has the lock.
func (s *Store) clearStray(ctx context.Context, h *heldSession, leaseID, key string) error {
	pair, _, err := s.get(ctx, key, scheduler.Block{})
	if err != nil || pair == nil {
		return err
	}
	if string(pair.Value) != leaseID && (pair.Session != h.session || h.has(key)) {
		return nil // it belongs to another lease
	}
	_, err = s.retryTxn(ctx, &api.KVTxnOp{Verb: api.KVDeleteCAS, Key: key, Index: pair.ModifyIndex})
	if errors.Is(err, errRolledBack) {
		return nil
	}
	return err
}
