package scheduler

import (
	"context"
	"errors"
	"fmt"

	"github.com/bivouac/bivouac/runtime"
)

var (
	// ErrInvalid: the input can never be accepted.
	ErrInvalid = errors.New("invalid input")
	// ErrNotFound: the chat has no session.
	ErrNotFound = errors.New("no session")
	// ErrExpired: the session has expired and cannot be renewed.
	ErrExpired = errors.New("session expired")
	// ErrNotRunning: the session's sandbox no longer runs, so the session
	// cannot be renewed; create replaces it.
	ErrNotRunning = errors.New("sandbox not running")
	// ErrShuttingDown: this replica was told to stop before the operation was
	// done. It is undone, or settled by another replica, which takes requests.
	ErrShuttingDown = errors.New("shutting down")
	// ErrLockTimeout: another operation on the chat took too long.
	ErrLockTimeout = errors.New("timed out waiting for the chat's lock")
	// ErrLockLost: the chat's lock was lost, or its record changed, in
	// mid-operation; nothing was written.
	ErrLockLost = errors.New("lost the chat's lock")
	// ErrUnavailable: the store cannot be reached, or its answer is unknown.
	ErrUnavailable = errors.New("store unavailable")
	// ErrDamaged: a record cannot be understood. The message says which and why.
	ErrDamaged = errors.New("damaged record")
	// ErrNewerRecord is returned for a chat whose record only a newer version of
	// Bivouac may read. The record and its sandbox are left alone.
	ErrNewerRecord = errors.New("record of a newer version")
	// ErrBusy: too much of this is under way in this replica; try again later.
	ErrBusy = errors.New("too many requests in flight")
	// ErrConflict is what a [ConflictError] wraps.
	ErrConflict = errors.New("session stands with other parameters")
)

// ConflictError says that a chat's session stands with other parameters than
// were asked for.
type ConflictError struct {
	Session Session // the one that stands
	Reason  string  // the fields that differ, by comma: "agent_id,volume_host_path,runtime,labels"
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("chat %s: %v: %s differs", e.Session.ChatID, ErrConflict, e.Reason)
}

// Unwrap makes errors.Is(err, ErrConflict) hold.
func (e *ConflictError) Unwrap() error { return ErrConflict }

// UnavailableError is an [ErrUnavailable] with a reason for the caller.
type UnavailableError struct {
	Reason string // may be shown to anybody: names no address, key or token
	Detail string // for the log
}

func (e *UnavailableError) Error() string { return fmt.Sprintf("%v: %s", ErrUnavailable, e.Detail) }

// Unwrap makes errors.Is(err, ErrUnavailable) hold.
func (e *UnavailableError) Unwrap() error { return ErrUnavailable }

// kinds is in order: an error that wraps several is of the first kind.
var kinds = []struct {
	err  error
	kind string
}{
	{ErrInvalid, "invalid"},
	{ErrNotFound, "not_found"},
	{ErrExpired, "expired"},
	{ErrNotRunning, "not_running"},
	{ErrConflict, "conflict"},
	{ErrShuttingDown, "shutting_down"},
	{ErrLockTimeout, "lock_timeout"},
	{ErrLockLost, "lock_lost"},
	{ErrDamaged, "damaged_record"},
	{ErrNewerRecord, "newer_record"},
	{ErrBusy, "busy"},
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

// Kind returns a stable short word for what kind of error err is, for metrics,
// spans, logs and the API; "internal" where it is none of the known ones.
func Kind(err error) string {
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			return k.kind
		}
	}
	return "internal"
}
