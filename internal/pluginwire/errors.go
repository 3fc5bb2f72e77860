package pluginwire

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

// maxErrorMessage bounds an error's text on the wire, in bytes. It travels in
// an HTTP/2 header.
const maxErrorMessage = 8 << 10

// kinds maps errors to gRPC statuses and back. An error that wraps several has the code
// of the first, and its detail names them all. The kinds that the host acts on have codes
// that gRPC libraries never produce by themselves, so that an answer over the size limit
// does not look like "not placed". DataLoss was the last of them.
var kinds = []struct {
	err  error
	code codes.Code
	kind runtimev1.ErrorKind
}{
	{runtime.ErrInvalid, codes.InvalidArgument, runtimev1.ErrorKind_ERROR_KIND_INVALID},
	{runtime.ErrNotFound, codes.NotFound, runtimev1.ErrorKind_ERROR_KIND_NOT_FOUND},
	{runtime.ErrConflict, codes.AlreadyExists, runtimev1.ErrorKind_ERROR_KIND_CONFLICT},
	{runtime.ErrNotPlaced, codes.FailedPrecondition, runtimev1.ErrorKind_ERROR_KIND_NOT_PLACED},
	{runtime.ErrNotReady, codes.Aborted, runtimev1.ErrorKind_ERROR_KIND_NOT_READY},
	{runtime.ErrNotStopped, codes.OutOfRange, runtimev1.ErrorKind_ERROR_KIND_NOT_STOPPED},
	{runtime.ErrLogsDisabled, codes.DataLoss, runtimev1.ErrorKind_ERROR_KIND_LOGS_DISABLED},
	{runtime.ErrUnavailable, codes.Unavailable, runtimev1.ErrorKind_ERROR_KIND_UNAVAILABLE},
	{errors.ErrUnsupported, codes.Unimplemented, runtimev1.ErrorKind_ERROR_KIND_UNSUPPORTED},
	{context.DeadlineExceeded, codes.DeadlineExceeded, runtimev1.ErrorKind_ERROR_KIND_DEADLINE_EXCEEDED},
	{context.Canceled, codes.Canceled, runtimev1.ErrorKind_ERROR_KIND_CANCELED},
}

// toStatus puts a driver's error into a gRPC status.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	code := codes.Unknown
	detail := &runtimev1.ErrorDetail{}
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			if code == codes.Unknown {
				code = k.code
			}
			detail.Kinds = append(detail.Kinds, k.kind)
		}
	}
	st := status.New(code, limitText(err.Error(), maxErrorMessage))
	if with, err := st.WithDetails(detail); err == nil {
		st = with
	}
	return st.Err()
}

// fromStatus returns the error in a call's gRPC status. ctx is the call's context. If
// ctx has ended, the error wraps ctx's error. An error of no known kind becomes
// ErrUnavailable.
func fromStatus(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	st := status.Convert(err)
	decoded := &callError{message: limitText(st.Message(), maxErrorMessage)}
	detailed := false
	for _, d := range st.Details() {
		detail, ok := d.(*runtimev1.ErrorDetail)
		if !ok {
			continue
		}
		detailed = true
		for _, k := range kinds {
			for _, kind := range detail.GetKinds() {
				if kind == k.kind {
					decoded.wrapped = append(decoded.wrapped, k.err)
				}
			}
		}
	}
	decoded.answer = detailed
	if !detailed {
		for _, k := range kinds {
			if st.Code() == k.code {
				decoded.wrapped = append(decoded.wrapped, k.err)
			}
		}
	}
	switch ended := contextError(ctx); {
	case ended != nil && !errors.Is(decoded, ended):
		decoded.wrapped = append(decoded.wrapped, ended)
	case ended == nil && !decoded.isOfTheRuntime():
		decoded.wrapped = append(decoded.wrapped, runtime.ErrUnavailable)
	}
	return decoded
}

// clockLead is how much earlier than the host a plugin may see a deadline pass.
const clockLead = 100 * time.Millisecond

// contextError returns ctx's error. It also returns it just before the deadline, which
// the plugin may already have seen pass.
func contextError(ctx context.Context) error {
	if deadline, ok := ctx.Deadline(); ok && ctx.Err() == nil && time.Until(deadline) < clockLead {
		return context.DeadlineExceeded
	}
	return ctx.Err()
}

// callError is an error that came over the wire.
type callError struct {
	message string
	wrapped []error
	answer  bool // the plugin sent it: the error of a broken connection has no details
}

// IsAnswer reports whether err is known to come from an answer of the plugin: the
// plugin sent it, or the client found the answer invalid. It is false if that cannot be
// told, because a status without details may come from a broken connection.
func IsAnswer(err error) bool {
	if sent, ok := errors.AsType[*callError](err); ok {
		return sent.answer
	}
	return errors.Is(err, errBroken)
}

// Error returns the text of the driver's own error.
func (e *callError) Error() string { return e.message }

// Unwrap returns the known errors that the driver's own error wrapped.
func (e *callError) Unwrap() []error { return e.wrapped }

func (e *callError) isOfTheRuntime() bool {
	return slices.ContainsFunc(e.wrapped, func(err error) bool {
		return !errors.Is(err, errors.ErrUnsupported) &&
			!errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled)
	})
}

var errBroken = errors.New("the plugin broke its contract")

// broken returns the error for an answer that breaks the contract. It wraps
// ErrUnavailable, so nothing is concluded from the answer.
func broken(format string, args ...any) error {
	return fmt.Errorf("%w: %w: %w", runtime.ErrUnavailable, errBroken, fmt.Errorf(format, args...))
}

// limitText returns s as valid UTF-8, cut at limit bytes.
func limitText(s string, limit int) string {
	if len(s) > limit {
		cut := limit
		for cut > 0 && !utf8.RuneStart(s[cut]) {
			cut--
		}
		s = s[:cut]
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}
