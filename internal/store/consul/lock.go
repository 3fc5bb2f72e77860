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

// lock takes the chat's lock, with the record as read takes it over.
func (s *Store) lock(ctx context.Context, chatID uuid.UUID, wait time.Duration, read readRecord) (scheduler.Lease, error) {
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

// lockKey takes the chat's lock key from the other replicas.
func (s *Store) lockKey(ctx context.Context, chatID uuid.UUID, wait time.Duration, until time.Time, read readRecord) (*Lease, error) {
	waiting, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	pause := newBackOff(2*time.Millisecond, 200*time.Millisecond)
	for {
		hold, err := s.session.current(ctx)
		if err != nil {
			return nil, err
		}
		lease, refused := s.tryLock(ctx, hold, chatID, read)
		if moved, ok := errors.AsType[*movedError](refused); ok {
			if err := s.identity.moved(ctx, moved.index); err != nil {
				return nil, err
			}
			continue
		}
		if !errors.Is(refused, errRolledBack) {
			return lease, refused
		}
		if wait > 0 {
			err = s.awaitFree(waiting, hold, chatID, pause.NextBackOff())
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

// tryLock takes the lock key and reads the record, in one transaction. It
// returns errRolledBack where the key is not to be had now, and a movedError
// where the identity is another or gone.
func (s *Store) tryLock(ctx context.Context, h *hold, chatID uuid.UUID, read readRecord) (*Lease, error) {
	lease := &Lease{store: s, hold: h, chatID: chatID, id: rand.Text(), lost: make(chan struct{})}
	if !h.add(lease) {
		return nil, fmt.Errorf("%w: the hold just ended", errRolledBack)
	}
	lockKey, recordKey := s.keys.lock(chatID), s.keys.record(chatID)
	// Repeated by the same lease it changes nothing.
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
			s.abandon(h, lease) // a try may have been applied, or will be
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
			s.log.Warn("a lock is left behind for now", "chat_id", chatID, "error", releaseErr)
		}
		return nil, err
	}
	return lease, nil
}

// awaitFree returns when it is worth trying again to take the chat's lock key,
// or when ctx ends. It does not poll while another session holds the key, unless
// too many locks are waited for.
func (s *Store) awaitFree(ctx context.Context, h *hold, chatID uuid.UUID, pause time.Duration) error {
	pair, index, err := s.get(ctx, s.keys.lock(chatID), scheduler.Block{})
	if err != nil {
		return err
	}
	if pair == nil || pair.Session == "" || pair.Session == h.session {
		// Freed since, or under the lock-delay of a session that ended; or our
		// own session is gone, which a renewal will tell.
		s.session.look()
		return sleep(ctx, pause)
	}
	if !s.awaited.TryAcquire(1) {
		return sleep(ctx, jitter(crowdedPause))
	}
	defer s.awaited.Release(1)
	until, _ := ctx.Deadline()
	_, _, err = s.get(ctx, s.keys.lock(chatID), scheduler.Block{Index: index, Wait: time.Until(until)})
	return err
}

// crowdedPause is after what time a lock is tried again where too many are
// waited for already to be told of this one.
const crowdedPause = time.Second

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// stray is a lock that an operation may have left in Consul: its request may
// have been applied, or may yet be, without anyone having seen the answer.
type stray struct {
	key   string
	since time.Time
}

// strayLimit is after what time a request that got no answer is taken to be
// applied or lost.
const strayLimit = time.Minute

// abandon has a lock cleared that the lease may have in Consul.
func (s *Store) abandon(h *hold, lease *Lease) {
	h.mu.Lock()
	h.strays[lease.id] = stray{key: s.keys.lock(lease.chatID), since: time.Now()} // safeguard: clearing of stray locks
	h.mu.Unlock()
	s.session.look()
}

// clearStrays releases the locks that were left behind. Each is looked for again
// and again until its request can no longer arrive.
func (s *Store) clearStrays(ctx context.Context, h *hold) {
	h.mu.Lock()
	strays := maps.Clone(h.strays)
	h.mu.Unlock()
	if len(strays) == 0 {
		return
	}
	until := h.until() // renewing goes first, and so does telling that the hold is over
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
			s.log.Debug("cannot clear a lock that was left behind", "key", left.key, "error", err)
			return
		}
		if time.Since(left.since) > strayLimit {
			h.mu.Lock()
			delete(h.strays, id)
			h.mu.Unlock()
		}
	}
}

// clearStray releases the lock at key if it is the one of that lease, or if somebody
// overwrote it by hand: then it is our session's, and no lease of ours has it.
func (s *Store) clearStray(ctx context.Context, h *hold, leaseID, key string) error {
	pair, _, err := s.get(ctx, key, scheduler.Block{})
	if err != nil || pair == nil {
		return err
	}
	if string(pair.Value) != leaseID && (pair.Session != h.session || h.has(key)) {
		return nil // another's
	}
	_, err = s.retryTxn(ctx, &api.KVTxnOp{Verb: api.KVDeleteCAS, Key: key, Index: pair.ModifyIndex})
	if errors.Is(err, errRolledBack) {
		return nil
	}
	return err
}
