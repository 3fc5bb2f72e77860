package scheduler

import (
	"context"
	"time"

	"github.com/google/uuid"
)

// Store reads records. Its errors are the context's, or wrap [ErrUnavailable],
// [ErrDamaged], [ErrNewerRecord], [ErrInvalid] for a query that makes no sense, or [ErrBusy] for a
// blocking read beside too many others.
type Store interface {
	// Get returns the chat's record, or nil where there is none. It is
	// linearizable: it sees every write that ended before it began.
	//
	// With block.Index set it returns once the record has changed since that
	// index, or after block.Wait, or sooner: a caller compares what it gets.
	// The returned index is for the next call, and is never 0.
	Get(ctx context.Context, chatID uuid.UUID, block Block) (*Session, uint64, error)

	// List returns one page of records, ordered by a key of the store's own
	// that does not change while a record lives. It loads no more than the
	// page needs. Blocking is as for Get, over all records that the query selects.
	List(ctx context.Context, query Query) (Page, error)

	// Expired returns sessions with ExpiresAt <= now, at most limit of them and
	// the longest expired first as far as the store's index tells. Intents
	// (StateCreating) are not among them. Its cost grows with their
	// number, not with that of all records. It may be stale: act only after
	// looking again under the chat's lock.
	Expired(ctx context.Context, now time.Time, limit int) ([]Session, error)

	// InFlight returns the records in StateCreating or StateStopping. Its cost
	// grows with their number. It may be stale.
	InFlight(ctx context.Context) ([]Session, error)

	// Count returns how many sessions there are, intents not counted.
	Count(ctx context.Context) (int, error)
}

// Block asks a read to wait for a change.
type Block struct {
	Index uint64        // 0: do not wait
	Wait  time.Duration // at most this long; 0 means the store's default, 5 minutes
}

// Query selects a page of records.
type Query struct {
	AgentID   string // empty: all agents
	PerPage   int    // 1 to MaxPerPage
	NextToken string // from the page before; empty: the first page. A token that the store did not make gives ErrInvalid
	Block     Block
}

// MaxPerPage bounds a page of a list.
const MaxPerPage = 1000

// Page is one page of a list.
type Page struct {
	Sessions  []Session
	Damaged   []DamagedRecord // records that would lie on this page and cannot be read; not where Query names an agent
	NextToken string          // empty on the last page
	Index     uint64          // for the next blocking read, never 0
}

// DamagedRecord is a chat's record that cannot be read.
type DamagedRecord struct {
	ChatID uuid.UUID
	Err    error // wraps ErrDamaged or ErrNewerRecord
}

// Locker gives out one lock per chat, across all replicas.
type Locker interface {
	// Lock takes the chat's lock and reads its record in one atomic step. It
	// waits at most wait for another holder, without polling, and then returns
	// ErrLockTimeout; with wait 0 it only tries.
	// It returns ErrDamaged if the record cannot be understood, and ErrNewerRecord
	// if only a newer version may read it.
	Lock(ctx context.Context, chatID uuid.UUID, wait time.Duration) (Lease, error)

	// LockDamaged does as Lock does, but takes the lock of a chat with a damaged
	// record too. ErrNewerRecord is returned as by Lock. The lease's Session is nil then, and its first Write replaces or
	// removes the damaged record, if that is still as it was when the lock was
	// taken.
	LockDamaged(ctx context.Context, chatID uuid.UUID, wait time.Duration) (Lease, error)
}

// Lease is a chat's lock, held. One goroutine at a time uses it, except for Lost,
// which may be called at any time and by several.
type Lease interface {
	// Session is the record: as read when the lock was taken, then as last
	// written through this lease. Nil where there is none.
	Session() *Session

	// Lost is closed as soon as the lock can no longer be vouched for, at the
	// latest when Lost is called then. An operation stops before its next effect.
	Lost() <-chan struct{}

	// Write replaces the record by next, or removes it where next is nil, in
	// one step with its index entries, and only while the lock is held and the
	// record is the one that this lease knows; otherwise nothing is
	// written and it returns ErrLockLost. Where the outcome of a request is
	// unknown the lease finds it out; ErrUnavailable means that it could not.
	// With then Release the lock goes in the same step, unless Write fails.
	//
	// What a newer version added to the record is kept if next has the session ID
	// of the record that it replaces, and dropped if it is another session.
	Write(ctx context.Context, next *Session, then Then) error

	// Release gives the lock up; after that, and after a Write that released
	// it, it does nothing. An error means that the lock goes when the
	// replica's hold on it ends, and needs no action.
	Release(ctx context.Context) error
}

// Then says what becomes of a lock after a write.
type Then int

// What becomes of a lock after a write.
const (
	Keep Then = iota
	Release
)
