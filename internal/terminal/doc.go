// Package terminal opens terminals for programs that expect a person at one, on Linux. On
// other systems its functions return an error that wraps [errors.ErrUnsupported].
//
// The two ends of a terminal are files. What is written to one is read from the other.
//
// The package does not start programs.
package terminal
