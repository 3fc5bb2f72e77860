package consul

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/scheduler"
)

// maxWrites bounds how often a write is tried whose outcome was unknown.
const maxWrites = 4

// Lease is a [scheduler.Lease].
//
// Its lock key holds the lease's ID, and every write checks the key's
// ModifyIndex. That holds only while the key has stood there untouched, with
// our session on it, since this lease made it: it is a check of the session
// that also tells two leases of one session apart.
type Lease struct {
	store     *Store
	hold      *hold
	chatID    uuid.UUID
	id        string
	lockIndex uint64
	// unanswered: a request for the lock got no answer, and may yet arrive.
	unanswered bool
	lost       chan struct{} // closed by hold
	unlock     func()        // the chat's mutex in this replica
	released   bool

	session *scheduler.Session // nil: no record
	index   uint64             // the record's ModifyIndex, 0 where there is none

	// doubts are writes whose outcome is unknown: one of them may have been
	// applied, or may yet be, since they all compare with the same index.
	doubts []*write
}

// write is one write to be made.
type write struct {
	id    string
	next  *scheduler.Session // as it will be read; nil: remove the record
	value []byte
	then  scheduler.Then
}

// Session implements [scheduler.Lease].
func (l *Lease) Session() *scheduler.Session {
	if l.session == nil {
		return nil
	}
	session := *l.session
	return &session
}

// Lost implements [scheduler.Lease]. It asks the clock, since who would close
// the channel in time may have been asleep, too.
func (l *Lease) Lost() <-chan struct{} {
	if l.hold.over() {
		l.hold.lose(l)
	}
	return l.lost
}

// Write implements [scheduler.Lease].
func (l *Lease) Write(ctx context.Context, next *scheduler.Session, then scheduler.Then) error {
	w := &write{id: rand.Text(), then: then}
	err := ctx.Err()
	if err == nil && next != nil {
		if next.ChatID != l.chatID {
			err = fmt.Errorf("%w: record of chat %s", scheduler.ErrInvalid, next.ChatID)
		} else {
			w.value, w.next, err = encodeRecord(*next, w.id)
		}
	}
	if err == nil {
		err = l.write(ctx, w)
	}
	if err != nil {
		return fmt.Errorf("consul: write chat %s: %w", l.chatID, err)
	}
	return nil
}

// write makes w, and finds out what became of it where the answer was lost.
func (l *Lease) write(ctx context.Context, w *write) error {
	pause := newBackOff(50*time.Millisecond, time.Second)
	for tries := 1; ; tries++ {
		if !l.hold.holds(l) {
			return l.outOfHold()
		}
		pairs, err := l.try(ctx, w)
		if moved, ok := errors.AsType[*movedError](err); ok {
			if err := l.store.identity.moved(ctx, moved.index); err != nil {
				return err // nothing of this try was written; of an earlier one it is not known
			}
			continue
		}
		switch {
		case err == nil:
			return l.adopt(w, pairs)
		case errors.Is(err, errRolledBack) && len(l.doubts) == 0:
			l.lose()
			return fmt.Errorf("%w: %w", scheduler.ErrLockLost, err)
		case isBusy(err): // for long
			return fmt.Errorf("%w: %s", scheduler.ErrUnavailable, err.Error())
		case !errors.Is(err, errRolledBack) && !slices.Contains(l.doubts, w):
			l.doubts = append(l.doubts, w)
		}

		applied, settleErr := l.settle(ctx) // safeguard: look after an unknown outcome
		switch {
		case settleErr != nil:
			return settleErr
		case applied == w:
			return nil
		case tries >= maxWrites || ctx.Err() != nil:
			return fmt.Errorf("%w: not written by %d tries: %s", scheduler.ErrUnavailable, tries, err.Error())
		}
		select {
		case <-time.After(pause.NextBackOff()):
		case <-ctx.Done():
		}
	}
}

// outOfHold is the error of a write that is not sent any more. That nothing was
// written can only be said where nothing is in doubt.
func (l *Lease) outOfHold() error {
	if len(l.doubts) > 0 {
		return fmt.Errorf("%w: the lock was lost while a write was unanswered", scheduler.ErrUnavailable)
	}
	return scheduler.ErrLockLost
}

// try sends the transaction of w until Consul looks at it: what it turns away
// with 429 is neither applied nor in doubt.
func (l *Lease) try(ctx context.Context, w *write) ([]*api.KVPair, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	pause := newBackOff(50*time.Millisecond, time.Second)
	for {
		pairs, err := l.store.txn(ctx, l.ops(w)...)
		if !isBusy(err) || sleep(ctx, pause.NextBackOff()) != nil || !l.hold.holds(l) {
			return pairs, err
		}
	}
}

// ops are the operations of w: the lock and the identity are checked, the record
// compared and set, its index entries set, and those that it no longer has deleted.
func (l *Lease) ops(w *write) []*api.KVTxnOp {
	keys := l.store.keys
	ops := []*api.KVTxnOp{{Verb: api.KVCheckIndex, Key: keys.lock(l.chatID), Index: l.lockIndex}} // safeguard: fence
	ops = append(ops, l.store.identity.unmoved())                                                 // safeguard: identity check of writes
	switch {
	case w.next != nil:
		ops = append(ops, &api.KVTxnOp{Verb: api.KVCAS, Key: keys.record(l.chatID), Index: l.index, Value: w.value}) // safeguard: fence
	case l.index != 0:
		ops = append(ops, &api.KVTxnOp{Verb: api.KVDeleteCAS, Key: keys.record(l.chatID), Index: l.index}) // safeguard: fence
	}
	before, after := keys.index(l.session, ""), keys.index(w.next, w.id)
	for key := range before {
		if _, stays := after[key]; !stays {
			ops = append(ops, &api.KVTxnOp{Verb: api.KVDelete, Key: key})
		}
	}
	for key, value := range after {
		ops = append(ops, &api.KVTxnOp{Verb: api.KVSet, Key: key, Value: []byte(value)})
	}
	if w.next != nil || l.index != 0 {
		ops = append(ops, &api.KVTxnOp{Verb: api.KVSet, Key: keys.changed(), Value: []byte(w.id)})
	}
	if w.then == scheduler.Release {
		ops = append(ops, &api.KVTxnOp{Verb: api.KVDeleteCAS, Key: keys.lock(l.chatID), Index: l.lockIndex}) // safeguard: fence
	}
	return ops
}

// adopt takes w over as what stands, from the answer to its transaction.
func (l *Lease) adopt(w *write, pairs []*api.KVPair) error {
	var index uint64
	if w.next != nil {
		pair, err := pick(pairs, l.store.keys.record(l.chatID))
		if err != nil {
			l.doubts = append(l.doubts, w) // written, but it is not known where
			return err
		}
		index = pair.ModifyIndex
	}
	l.applied(w, index)
	return nil
}

func (l *Lease) applied(w *write, index uint64) {
	l.session, l.index, l.doubts = w.next, index, nil
	if w.then == scheduler.Release {
		l.end()
	}
}

// settle finds out which of the writes in doubt was applied, nil for none so
// far. It does so also when the caller has given up, as a write that was made
// must not look as if it was not. It fails with ErrLockLost where none was
// applied and none can be any more.
func (l *Lease) settle(ctx context.Context) (*write, error) {
	ctx = context.WithoutCancel(ctx)
	lockKey, recordKey := l.store.keys.lock(l.chatID), l.store.keys.record(l.chatID)
	pairs, err := l.store.retryTxn(ctx,
		&api.KVTxnOp{Verb: api.KVGetOrEmpty, Key: lockKey},
		&api.KVTxnOp{Verb: api.KVGetOrEmpty, Key: recordKey})
	if err != nil {
		return nil, fmt.Errorf("the outcome of a write is unknown: %w", err)
	}
	locked, lockErr := pick(pairs, lockKey)
	stands, recordErr := pick(pairs, recordKey)
	if err := errors.Join(lockErr, recordErr); err != nil {
		return nil, err
	}

	var writeID string
	if stands.ModifyIndex != 0 && stands.ModifyIndex != l.index { // else none was applied
		if _, writeID, err = decodeRecord(recordKey, l.chatID, stands.Value); err != nil {
			return nil, err
		}
	}
	for _, w := range l.doubts {
		gone := w.next == nil && l.index != 0 && stands.ModifyIndex == 0
		if gone || w.next != nil && w.id == writeID {
			l.applied(w, stands.ModifyIndex)
			return w, nil
		}
	}
	if locked.ModifyIndex != l.lockIndex || stands.ModifyIndex != l.index {
		l.lose()
		l.doubts = nil
		return nil, fmt.Errorf("%w: while a write was unanswered", scheduler.ErrLockLost)
	}
	return nil, nil
}

// readRecord is what a lease does with the record that its first transaction read.
type readRecord func(*Lease, []*api.KVPair) error

// readDamaged does as read, but a record that cannot be understood is no error:
// the lease knows its index, and no session.
func (l *Lease) readDamaged(pairs []*api.KVPair) error {
	if err := l.read(pairs); err != nil && !errors.Is(err, scheduler.ErrDamaged) {
		return err
	}
	return nil
}

// read takes over the record that the lease's first transaction read.
func (l *Lease) read(pairs []*api.KVPair) error {
	key := l.store.keys.record(l.chatID)
	pair, err := pick(pairs, key)
	if err != nil || pair.ModifyIndex == 0 {
		return err
	}
	l.index = pair.ModifyIndex
	l.session, _, err = decodeRecord(key, l.chatID, pair.Value)
	return err
}

// Release implements [scheduler.Lease].
func (l *Lease) Release(ctx context.Context) error {
	if l.released {
		return nil
	}
	defer l.end()
	if err := l.giveUp(ctx); err != nil {
		return fmt.Errorf("consul: release chat %s: %w", l.chatID, err)
	}
	return nil
}

// giveUp deletes the lock key, unless it is another's by now.
func (l *Lease) giveUp(ctx context.Context) error {
	if !l.hold.remove(l) {
		return nil // it went with the session, or was taken away
	}
	key := l.store.keys.lock(l.chatID)
	_, err := l.store.retryTxn(ctx, &api.KVTxnOp{Verb: api.KVDeleteCAS, Key: key, Index: l.lockIndex})
	if err == nil {
		return nil
	}
	l.store.abandon(l.hold, l)
	if errors.Is(err, errRolledBack) {
		return nil // another's by now, or overwritten by hand
	}
	return err
}

// lose gives up a lock under which somebody else wrote. Its key may still stand,
// where it was the record that was written.
func (l *Lease) lose() {
	l.hold.lose(l)
	l.store.abandon(l.hold, l)
}

// end lets the next operation of this replica have the chat.
func (l *Lease) end() {
	l.released = true
	l.hold.remove(l)
	if l.unanswered {
		l.store.abandon(l.hold, l)
	}
	if l.unlock != nil {
		l.unlock()
	}
}
