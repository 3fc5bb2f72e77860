package runtime

import "errors"

// The errors that a driver's methods wrap. Each says what the host may do next.
var (
	// ErrNotPlaced: there is no room for the sandbox now; later there may be.
	ErrNotPlaced = errors.New("not placed")
	// ErrNotFound: no such sandbox.
	ErrNotFound = errors.New("sandbox not found")
	// ErrConflict: the session ID stands for another spec, was stopped, or what
	// bears it is not this Bivouac's and is left alone.
	ErrConflict = errors.New("session ID already used")
	// ErrNotReady: the sandbox failed to start, or did not answer in time.
	ErrNotReady = errors.New("sandbox not ready")
	// ErrNotStopped: the sandbox was told to end and is seen to be still there.
	// The message says what it waits for.
	ErrNotStopped = errors.New("sandbox has not ended yet")
	// ErrUnavailable: what the driver depends on cannot be asked. Nothing may
	// be concluded about any sandbox.
	ErrUnavailable = errors.New("runtime unavailable")
	// ErrInvalid: the driver can never do what was asked.
	ErrInvalid = errors.New("invalid for this runtime")
)
