package wire

import (
	"time"

	"github.com/google/uuid"
)

// WhyAnswer is what became of the last sessions of a chat, the newest first.
type WhyAnswer struct {
	ChatID   uuid.UUID `json:"chat_id"`
	Sessions []Story   `json:"sessions"`
}

// StateGone is the state of a session that has no record any more.
const StateGone = "gone"

// Story is what became of one session.
type Story struct {
	SessionID uuid.UUID    `json:"session_id"`
	AgentID   string       `json:"agent_id"`
	Runtime   string       `json:"runtime"`
	State     string       `json:"state"`   // as in Session, or StateGone
	Outcome   string       `json:"outcome"` // in one sentence
	Events    []StoryEvent `json:"events"`  // the oldest first; those without a time last
}

// StoryEvent is one thing that happened to a session.
type StoryEvent struct {
	Time   *time.Time `json:"time"`   // nil if it is not known
	Source string     `json:"source"` // "bivouac", or the name of a runtime
	Text   string     `json:"text"`   // one line, without control characters
}
