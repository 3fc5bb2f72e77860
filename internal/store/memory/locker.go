package memory

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/scheduler"
)

// Locker is a [scheduler.Locker] for one replica over a [Store]. Several lockers
// over one store behave like several replicas. Make one with [NewLocker].
type Locker struct {
	store  *Store
	leases map[*lease]struct{} // under the store's mu
}

// NewLocker returns a replica's locker over the records in store.
func NewLocker(store *Store) *Locker {
	return &Locker{store: store, leases: make(map[*lease]struct{})}
}

// End takes away all locks that the replica holds, as if it had been cut off for
// too long. The replica may take new ones afterwards.
func (l *Locker) End() {
	l.store.mu.Lock()
	defer l.store.mu.Unlock()
	for held := range l.leases {
		held.drop()
		close(held.lost)
	}
}

// Lock implements [scheduler.Locker].
func (l *Locker) Lock(ctx context.Context, chatID uuid.UUID, wait time.Duration) (scheduler.Lease, error) {
	return l.lock(ctx, chatID, wait, false)
}

// LockDamaged implements [scheduler.Locker].
func (l *Locker) LockDamaged(ctx context.Context, chatID uuid.UUID, wait time.Duration) (scheduler.Lease, error) {
	return l.lock(ctx, chatID, wait, true)
}

// lock takes the chat's lock. That of a chat whose record is damaged it takes
// only if damaged is set.
func (l *Locker) lock(ctx context.Context, chatID uuid.UUID, wait time.Duration, damaged bool) (scheduler.Lease, error) {
	unlock, err := l.store.locks.Lock(ctx, chatID, wait)
	if err != nil {
		return nil, fmt.Errorf("memory: lock chat %s: %w", chatID, err)
	}
	l.store.mu.Lock()
	defer l.store.mu.Unlock()
	held := &lease{locker: l, chatID: chatID, unlock: unlock, lost: make(chan struct{})}
	switch r, ok := l.store.records[chatID]; {
	case ok && r.unread == nil:
		held.session = &r.session
	case r.unread != nil && (!damaged || !errors.Is(r.unread, scheduler.ErrDamaged)):
		unlock()
		return nil, fmt.Errorf("memory: lock chat %s: %w", chatID, r.unread)
	}
	l.leases[held] = struct{}{}
	return held, nil
}

// lease is a [scheduler.Lease]. While it is among its locker's leases nobody else
// can write the chat's record, so a write need not compare it first.
type lease struct {
	locker *Locker
	chatID uuid.UUID
	unlock func()
	lost   chan struct{}

	session *scheduler.Session
}

// Session implements [scheduler.Lease].
func (l *lease) Session() *scheduler.Session {
	if l.session == nil {
		return nil
	}
	session := *l.session
	return &session
}

// Lost implements [scheduler.Lease].
func (l *lease) Lost() <-chan struct{} { return l.lost }

// Write implements [scheduler.Lease].
func (l *lease) Write(ctx context.Context, next *scheduler.Session, then scheduler.Then, changes ...scheduler.Change) error {
	if err := l.write(ctx, next, then, nil, changes); err != nil {
		return fmt.Errorf("memory: write chat %s: %w", l.chatID, err)
	}
	return nil
}

// Claim implements [scheduler.Lease].
func (l *lease) Claim(ctx context.Context, next *scheduler.Session, spare scheduler.Spare, changes ...scheduler.Change) error {
	if err := l.write(ctx, next, scheduler.Keep, &spare, changes); err != nil {
		return fmt.Errorf("memory: claim spare %s for chat %s: %w", spare.SessionID, l.chatID, err)
	}
	return nil
}

func (l *lease) write(ctx context.Context, next *scheduler.Session, then scheduler.Then, spare *scheduler.Spare, changes []scheduler.Change) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if next != nil {
		if next.ChatID != l.chatID {
			return fmt.Errorf("%w: record of chat %s", scheduler.ErrInvalid, next.ChatID)
		}
		plain := *next
		plain.CreatedAt = plain.CreatedAt.Round(0).UTC() // as any store returns it
		plain.ExpiresAt = plain.ExpiresAt.Round(0).UTC()
		next = &plain
	}

	store := l.locker.store
	store.mu.Lock()
	defer store.mu.Unlock()
	if _, held := l.locker.leases[l]; !held {
		return scheduler.ErrLockLost
	}
	if spare != nil {
		if stands, ok := store.spares[spare.SessionID]; !ok || stands.Version != spare.Version {
			return scheduler.ErrSpareTaken
		}
		delete(store.spares, spare.SessionID)
		defer func() { store.sparesIndex = store.index }()
	}
	switch _, stands := store.records[l.chatID]; {
	case next != nil || stands:
		store.put(l.chatID, next)
	case len(changes) > 0:
		store.index++
	}
	store.keep(changes...)
	store.changed.Broadcast()
	l.session = next
	if then == scheduler.Release {
		l.drop()
	}
	return nil
}

// Release implements [scheduler.Lease].
func (l *lease) Release(context.Context) error {
	l.locker.store.mu.Lock()
	defer l.locker.store.mu.Unlock()
	l.drop()
	return nil
}

// drop gives the lock up. The caller holds the store's mu.
func (l *lease) drop() {
	delete(l.locker.leases, l)
	l.unlock()
}
