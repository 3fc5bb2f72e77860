package scheduler

import (
	"cmp"
	"context"
	"strings"
	"time"

	"github.com/google/uuid"
)

// Change is something that happened to a chat's session, or to a spare. The store keeps it
// for a while. That of a session is written in the transaction of the record that it
// belongs to, so that no change is missing and none is invented. There are two exceptions,
// which belong to no write of a record: a conflict, and a sandbox without a record that was
// stopped. These and the changes of spares may be missing.
type Change struct {
	// Index is that of the store's transaction. The store sets it. Indexes rise, and the
	// changes of one transaction have the same.
	Index     uint64
	Type      ChangeType
	Time      time.Time
	Pool      string    // of a spare; empty for a session
	ChatID    uuid.UUID // zero for a spare
	SessionID uuid.UUID
	AgentID   string // empty for a spare
	Runtime   string
	Reason    string // why, for a person to read; may be empty
	Caller    string // name of who caused it
	RequestID string // empty if no request caused it
}

// maxChangeReason bounds a change's reason, in bytes. It may quote what a sandbox printed.
const maxChangeReason = 4096

// Plain returns the change as a store keeps it: with its time in UTC, and with a reason of
// valid UTF-8 and at most 4 KiB.
func (c Change) Plain() Change {
	c.Time = c.Time.Round(0).UTC()
	c.Reason = strings.ToValidUTF8(c.Reason, "\uFFFD")
	c.Reason = strings.ToValidUTF8(c.Reason[:min(len(c.Reason), maxChangeReason)], "") // without half a character at the end
	return c
}

// Retention says which changes a store keeps: those of the last Age, but only the last Max.
// A store drops several at a time, so it may keep some more.
type Retention struct {
	Age time.Duration
	Max int
}

// OrDefault returns the retention with its empty fields set: an hour and 10,000 changes.
func (r Retention) OrDefault() Retention {
	return Retention{cmp.Or(r.Age, time.Hour), cmp.Or(r.Max, 10_000)}
}

// ChangeType says what happened.
type ChangeType string

// The types of changes. A reuse is none: it writes nothing, and to store it would cost
// another round trip.
const (
	ChangeCreated       ChangeType = "created"        // its start was recorded; nothing runs yet
	ChangeReady         ChangeType = "ready"          // its sandbox is ready
	ChangeStartFailed   ChangeType = "start_failed"   // its sandbox did not become ready, and is gone
	ChangeRenewed       ChangeType = "renewed"        // its expiry is later than before
	ChangeConflict      ChangeType = "conflict"       // a create asked for something else; the session is as before
	ChangeRunning       ChangeType = "running"        // its lost sandbox is back
	ChangeDead          ChangeType = "dead"           // its sandbox ended
	ChangeLost          ChangeType = "lost"           // its sandbox cannot be reached
	ChangeReplaced      ChangeType = "replaced"       // its sandbox is gone, and another session took over
	ChangeExpired       ChangeType = "expired"        // it expired and was ended
	ChangeDeleted       ChangeType = "deleted"        // somebody deleted it
	ChangeSettled       ChangeType = "settled"        // what a replica left unfinished was ended
	ChangeAdopted       ChangeType = "adopted"        // its lost record was written again
	ChangeOrphanStopped ChangeType = "orphan_stopped" // its sandbox had no record and was stopped
	ChangeRepaired      ChangeType = "repaired"       // an operator had its unusable record removed

	// Those of spares. That a create claimed one is said by the session's change.
	ChangeSpareReady  ChangeType = "spare_ready"  // a create may claim it
	ChangeSpareFailed ChangeType = "spare_failed" // it did not become ready
	ChangeSpareEnded  ChangeType = "spare_ended"  // it was not claimed, and is gone
)

// changeTypes are all types, in the order in which they usually happen.
var changeTypes = []ChangeType{
	ChangeCreated, ChangeReady, ChangeStartFailed, ChangeRenewed, ChangeConflict, ChangeRunning, ChangeDead, ChangeLost,
	ChangeReplaced, ChangeExpired, ChangeDeleted, ChangeSettled, ChangeAdopted, ChangeOrphanStopped, ChangeRepaired,
	ChangeSpareReady, ChangeSpareFailed, ChangeSpareEnded,
}

func changeTypeNames() string {
	var names []string
	for _, one := range changeTypes {
		names = append(names, string(one))
	}
	return strings.Join(names, ", ")
}

// change returns a change of a session that happens now. The caller and the request are
// those of ctx.
func (s *Scheduler) change(ctx context.Context, what ChangeType, session Session, reason string) Change {
	return Change{
		Type:      what,
		Time:      s.now(),
		ChatID:    session.ChatID,
		SessionID: session.SessionID,
		AgentID:   session.AgentID,
		Runtime:   session.Runtime,
		Reason:    reason,
		Caller:    CallerFrom(ctx).Name,
		RequestID: RequestIDFrom(ctx),
	}
}

// noteSpare stores what happened to a spare.
func (s *Scheduler) noteSpare(ctx context.Context, what ChangeType, spare Spare, reason string) {
	change := s.change(ctx, what, Session{SessionID: spare.SessionID, Runtime: spare.Runtime}, reason)
	change.Pool = spare.Pool
	s.noteChange(ctx, change)
}

// succession returns the change of a session whose record another session takes over.
func (s *Scheduler) succession(ctx context.Context, previous Session) Change {
	if previous.State == StateCreating {
		return s.change(ctx, ChangeSettled, previous, "its create had not finished")
	}
	reason := previous.Reason
	if reason == "" && previous.Expired(s.Now()) {
		reason = "it had expired"
	}
	return s.change(ctx, ChangeReplaced, previous, reason)
}

// The limit for conflicts that are stored. A caller who causes a conflict all the time
// could otherwise make the store drop all other changes.
const (
	conflictInterval = 10 * time.Second
	conflictsAtOnce  = 100
)

// noteConflict stores that a create asked for something else than the session, unless
// there are too many such changes.
func (s *Scheduler) noteConflict(ctx context.Context, session Session, reason string) {
	change := s.change(ctx, ChangeConflict, session, reason)
	if !s.conflicts.AllowN(change.Time, 1) {
		s.history.metrics.unstored(ctx, change.Type, "limit")
		return
	}
	s.noteChange(ctx, change)
}

// noteChange stores a change that belongs to no write of a record. A failure is only
// logged and counted: what happened has happened.
func (s *Scheduler) noteChange(ctx context.Context, change Change) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	defer cancel()
	if err := s.Store.NoteChange(ctx, change); err != nil {
		s.history.metrics.unstored(ctx, change.Type, Kind(err))
		s.Logger.Debug("change_not_stored", "type", change.Type, "chat_id", change.ChatID, "error", Kind(err), "detail", err)
	}
}
