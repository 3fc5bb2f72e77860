package runtime

import (
	"errors"
	"fmt"
)

// The errors that a driver's methods wrap. The host decides by them what to do
// next.
var (
	// ErrNotPlaced is returned when there is no room for the sandbox now. There may
	// be room later.
	ErrNotPlaced = errors.New("not placed")
	// ErrNotFound is returned when there is no such sandbox.
	ErrNotFound = errors.New("sandbox not found")
	// ErrConflict is returned when the session ID was used for another spec, when
	// it was stopped, or when a sandbox of another Bivouac instance has it.
	ErrConflict = errors.New("session ID already used")
	// ErrNotReady is returned when the sandbox failed to start or did not answer in
	// time.
	ErrNotReady = errors.New("sandbox not ready")
	// ErrNotStopped is returned when the sandbox has been asked to stop but is seen
	// to be still there. The message says what it waits for.
	ErrNotStopped = errors.New("sandbox has not ended yet")
	// ErrUnavailable is returned when the driver cannot reach what it depends on.
	// The host must not conclude anything about any sandbox.
	ErrUnavailable = errors.New("runtime unavailable")
	// ErrPermission is an ErrUnavailable: what the driver depends on refuses the
	// credentials of the server. The message says what they lack.
	ErrPermission = fmt.Errorf("%w: the server's own credentials are refused", ErrUnavailable)
	// ErrBusy is returned when as many commands run as the driver can run at a time.
	// Another one may run later.
	ErrBusy = errors.New("as many commands run as can")
	// ErrLogsDisabled is returned when the output of a sandbox is not kept. The message
	// says what to set.
	ErrLogsDisabled = errors.New("logs are disabled")
	// ErrInvalid is returned when the driver can never do what it was asked.
	ErrInvalid = errors.New("invalid for this runtime")
)
