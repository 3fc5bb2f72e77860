// Package wire holds the JSON of the Control API as Go types: what server and
// client agree on, field by field as openapi.json has it.
//
// It must never know how a request is served or sent.
package wire

import (
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

// The headers that the API adds to HTTP's own.
const (
	// HeaderRequestID names a request in its answer and in the log. A caller
	// may choose it.
	HeaderRequestID = "X-Request-Id"
	// HeaderIndex is what a blocking read passes as index to wait for a change.
	HeaderIndex = "X-Bivouac-Index"
	// HeaderStages, set to "true", asks a create to tell its stages.
	HeaderStages = "X-Bivouac-Stages"
	// HeaderStage is a stage, in an interim answer 102.
	HeaderStage = "X-Bivouac-Stage"
)

// Code is an error's stable word, for programs.
type Code string

// The codes of the errors, with the status that each comes with.
const (
	CodeInvalid              Code = "invalid"                // 400
	CodeRuntimeInvalid       Code = "runtime_invalid"        // 400
	CodeForbiddenHost        Code = "forbidden_host"         // 403
	CodeForbiddenOrigin      Code = "forbidden_origin"       // 403
	CodeNotFound             Code = "not_found"              // 404: the chat has no session
	CodeUnknownPath          Code = "unknown_path"           // 404: the API has no such path
	CodeMethodNotAllowed     Code = "method_not_allowed"     // 405
	CodeConflict             Code = "conflict"               // 409
	CodeExpired              Code = "expired"                // 409
	CodeNotRunning           Code = "not_running"            // 409
	CodeUnsupportedMediaType Code = "unsupported_media_type" // 415
	CodeBusy                 Code = "busy"                   // 429
	CodeInternal             Code = "internal"               // 500
	CodeDamagedRecord        Code = "damaged_record"         // 500
	CodeNewerRecord          Code = "newer_record"           // 503: only a newer replica may read the chat's record
	CodeUnhealthy            Code = "unhealthy"              // 503
	CodeShuttingDown         Code = "shutting_down"          // 503
	CodeCanceled             Code = "canceled"               // 503
	CodeDeadlineExceeded     Code = "deadline_exceeded"      // 503
	CodeLockTimeout          Code = "lock_timeout"           // 503
	CodeLockLost             Code = "lock_lost"              // 503
	CodeSandboxConflict      Code = "sandbox_conflict"       // 503
	CodeNotPlaced            Code = "not_placed"             // 503
	CodeNotStopped           Code = "not_stopped"            // 503: the sandbox has not ended yet
	CodeStoreUnavailable     Code = "store_unavailable"      // 503
	CodeRuntimeUnavailable   Code = "runtime_unavailable"    // 503
	CodeNotReady             Code = "not_ready"              // 503: failed to start; 504: not ready in time
)

// Error says what went wrong with a request.
type Error struct {
	Code      Code   `json:"code"`
	Message   string `json:"message"`          // for a person
	Reason    string `json:"reason,omitempty"` // of a conflict: the fields that differ, by comma
	RequestID string `json:"request_id"`
}

// ErrorAnswer is the body of every answer that is an error.
type ErrorAnswer struct {
	Error   Error    `json:"error"`
	Session *Session `json:"session,omitempty"` // of a conflict: the one that stands
}

// Session is a chat's session. Times are in UTC.
type Session struct {
	SessionID      uuid.UUID         `json:"session_id"`
	ChatID         uuid.UUID         `json:"chat_id"`
	AgentID        string            `json:"agent_id"`
	VolumeHostPath string            `json:"volume_host_path"`
	Runtime        string            `json:"runtime"`
	ContainerID    string            `json:"container_id"` // empty until it is known
	Endpoint       *runtime.Endpoint `json:"endpoint"`     // nil until it is known
	CreatedAt      time.Time         `json:"created_at"`
	ExpiresAt      time.Time         `json:"expires_at"`
	State          string            `json:"state"`
	Reason         string            `json:"reason"` // why it is dead or lost, or what its stop waits for; else empty
	Owner          string            `json:"owner"`  // name of the caller that created it
	Labels         map[string]string `json:"labels"` // as the create gave them; never null
}

// CreateRequest is the body of a create.
type CreateRequest struct {
	AgentID        string `json:"agent_id"`
	VolumeHostPath string `json:"volume_host_path"`
	Runtime        string `json:"runtime,omitempty"` // empty: whatever stands, or else the default
	TTL            string `json:"ttl,omitempty"`     // such as "30m"; empty: the default

	Labels map[string]string `json:"labels,omitzero"` // nil: whatever the session that stands has
}

// RenewRequest is the body of a renew.
type RenewRequest struct {
	TTL string `json:"ttl,omitempty"` // such as "30m"; empty: the default
}

// SessionAnswer is one session.
type SessionAnswer struct {
	Session Session `json:"session"`
}

// CreateAnswer is what a create came to: "created", "replaced" or "reused".
type CreateAnswer struct {
	Result  string  `json:"result"`
	Session Session `json:"session"`
}

// ListAnswer is one page of sessions.
type ListAnswer struct {
	Sessions  []Session `json:"sessions"`
	NextToken string    `json:"next_token"` // empty on the last page
}

// DeleteAnswer is what a delete came to: "deleted" or "not_found".
type DeleteAnswer struct {
	Result      string    `json:"result"`
	ChatID      uuid.UUID `json:"chat_id"`
	SessionID   uuid.UUID `json:"session_id,omitzero"`    // where it was deleted
	ContainerID string    `json:"container_id,omitempty"` // where it was deleted and had one
}

// CleanupAnswer is what a clean-up ended.
type CleanupAnswer struct {
	Cleaned    []Session `json:"cleaned"`
	ErrorCount int       `json:"error_count"` // expired sessions that could not be ended
}

// AdoptRequest is the body of POST /v1/operator/adopt.
type AdoptRequest struct {
	Instance string `json:"instance,omitempty"` // empty: the only one that there is
}

// AdoptAnswer says what a store without an identity was given.
type AdoptAnswer struct {
	Instance string `json:"instance"` // the ID of the instance
	Adopted  int    `json:"adopted"`  // sandboxes that have a record now
	Failed   int    `json:"failed"`   // sandboxes that could not be given one
}

// ForgetAnswer says what a store without an identity was given, and what is
// another's from now on.
type ForgetAnswer struct {
	Instance string `json:"instance"` // the ID of the instance
	Left     []Left `json:"left"`
}

// Left is what runs of one instance and is left alone.
type Left struct {
	Instance  string `json:"instance"`
	Sandboxes int    `json:"sandboxes"`
	Look      string `json:"look"` // a command that shows them
}

// RepairAnswer is what a repair did: "intact", "adopted" or "removed".
type RepairAnswer struct {
	Result  string   `json:"result"`
	Session *Session `json:"session,omitempty"` // the chat's; absent after "removed"
}

// HealthAnswer says whether a replica can serve, and part by part why not.
type HealthAnswer struct {
	Status   string           `json:"status"`             // StatusOK or StatusFailing
	Instance string           `json:"instance,omitempty"` // the ID of the instance, once it is known
	Checks   map[string]Check `json:"checks"`
	Error    *Error           `json:"error,omitempty"` // where failing
}

// Check is the outcome of one health check.
type Check struct {
	Status string `json:"status"`          // StatusOK or StatusFailing
	Error  string `json:"error,omitempty"` // where failing
}

// How a replica or one of its parts stands.
const (
	StatusOK      = "ok"
	StatusFailing = "failing"
)

// SelfAnswer describes a replica.
type SelfAnswer struct {
	Version  string    `json:"version"`
	Revision string    `json:"revision"`
	Instance string    `json:"instance"` // the ID of the instance, empty while it is not known
	Config   any       `json:"config"`   // a JSON object, without secrets
	Runtimes []Runtime `json:"runtimes"`
}

// Runtime is a runtime driver that a replica has.
type Runtime struct {
	Name    string `json:"name"`
	Version string `json:"version"` // empty while it is a plugin that is not up
}
