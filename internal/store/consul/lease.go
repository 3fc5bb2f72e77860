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

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/scheduler"
)

// maxWrites bounds the tries of a write whose outcome is unknown.
const maxWrites = 4

// Lease is a [scheduler.Lease].
//
// The value of its lock key is the lease's ID, and every write checks the key's
// ModifyIndex. The check succeeds only if the key is unchanged since this lease wrote
// it, and so still has this replica's Consul session. It also tells two leases of one
// Consul session apart.
type Lease struct {
	store     *Store
	hold      *heldSession
	chatID    uuid.UUID
	id        string
	lockIndex uint64
	// unanswered is true if a request for the lock got no answer, so that it may
	// still be applied.
	unanswered bool
	lost       chan struct{} // closed by hold
	unlock     func()        // unlocks the chat's mutex in this replica
	released   bool

	session *scheduler.Session // nil: no record
	value   []byte             // of session's record
	index   uint64             // the record's ModifyIndex, 0 if there is none

	// unknownWrites are writes whose outcome is unknown. At most one of them was or will be
	// applied, because all compare with the same index.
	unknownWrites []*write
}

// write is one write to be made.
type write struct {
	id    string
	next  *scheduler.Session // the session as a read returns it; nil removes the record
	value []byte
	then  scheduler.Then
	note  note             // its changes
	spare *scheduler.Spare // whose record it removes; may be nil
}

// Session implements [scheduler.Lease].
func (l *Lease) Session() *scheduler.Session {
	if l.session == nil {
		return nil
	}
	session := *l.session
	return &session
}

// Lost implements [scheduler.Lease]. It looks at the clock, because the goroutine that
// closes the channel in time may have been suspended too.
func (l *Lease) Lost() <-chan struct{} {
	if l.hold.over() {
		l.hold.lose(l)
	}
	return l.lost
}

// Write implements [scheduler.Lease].
func (l *Lease) Write(ctx context.Context, next *scheduler.Session, then scheduler.Then, changes ...scheduler.Change) error {
	return l.begin(ctx, &write{id: rand.Text(), then: then}, next, changes)
}

// Claim implements [scheduler.Lease].
func (l *Lease) Claim(ctx context.Context, next *scheduler.Session, spare scheduler.Spare, changes ...scheduler.Change) error {
	return l.begin(ctx, &write{id: rand.Text(), then: scheduler.Keep, spare: &spare}, next, changes)
}

// begin completes w and sends it.
func (l *Lease) begin(ctx context.Context, w *write, next *scheduler.Session, changes []scheduler.Change) error {
	err := ctx.Err()
	if err == nil && next != nil {
		err = l.encode(w, *next)
	}
	if err == nil {
		w.note, err = newNote(w.id, changes)
	}
	if err == nil && w.note.value != nil {
		err = l.store.changes.moved(ctx, 0)
	}
	if err == nil {
		err = l.write(ctx, w) // safeguard: one step for a record and its changes
	}
	if err != nil {
		return fmt.Errorf("consul: write chat %s: %w", l.chatID, err)
	}
	return nil
}

// encode makes w the write of a session's record. What a newer version wrote into the
// record of the same session stays in it.
func (l *Lease) encode(w *write, next scheduler.Session) (err error) {
	if next.ChatID != l.chatID {
		return fmt.Errorf("%w: record of chat %s", scheduler.ErrInvalid, next.ChatID)
	}
	var newer *newerPart
	if l.session != nil && l.session.SessionID == next.SessionID {
		if newer, err = newerPartOf(l.value); err != nil {
			return fmt.Errorf("%w: %w", scheduler.ErrDamaged, err)
		}
	}
	w.value, w.next, err = encodeRecord(next, w.id, newer)
	return err
}

// write sends w. If the answer is lost, it finds out whether w was applied.
func (l *Lease) write(ctx context.Context, w *write) error {
	pause := backoff.Backoff{Min: 50 * time.Millisecond, Max: time.Second}
	for tries, moves := 1, 0; ; tries++ {
		if !l.hold.holds(l) {
			return l.outOfHold()
		}
		pairs, err := l.try(ctx, w)
		if moved, ok := errors.AsType[*movedError](err); ok && moves < maxMoves {
			if err := l.store.follow(ctx, moved); err != nil {
				return err // this try wrote nothing; whether an earlier one did is not known
			}
			tries, moves = tries-1, moves+1
			continue
		}
		switch {
		case err == nil:
			return l.adopt(w, pairs)
		case errors.Is(err, scheduler.ErrSpareTaken) && len(l.unknownWrites) == 0:
			return err
		case errors.Is(err, errRolledBack) && len(l.unknownWrites) == 0:
			l.lose()
			return fmt.Errorf("%w: %w", scheduler.ErrLockLost, err)
		case isBusy(err), isMoved(err): // for too long
			return fmt.Errorf("%w: %s", scheduler.ErrUnavailable, err.Error())
		case !isRefused(err) && !slices.Contains(l.unknownWrites, w):
			l.unknownWrites = append(l.unknownWrites, w)
		}

		applied, settleErr := l.settle(ctx) // safeguard: look after an unknown outcome
		switch {
		case settleErr != nil:
			return settleErr
		case applied == w:
			return nil
		case errors.Is(err, scheduler.ErrSpareTaken):
			return err // a try whose outcome was unknown cannot be applied any more either
		case tries >= maxWrites || ctx.Err() != nil:
			return fmt.Errorf("%w: not written after %d tries: %s", scheduler.ErrUnavailable, tries, err.Error())
		}
		_ = backoff.Sleep(ctx, pause.Next())
	}
}

// isRefused reports whether a transaction is known to have changed nothing.
func isRefused(err error) bool {
	return errors.Is(err, errRolledBack) || errors.Is(err, scheduler.ErrSpareTaken)
}

// outOfHold returns the error of a write that is no longer sent. It is ErrLockLost,
// which means that nothing was written, only if no write is in doubt.
func (l *Lease) outOfHold() error {
	if len(l.unknownWrites) > 0 {
		return fmt.Errorf("%w: the lock was lost while a write was unanswered", scheduler.ErrUnavailable)
	}
	return scheduler.ErrLockLost
}

// try sends the transaction of w until Consul does not answer 429. A transaction that
// got status 429 is not applied and not in doubt.
func (l *Lease) try(ctx context.Context, w *write) ([]*api.KVPair, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	pause := backoff.Backoff{Min: 50 * time.Millisecond, Max: time.Second}
	for {
		pairs, err := l.store.txn(ctx, l.ops(w)...)
		if !isBusy(err) || backoff.Sleep(ctx, pause.Next()) != nil || !l.hold.holds(l) {
			return pairs, err
		}
	}
}

// ops returns the operations of w. They check the lock and the identity, compare and
// set the record, set its index entries, delete those that it no longer has, remove the spare,
// and store the changes.
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
	if w.spare != nil {
		key := keys.spare(w.spare.SessionID)
		// Consul lets a delete-cas of a key that is gone pass.
		ops = append(ops, &api.KVTxnOp{Verb: api.KVCheckIndex, Key: key, Index: w.spare.Version}) // safeguard: check of the spare with the intent
		ops = append(ops, &api.KVTxnOp{Verb: api.KVDelete, Key: key})                             // safeguard: spare removed with the intent
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
	ops = append(ops, l.store.changes.ops(&w.note)...) // safeguard: changes in the transaction of their record
	if w.then == scheduler.Release {
		ops = append(ops, &api.KVTxnOp{Verb: api.KVDeleteCAS, Key: keys.lock(l.chatID), Index: l.lockIndex}) // safeguard: fence
	}
	return ops
}

// adopt records that w was applied, with the index from the answer.
func (l *Lease) adopt(w *write, pairs []*api.KVPair) error {
	var index uint64
	if w.next != nil {
		pair, err := pick(pairs, l.store.keys.record(l.chatID))
		if err != nil {
			l.unknownWrites = append(l.unknownWrites, w) // written, but its index is not known
			return err
		}
		index = pair.ModifyIndex
	}
	l.applied(w, index)
	return nil
}

func (l *Lease) applied(w *write, index uint64) {
	l.session, l.value, l.index, l.unknownWrites = w.next, w.value, index, nil
	if w.then == scheduler.Release {
		l.end()
	}
}

// settle finds out which of the writes in doubt was applied. It returns nil if none
// was so far, and ErrLockLost if none was and none can be any more. It continues after
// the caller has given up, because an applied write must not look as if it had failed.
func (l *Lease) settle(ctx context.Context) (*write, error) {
	ctx = context.WithoutCancel(ctx)
	lockKey, recordKey := l.store.keys.lock(l.chatID), l.store.keys.record(l.chatID)
	ops := []*api.KVTxnOp{{Verb: api.KVGetOrEmpty, Key: lockKey}, {Verb: api.KVGetOrEmpty, Key: recordKey}}
	for _, w := range l.unknownWrites {
		for _, key := range w.note.tried {
			ops = append(ops, &api.KVTxnOp{Verb: api.KVGetOrEmpty, Key: key})
		}
	}
	pairs, err := l.store.retryTxn(ctx, ops...)
	if err != nil {
		return nil, fmt.Errorf("the outcome of a write is unknown: %w", err)
	}
	locked, lockErr := pick(pairs, lockKey)
	stands, recordErr := pick(pairs, recordKey)
	if err := errors.Join(lockErr, recordErr); err != nil {
		return nil, err
	}

	var writeID string
	if stands.ModifyIndex != 0 && stands.ModifyIndex != l.index { // otherwise none was applied
		if _, writeID, err = decodeRecord(recordKey, l.chatID, stands.Value); err != nil {
			return nil, err
		}
	}
	for _, w := range l.unknownWrites {
		gone := w.next == nil && l.index != 0 && stands.ModifyIndex == 0
		noted := w.next == nil && l.index == 0 && w.note.isIn(pairs) // it has no record that could show it
		if gone || noted || w.next != nil && w.id == writeID {
			l.applied(w, stands.ModifyIndex)
			return w, nil
		}
	}
	if locked.ModifyIndex != l.lockIndex || stands.ModifyIndex != l.index {
		l.lose()
		l.unknownWrites = nil
		return nil, fmt.Errorf("%w: while a write was unanswered", scheduler.ErrLockLost)
	}
	return nil, nil
}

// readRecord sets a lease's record from the answer to its first transaction.
type readRecord func(*Lease, []*api.KVPair) error

// readDamaged is like read, but accepts a damaged record. Then the lease has the
// record's index and no session.
func (l *Lease) readDamaged(pairs []*api.KVPair) error {
	if err := l.read(pairs); err != nil && !errors.Is(err, scheduler.ErrDamaged) {
		return err
	}
	return nil
}

// read sets the lease's session and index from the record.
func (l *Lease) read(pairs []*api.KVPair) error {
	key := l.store.keys.record(l.chatID)
	pair, err := pick(pairs, key)
	if err != nil || pair.ModifyIndex == 0 {
		return err
	}
	l.index = pair.ModifyIndex
	session, _, err := decodeRecord(key, l.chatID, pair.Value)
	if err != nil {
		return err
	}
	l.session, l.value = session, pair.Value
	return nil
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

// giveUp deletes the lock key, unless it belongs to another lease by now.
func (l *Lease) giveUp(ctx context.Context) error {
	if !l.hold.remove(l) {
		return nil // the lock was lost before
	}
	key := l.store.keys.lock(l.chatID)
	_, err := l.store.retryTxn(ctx, &api.KVTxnOp{Verb: api.KVDeleteCAS, Key: key, Index: l.lockIndex})
	if err == nil {
		return nil
	}
	l.store.abandon(l.hold, l)
	if errors.Is(err, errRolledBack) {
		return nil // it belongs to another lease by now, or was overwritten by hand
	}
	return err
}

// lose gives up a lock after somebody else wrote its key or the record. If it was the
// record, the lock key may still exist.
func (l *Lease) lose() {
	l.hold.lose(l)
	l.store.abandon(l.hold, l)
}

// end ends the lease and unlocks the chat for the next operation of this replica.
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
