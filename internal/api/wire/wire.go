// Package wire has the JSON of the Control API as Go types, for server and client. The
// types have the fields that openapi.json describes.
//
// The package does not serve or send requests.
package wire

import (
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

// The API's own headers.
const (
	// HeaderToken is the caller's token. Authorization: Bearer TOKEN works as well.
	HeaderToken = "X-Bivouac-Token" //nolint:gosec // the name of a header
	// HeaderRequestID is the ID of a request, in its response and in the log. The caller
	// may choose it.
	HeaderRequestID = "X-Request-Id"
	// HeaderIndex is the index that the next blocking read passes to wait for a change.
	HeaderIndex = "X-Bivouac-Index"
	// HeaderStages makes a create report its stages, if it is "true".
	HeaderStages = "X-Bivouac-Stages"
	// HeaderStage is a stage, in an interim response 102.
	HeaderStage = "X-Bivouac-Stage"
)

// Code is the stable code of an error, for programs.
type Code string

// The error codes, each with its status.
const (
	CodeInvalid                   Code = "invalid"                     // 400
	CodeRuntimeInvalid            Code = "runtime_invalid"             // 400
	CodeUnauthenticated           Code = "unauthenticated"             // 401
	CodePermissionDenied          Code = "permission_denied"           // 403: the caller may not do this
	CodeClientCertificateRequired Code = "client_certificate_required" // 403
	CodeForbiddenHost             Code = "forbidden_host"              // 403
	CodeForbiddenOrigin           Code = "forbidden_origin"            // 403
	CodeNotFound                  Code = "not_found"                   // 404: the chat has no session
	CodeUnknownPath               Code = "unknown_path"                // 404: the API has no such path
	CodeMethodNotAllowed          Code = "method_not_allowed"          // 405
	CodeConflict                  Code = "conflict"                    // 409
	CodeExpired                   Code = "expired"                     // 409
	CodeNotRunning                Code = "not_running"                 // 409
	CodeLogsDisabled              Code = "logs_disabled"               // 409: the sandbox keeps no logs
	CodeIndexTooOld               Code = "index_too_old"               // 410: events after this index are no longer kept
	CodeNotAcceptable             Code = "not_acceptable"              // 406
	CodeUnsupportedMediaType      Code = "unsupported_media_type"      // 415
	CodeUpgradeRequired           Code = "upgrade_required"            // 426: the path is a websocket
	CodeBusy                      Code = "busy"                        // 429
	CodeQuotaExceeded             Code = "quota_exceeded"              // 429: there are as many sessions as there may be
	CodeInternal                  Code = "internal"                    // 500
	CodeDamagedRecord             Code = "damaged_record"              // 500
	CodeUnsupported               Code = "unsupported"                 // 501: the session's runtime cannot do this
	CodeNewerRecord               Code = "newer_record"                // 503: only a newer replica may read the chat's record
	CodeUnhealthy                 Code = "unhealthy"                   // 503
	CodeShuttingDown              Code = "shutting_down"               // 503
	CodeCanceled                  Code = "canceled"                    // 503
	CodeDeadlineExceeded          Code = "deadline_exceeded"           // 503
	CodeLockTimeout               Code = "lock_timeout"                // 503
	CodeLockLost                  Code = "lock_lost"                   // 503
	CodeSandboxConflict           Code = "sandbox_conflict"            // 503
	CodeNotPlaced                 Code = "not_placed"                  // 503
	CodeNotStopped                Code = "not_stopped"                 // 503: the sandbox has not ended yet
	CodeServerPermissionDenied    Code = "server_permission_denied"    // 503: Consul or Nomad refuses the server's own credentials
	CodeAuditUnavailable          Code = "audit_unavailable"           // 503: nothing was done, because it could not be written to the audit log
	CodeStoreUnavailable          Code = "store_unavailable"           // 503
	CodeRuntimeUnavailable        Code = "runtime_unavailable"         // 503
	CodeNotReady                  Code = "not_ready"                   // 503: failed to start; 504: not ready in time
)

// Error describes what went wrong with a request.
type Error struct {
	Code      Code   `json:"code"`
	Message   string `json:"message"`          // for a person
	Reason    string `json:"reason,omitempty"` // of a conflict: the fields that differ, separated by commas
	RequestID string `json:"request_id"`
}

// ErrorAnswer is the body of every answer that is an error.
type ErrorAnswer struct {
	Error   Error    `json:"error"`
	Session *Session `json:"session,omitempty"` // of a conflict: the existing session
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
	Labels         map[string]string `json:"labels"` // set by the create; never null
	Warm           bool              `json:"warm"`   // the sandbox was a spare of a pool
}

// CreateRequest is the body of a create.
type CreateRequest struct {
	AgentID        string `json:"agent_id"`
	VolumeHostPath string `json:"volume_host_path"`
	Runtime        string `json:"runtime,omitempty"` // empty: any for an existing session, the default for a new one
	TTL            string `json:"ttl,omitempty"`     // such as "30m"; empty: the default

	Labels map[string]string `json:"labels,omitzero"` // nil: any for an existing session, none for a new one
}

// RenewRequest is the body of a renew.
type RenewRequest struct {
	TTL string `json:"ttl,omitempty"` // such as "30m"; empty: the default
}

// SessionAnswer is the result of a renew.
type SessionAnswer struct {
	Session Session `json:"session"`
}

// GetAnswer is one session.
type GetAnswer struct {
	Session      Session  `json:"session"`
	Capabilities []string `json:"capabilities"`           // what the caller may do with the session
	AccessToken  string   `json:"access_token,omitempty"` // see CreateAnswer
}

// CreateAnswer is the result of a create: "created", "replaced" or "reused".
type CreateAnswer struct {
	Result  string  `json:"result"`
	Session Session `json:"session"`

	// AccessToken is the secret of the sandbox. It is empty if the session has none, or
	// if the caller may not write to the session. It is not a field of Session, so that
	// lists and conflicts cannot contain it.
	AccessToken string `json:"access_token,omitempty"`
}

// ListAnswer is one page of sessions.
type ListAnswer struct {
	Sessions  []Session `json:"sessions"`
	NextToken string    `json:"next_token"` // empty on the last page
}

// CountsAnswer is the number of sessions by state. It has all states.
type CountsAnswer struct {
	Counts    map[string]int `json:"counts"`
	CountedAt time.Time      `json:"counted_at"` // by the clock of the server's machine
}

// PoolsAnswer is all pools, by name.
type PoolsAnswer struct {
	Pools []Pool `json:"pools"`
}

// Pool is a pool of spares and how many of them there are in each state.
type Pool struct {
	Name     string `json:"name"`
	Runtime  string `json:"runtime"`
	Size     int    `json:"size"`  // 0 if the server has no such pool any more
	Ready    int    `json:"ready"` // a create may take these
	Starting int    `json:"starting"`
	Ending   int    `json:"ending"`
}

// DeleteAnswer is the result of a delete: "deleted" or "not_found".
type DeleteAnswer struct {
	Result      string    `json:"result"`
	ChatID      uuid.UUID `json:"chat_id"`
	SessionID   uuid.UUID `json:"session_id,omitzero"`    // set if a session was deleted
	ContainerID string    `json:"container_id,omitempty"` // set if a session was deleted and had one
}

// CleanupAnswer is the result of a clean-up.
type CleanupAnswer struct {
	Cleaned    []Session `json:"cleaned"`
	ErrorCount int       `json:"error_count"` // expired sessions that could not be ended
}

// AdoptRequest is the body of POST /v1/operator/adopt.
type AdoptRequest struct {
	Instance string `json:"instance,omitempty"` // required if the server started after the loss
}

// AdoptAnswer is the result of an adopt.
type AdoptAnswer struct {
	Instance string `json:"instance"` // the instance ID that the store got
	Adopted  int    `json:"adopted"`  // sandboxes that have a record now
	Failed   int    `json:"failed"`   // sandboxes for which no record could be written
}

// ForgetAnswer is the result of a forget. The sandboxes in Left belong to other instances
// from now on.
type ForgetAnswer struct {
	Instance string `json:"instance"` // the new instance ID of the store
	Left     []Left `json:"left"`
}

// Left counts the running sandboxes of one other instance.
type Left struct {
	Instance  string `json:"instance"`
	Sandboxes int    `json:"sandboxes"`
	Look      string `json:"look"` // a command that shows them
}

// RepairAnswer is the result of a repair: "intact", "adopted" or "removed".
type RepairAnswer struct {
	Result  string   `json:"result"`
	Session *Session `json:"session,omitempty"` // the chat's session; absent after "removed"
}

// LiveAnswer says that a replica answers.
type LiveAnswer struct {
	Status string `json:"status"` // StatusOK
}

// HealthAnswer reports whether a replica can serve, with the result of each check.
type HealthAnswer struct {
	Status   string           `json:"status"`             // StatusOK or StatusFailing
	Instance string           `json:"instance,omitempty"` // the ID of the instance, once it is known
	Checks   map[string]Check `json:"checks,omitzero"`    // absent for callers who are no operators
	Error    *Error           `json:"error,omitempty"`    // set if it is failing
}

// Check is the result of one health check.
type Check struct {
	Status string `json:"status"`          // StatusOK or StatusFailing
	Error  string `json:"error,omitempty"` // set if it is failing
}

// The status of a replica or of one of its parts.
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
	Replicas []Replica `json:"replicas,omitzero"` // that run, this one included; absent if the store cannot be asked
}

// Replica is a replica that runs.
type Replica struct {
	Name      string    `json:"name"` // of its machine
	Version   string    `json:"version"`
	Addresses []string  `json:"addresses"` // that its API listens on
	StartedAt time.Time `json:"started_at"`
}

// Runtime is a runtime driver of a replica.
type Runtime struct {
	Name    string `json:"name"`
	Version string `json:"version"` // empty if it is a plugin that does not run
}
