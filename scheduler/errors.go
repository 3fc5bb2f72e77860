package scheduler

import (
	"context"
	"errors"
	"fmt"

	"github.com/bivouac/bivouac/runtime"
)

var (
	// ErrInvalid is returned for input that can never be accepted.
	ErrInvalid = errors.New("invalid input")
	// ErrNotFound is returned if the chat has no session.
	ErrNotFound = errors.New("no session")
	// ErrExpired is returned by a renewal of a session that has expired.
	ErrExpired = errors.New("session expired")
	// ErrNotRunning is returned by a renewal if the sandbox no longer runs. A
	// create replaces the session.
	ErrNotRunning = errors.New("sandbox not running")
	// ErrShuttingDown is returned if this replica was told to stop before the
	// operation was done. It is undone, or another replica settles it.
	ErrShuttingDown = errors.New("shutting down")
	// ErrLockTimeout is returned if another operation on the chat took too long.
	ErrLockTimeout = errors.New("timed out waiting for the chat's lock")
	// ErrLockLost is returned if the chat's lock was lost, or its record changed,
	// during the operation. Nothing was written.
	ErrLockLost = errors.New("lost the chat's lock")
	// ErrUnavailable is returned if the store cannot be reached, or if its answer
	// is unknown.
	ErrUnavailable = errors.New("store unavailable")
	// ErrDamaged is returned for a record that cannot be read. The message says
	// which one and why.
	ErrDamaged = errors.New("damaged record")
	// ErrNewerRecord is returned for a chat whose record only a newer version of
	// Bivouac may read. The record and its sandbox are left alone.
	ErrNewerRecord = errors.New("record of a newer version")
	// ErrSpareTaken is returned if a spare has been claimed or ended meanwhile.
	ErrSpareTaken = errors.New("the spare is taken")
	// ErrBusy is returned if too many requests of this kind are in progress in
	// this replica. Try again later.
	ErrBusy = errors.New("too many requests in flight")
	// ErrUnauthenticated is returned for a request without valid credentials.
	ErrUnauthenticated = errors.New("no valid credentials")
	// ErrPermissionDenied is returned if the caller may not do this. The message says
	// nothing about sessions that the caller may not see.
	ErrPermissionDenied = errors.New("permission denied")
	// ErrServerDenied is an ErrUnavailable: the store refuses the credentials of this
	// server. The message says what they lack. A runtime returns
	// [runtime.ErrPermission].
	ErrServerDenied = fmt.Errorf("%w: the server's own credentials are refused", ErrUnavailable)
	// ErrAuditUnavailable is returned if something was not done because it could not
	// be written to the audit log.
	ErrAuditUnavailable = errors.New("audit log unavailable")
	// ErrIndexTooOld is returned for an index before the oldest change that is kept, or
	// of another store. Start again with the index 0.
	ErrIndexTooOld = errors.New("events after this index are no longer kept, or the index is of another store; 0 starts at the oldest")
	// ErrQuota is what a [QuotaError] wraps.
	ErrQuota = errors.New("quota exceeded")
	// ErrConflict is what a [ConflictError] wraps.
	ErrConflict = errors.New("the chat already has a session with different parameters")
)

// ConflictError is returned if the chat has a session with parameters other than
// the requested ones.
type ConflictError struct {
	Session Session // the existing one
	Reason  string  // the fields that differ, by comma: "agent_id,volume_host_path,runtime,labels"
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("chat %s: %v: %s", e.Session.ChatID, ErrConflict, e.Reason)
}

// Unwrap makes errors.Is(err, ErrConflict) hold.
func (e *ConflictError) Unwrap() error { return ErrConflict }

// LimitError is an [ErrBusy] that names the limit that was reached.
type LimitError struct {
	Limit  string // its name in metrics
	Detail string
}

func (e *LimitError) Error() string { return fmt.Sprintf("%v: %s", ErrBusy, e.Detail) }

// Unwrap makes errors.Is(err, ErrBusy) hold.
func (e *LimitError) Unwrap() error { return ErrBusy }

// QuotaError is returned if there are already as many sessions as may be.
type QuotaError struct {
	Limit int    // how many sessions there may be
	Scope string // whose: "all AI agents", or `AI agents with the prefix "support-"`
}

func (e *QuotaError) Error() string {
	return fmt.Sprintf("%v: %s may have %d sessions", ErrQuota, e.Scope, e.Limit)
}

// Unwrap makes errors.Is(err, ErrQuota) hold.
func (e *QuotaError) Unwrap() error { return ErrQuota }

// UnavailableError is an [ErrUnavailable] with a reason for the caller.
type UnavailableError struct {
	Reason string // for callers: contains no address, key or token
	Detail string // for the log
}

func (e *UnavailableError) Error() string { return fmt.Sprintf("%v: %s", ErrUnavailable, e.Detail) }

// Unwrap makes errors.Is(err, ErrUnavailable) hold.
func (e *UnavailableError) Unwrap() error { return ErrUnavailable }

// kinds is ordered: an error that wraps several has the first kind.
var kinds = []struct {
	err  error
	kind string
}{
	{ErrInvalid, "invalid"},
	{ErrUnauthenticated, "unauthenticated"},
	{ErrPermissionDenied, "permission_denied"},
	{ErrQuota, "quota_exceeded"},
	{ErrNotFound, "not_found"},
	{ErrExpired, "expired"},
	{ErrNotRunning, "not_running"},
	{ErrConflict, "conflict"},
	{ErrShuttingDown, "shutting_down"},
	{ErrLockTimeout, "lock_timeout"},
	{ErrLockLost, "lock_lost"},
	{ErrSpareTaken, "spare_taken"},
	{ErrDamaged, "damaged_record"},
	{ErrNewerRecord, "newer_record"},
	{ErrBusy, "busy"},
	{ErrAuditUnavailable, "audit_unavailable"},
	{ErrIndexTooOld, "index_too_old"},
	{runtime.ErrBusy, "busy"},
	{runtime.ErrLogsDisabled, "logs_disabled"},
	{errors.ErrUnsupported, "unsupported"},
	{ErrServerDenied, "server_permission_denied"},
	{runtime.ErrPermission, "server_permission_denied"},
	{ErrUnavailable, "store_unavailable"},
	{runtime.ErrNotPlaced, "not_placed"},
	{runtime.ErrNotReady, "not_ready"},
	{runtime.ErrNotStopped, "not_stopped"},
	{runtime.ErrNotFound, "sandbox_not_found"},
	{runtime.ErrConflict, "sandbox_conflict"},
	{runtime.ErrInvalid, "runtime_invalid"},
	{runtime.ErrUnavailable, "runtime_unavailable"},
	{context.DeadlineExceeded, "deadline_exceeded"},
	{context.Canceled, "canceled"},
}

// Kind returns a stable short name for the kind of err, for metrics, spans, logs
// and the API. It returns "internal" if the kind is not known.
func Kind(err error) string {
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			return k.kind
		}
	}
	return "internal"
}
