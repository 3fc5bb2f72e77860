package scheduler

import (
	"context"
	"time"

	"github.com/google/uuid"
)

// Event is something that happened to a chat's session, or an attempt that
// failed. Fields that say nothing about its type are zero.
type Event struct {
	Type      EventType
	Time      time.Time
	ChatID    uuid.UUID
	Before    *Session // the session that there was
	After     *Session // the session that there is now, or that a failed create was starting
	Reason    string
	Err       error          // why an attempt failed
	Asked     *CreateCommand // by whoever created the session, or tried to
	Took      time.Duration  // how long the use case took
	Caller    Caller
	RequestID string
}

// EventType says what happened.
type EventType string

// The types of events.
const (
	EventCreated        EventType = "created"  // a sandbox is ready; Before is the session that it replaced
	EventReplaced       EventType = "replaced" // the session Before is about to make way for a new one
	EventReused         EventType = "reused"
	EventConflict       EventType = "conflict"
	EventCreateFailed   EventType = "create_failed"
	EventRenewed        EventType = "renewed"
	EventRenewFailed    EventType = "renew_failed"
	EventDeleted        EventType = "deleted"
	EventDeleteNotFound EventType = "delete_not_found"
	EventDeleteFailed   EventType = "delete_failed"
	EventExpired        EventType = "expired" // the session expired and was ended
	EventExpireFailed   EventType = "expire_failed"
	EventCleanupFailed  EventType = "cleanup_failed" // a whole pass; no chat's
	EventRunning        EventType = "running"        // the sandbox is back
	EventDead           EventType = "dead"
	EventLost           EventType = "lost"
	EventRecordFailed   EventType = "record_failed" // a change of the sandbox could not be recorded
	EventSettled        EventType = "settled"
	EventSettleFailed   EventType = "settle_failed"
	EventUndoFailed     EventType = "undo_failed"
	EventAdopted        EventType = "adopted"
	EventOrphanFound    EventType = "orphan_found"
	EventOrphanStopped  EventType = "orphan_stopped"
	EventOrphanFailed   EventType = "orphan_failed"
	EventRepaired       EventType = "repaired" // Reason is the outcome
	EventRepairFailed   EventType = "repair_failed"
)

// session returns the session that the event is about, nil if it is about none.
func (e Event) session() *Session {
	switch {
	case e.Type == EventCreateFailed:
		return nil // what it was starting never became a session
	case e.Type == EventReplaced || e.After == nil:
		return e.Before
	}
	return e.After
}

// journal takes all events, and hands each to its readers in turn.
type journal struct {
	now     func() time.Time
	readers []func(context.Context, Event)
}

// note completes an event with what the context says of it, and hands it on.
func (j *journal) note(ctx context.Context, e Event) {
	e.Time, e.Caller, e.RequestID = j.now(), CallerFrom(ctx), RequestIDFrom(ctx)
	if session := e.session(); session != nil {
		e.ChatID = session.ChatID
	}
	for _, read := range j.readers {
		read(ctx, e)
	}
}
