package wire

import (
	"time"

	"github.com/google/uuid"
)

// TypeFrames is the media type of streams of JSON objects, one on each line.
const TypeFrames = "application/x-ndjson"

// EventBatch is one line of the event stream, in the shape that Nomad's has: the events of
// one transaction of the store, a heartbeat if all is empty, or the error that ends the
// stream.
type EventBatch struct {
	Index  uint64  `json:"Index,omitempty"`
	Events []Event `json:"Events,omitempty"`
	Error  *Error  `json:"Error,omitempty"`
}

// The topics of events.
const (
	TopicSession = "Session" // its key is the chat's ID
	TopicPool    = "Pool"    // its key is the pool's name
)

// Event is something that happened to a chat's session or to a spare of a pool.
type Event struct {
	Topic   string       `json:"Topic"` // TopicSession or TopicPool
	Type    string       `json:"Type"`  // such as "ready"
	Key     string       `json:"Key"`
	Index   uint64       `json:"Index"`
	Payload EventPayload `json:"Payload"`
}

// EventPayload says what happened.
type EventPayload struct {
	Time      time.Time `json:"time"`
	ChatID    uuid.UUID `json:"chat_id,omitzero"` // none for a spare
	SessionID uuid.UUID `json:"session_id"`
	AgentID   string    `json:"agent_id"` // empty for a spare
	Runtime   string    `json:"runtime"`
	Reason    string    `json:"reason"`     // why, for a person; empty if there is nothing to say
	Caller    string    `json:"caller"`     // name of who caused it
	RequestID string    `json:"request_id"` // empty if no request caused it
}
