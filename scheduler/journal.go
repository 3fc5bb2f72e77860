package scheduler

import (
	"context"
	"time"

	"github.com/google/uuid"
)

// Event is something that happened to a chat's session, or that failed to happen.
// Fields that do not apply to its type are zero.
type Event struct {
	Type      EventType
	Time      time.Time
	ChatID    uuid.UUID
	Before    *Session // before the event; nil if there was none
	After     *Session // after the event; of a failed create, the session that it tried to start
	Reason    string
	Err       error          // why an attempt failed
	Asked     *CreateCommand // of a create
	Took      time.Duration  // how long the use case took
	Caller    Caller
	RequestID string
}

// EventType says what happened.
type EventType string

// The types of events.
const (
	EventCreated        EventType = "created"  // the sandbox is ready; Before is the session that it replaced
	EventReplaced       EventType = "replaced" // Before is about to be stopped, to be replaced by a new session
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
	EventCleanupFailed  EventType = "cleanup_failed" // a whole pass failed, with no chat
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

// session returns the session that the event is about, or nil.
func (e Event) session() *Session {
	switch {
	case e.Type == EventCreateFailed:
		return nil // what it was starting never became a session
	case e.Type == EventReplaced || e.After == nil:
		return e.Before
	}
	return e.After
}

// journal passes each event to all readers, in order.
type journal struct {
	now     func() time.Time
	readers []func(context.Context, Event)
}

// note passes an event to the readers.
func (j *journal) note(ctx context.Context, e Event) {
	e = j.stamp(ctx, e)
	for _, read := range j.readers {
		read(ctx, e)
	}
}

// stamp adds the time, the caller, the request ID and the chat to an event.
func (j *journal) stamp(ctx context.Context, e Event) Event {
	e.Time, e.Caller, e.RequestID = j.now(), CallerFrom(ctx), RequestIDFrom(ctx)
	if session := e.session(); session != nil {
		e.ChatID = session.ChatID
	}
	return e
}
