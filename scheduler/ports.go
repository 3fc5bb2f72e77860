package scheduler

import (
	"context"
	"time"

	"github.com/google/uuid"
)

// Store reads records. Its errors are the context's, or wrap [ErrUnavailable],
// [ErrDamaged], [ErrNewerRecord], [ErrInvalid] for an invalid query, or [ErrBusy] if
// there are too many blocking reads.
type Store interface {
	// Get returns the chat's record, or nil if there is none. It is linearizable: it
	// sees every write that ended before it began.
	//
	// If block.Index is set, Get returns once the record has changed since that index,
	// or after block.Wait. It may also return earlier, so the caller must compare. The
	// returned index is for the next call and is never 0.
	Get(ctx context.Context, chatID uuid.UUID, block Block) (*Session, uint64, error)

	// List returns one page of records, in an order that does not change while a record
	// exists. It loads no more than the page needs. It blocks like Get, on all records
	// that the query selects.
	List(ctx context.Context, query Query) (Page, error)

	// Scan returns all records of some shards, from one shard on, and the shard after
	// them. It reads as many shards as have some thousand records together, and at least
	// one. A store has [Shards] of them. It may be stale.
	Scan(ctx context.Context, shard int) (part Part, next int, err error)

	// Expired returns at most limit sessions with ExpiresAt <= now, the longest expired
	// first as far as the store's index shows. It returns no intents (StateCreating).
	// Its cost grows with the number of expired sessions, not of all records. It may be
	// stale: read the record again under the chat's lock before you act.
	Expired(ctx context.Context, now time.Time, limit int) ([]Session, error)

	// InFlight returns the records in StateCreating or StateStopping. Its cost grows
	// with their number. It may be stale.
	InFlight(ctx context.Context) ([]Session, error)

	// Count returns the number of sessions, without intents.
	Count(ctx context.Context) (int, error)
	// CountAgents returns the number of records of the AI agents whose ID has the
	// prefix, intents included. The empty prefix counts all records. Its cost grows
	// with the number of all records, but it reads few of them.
	CountAgents(ctx context.Context, prefix string) (int, error)

	// Changes returns the kept changes whose index is greater than after, in the order
	// of their indexes. It returns all changes of a transaction or none of them. If
	// there is no such change, Changes waits for one, at most as long as wait says, and
	// then returns none. It returns ErrIndexTooOld if a change with a greater index may
	// have been dropped, or if after is an index of another store. With after 0 it
	// returns all changes that are kept.
	Changes(ctx context.Context, after uint64, wait time.Duration) ([]Change, error)

	// NoteChange stores a change that belongs to no write of a record.
	NoteChange(ctx context.Context, change Change) error

	// Spares returns all spares, by session ID. It blocks like Get, on all of them.
	Spares(ctx context.Context, block Block) ([]Spare, uint64, error)
	// FindSpare returns the spare with a session ID, or nil if there is none. If it has
	// been claimed, FindSpare returns nil and the chat whose session it is. Both come
	// from one linearizable read.
	FindSpare(ctx context.Context, sessionID uuid.UUID) (spare *Spare, chatID uuid.UUID, err error)
	// PutSpare writes a spare if its record is still the one with spare.Version, and
	// returns it with the new Version. Otherwise it returns ErrSpareTaken. If the
	// outcome of the request is unknown, PutSpare finds it out, as RemoveSpare does.
	PutSpare(ctx context.Context, spare Spare) (Spare, error)
	// RemoveSpare removes a spare if its record is still the one with spare.Version, or
	// is gone. Otherwise it returns ErrSpareTaken.
	RemoveSpare(ctx context.Context, spare Spare) error
}

// Block makes a read wait for a change.
type Block struct {
	Index uint64        // 0: do not wait
	Wait  time.Duration // at most this long; 0 means the store's default, 5 minutes
}

// Query selects a page of records.
type Query struct {
	AgentID   string // empty: the sessions of all AI agents
	PerPage   int    // 1 to MaxPerPage
	NextToken string // from the page before; empty: the first page. A token that is not the store's gives ErrInvalid
	Block     Block
	// Include selects sessions; nil: all. Pages are full of selected sessions, and
	// tokens show no others.
	Include func(Session) bool
}

// MaxPerPage is the maximum number of sessions on a page.
const MaxPerPage = 1000

// Shards is the number of parts of a store. A chat's record is always in the same one.
const Shards = 256

// Part is what some shards of a store contain.
type Part struct {
	Sessions []Session
	Damaged  []DamagedRecord
}

// Page is one page of a list.
type Page struct {
	Sessions  []Session
	Damaged   []DamagedRecord // records that belong on this page and cannot be read; none if Query has an AgentID
	NextToken string          // empty on the last page
	Index     uint64          // for the next blocking read, never 0
}

// DamagedRecord is a chat's record that cannot be read.
type DamagedRecord struct {
	ChatID uuid.UUID
	Err    error // wraps ErrDamaged or ErrNewerRecord
}

// Locker has one lock per chat, across all replicas.
type Locker interface {
	// Lock takes the chat's lock and reads its record in one atomic step. It waits at
	// most wait for another holder, without polling, and then returns ErrLockTimeout.
	// With wait 0 it only tries. It returns ErrDamaged if the record cannot be read,
	// and ErrNewerRecord if only a newer version may read it.
	Lock(ctx context.Context, chatID uuid.UUID, wait time.Duration) (Lease, error)

	// LockDamaged is like Lock, but also takes the lock of a chat with a damaged
	// record. Then the lease's Session is nil, and its first Write replaces or removes
	// the damaged record, if that has not changed since the lock was taken.
	LockDamaged(ctx context.Context, chatID uuid.UUID, wait time.Duration) (Lease, error)
}

// Lease is a held lock of a chat. One goroutine at a time may use it, except for Lost,
// which may be called concurrently.
type Lease interface {
	// Session returns the record as it was when the lock was taken, or as last written
	// through this lease. It returns nil if there is none.
	Session() *Session

	// Lost returns a channel that is closed once the lock may be lost. If the lock may
	// be lost when Lost is called, the returned channel is closed already. An operation
	// must then stop before its next effect.
	Lost() <-chan struct{}

	// Write replaces the record by next, or removes it if next is nil, in one step with
	// its index entries. It does so only while the lock is held and the record is the
	// one that this lease knows. Otherwise it writes nothing and returns ErrLockLost. If
	// the outcome of a request is unknown, Write finds it out; ErrUnavailable means that
	// it could not. If then is Release, a successful Write releases the lock in the same
	// step.
	//
	// Fields that a newer version added to the record are kept if next is the same
	// session, and dropped if it is another one.
	//
	// The changes are stored in the same step. If the record is not written, they are
	// not stored.
	Write(ctx context.Context, next *Session, then Then, changes ...Change) error

	// Claim is Write with Keep, and also removes the record of a spare in the same step.
	// If that record is no longer the one with spare.Version, Claim writes nothing and
	// returns ErrSpareTaken. The lease is then as before.
	Claim(ctx context.Context, next *Session, spare Spare, changes ...Change) error

	// Release releases the lock. It does nothing if the lock is already released. After
	// an error the lock ends with the replica's hold on it, so the caller need not do
	// anything.
	Release(ctx context.Context) error
}

// Then is what happens to a lock after a write.
type Then int

// The values of Then.
const (
	Keep Then = iota
	Release
)
