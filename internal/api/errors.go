package api

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/scheduler"
)

// apiError is an error as the caller sees it. If it has a message, the caller sees
// that message instead of the error's own text, which may contain what only the
// log should have.
type apiError struct {
	status     int
	code       wire.Code
	message    string        // empty: the error's own text
	retryAfter time.Duration // 0: waiting is not known to help
	reason     string        // of a conflict
	session    *wire.Session // of a conflict
}

func (e *apiError) Error() string { return e.message }

func (e *apiError) wire() wire.Error {
	return wire.Error{Code: e.code, Message: e.message, Reason: e.reason}
}

func retryAfterHeader(d time.Duration) string {
	return strconv.Itoa(int(d / time.Second))
}

// Values for Retry-After.
const (
	soon  = 1 * time.Second // another operation on the chat is about to end
	later = 5 * time.Second // something must recover, or capacity must become free
)

var errShuttingDown = &apiError{
	status: http.StatusServiceUnavailable, code: wire.CodeShuttingDown, retryAfter: soon,
	message: "this server is shutting down",
}

// errCredentialExpired ends a request that outlasts its credential.
var errCredentialExpired = &apiError{
	status: http.StatusUnauthorized, code: wire.CodeUnauthenticated,
	message: "the credential expired while the request was waiting; send a new one",
}

// errorFor maps an error to its HTTP answer by its kind. store is the name of the
// session store.
func errorFor(err error, store string) apiError {
	if own, ok := errors.AsType[*apiError](err); ok {
		return *own
	}
	e := byKind(scheduler.Kind(err), errors.Is(err, context.DeadlineExceeded))
	store = cmp.Or(store, "the store of the sessions")
	switch {
	case e.code == wire.CodeStoreUnavailable:
		e.message = withReason(store+" cannot be reached, or its answer is unknown", err)
	case errors.Is(err, scheduler.ErrServerDenied):
		e.message = withReason(store+" refuses the credentials of this server", err)
	}
	if e.message == "" {
		e.message = err.Error()
	}
	if conflict, ok := errors.AsType[*scheduler.ConflictError](err); ok {
		session := wireSession(conflict.Session)
		e.reason, e.session = conflict.Reason, &session
	}
	return e
}

// withReason adds the reason of a [scheduler.UnavailableError] to a message.
func withReason(message string, err error) string {
	if why, ok := errors.AsType[*scheduler.UnavailableError](err); ok {
		return message + ": " + why.Reason
	}
	return message
}

func byKind(kind string, late bool) apiError {
	code := wire.Code(kind)
	switch code {
	case wire.CodeInvalid, wire.CodeRuntimeInvalid:
		return apiError{status: http.StatusBadRequest, code: code}
	case wire.CodeUnauthenticated:
		return apiError{status: http.StatusUnauthorized, code: code}
	case wire.CodePermissionDenied:
		return apiError{status: http.StatusForbidden, code: code}
	case wire.CodeNotFound:
		return apiError{status: http.StatusNotFound, code: code}
	case wire.CodeConflict, wire.CodeExpired, wire.CodeNotRunning, wire.CodeLogsDisabled:
		return apiError{status: http.StatusConflict, code: code}
	case wire.CodeIndexTooOld:
		return apiError{status: http.StatusGone, code: code}
	case wire.CodeUnsupported:
		return apiError{status: http.StatusNotImplemented, code: code,
			message: "the session's runtime cannot do this"}
	case wire.CodeBusy:
		return apiError{status: http.StatusTooManyRequests, code: code, retryAfter: soon}
	case wire.CodeQuotaExceeded:
		return apiError{status: http.StatusTooManyRequests, code: code, retryAfter: later}
	case wire.CodeAuditUnavailable:
		return apiError{status: http.StatusServiceUnavailable, code: code, retryAfter: later,
			message: "nothing was done, because the server cannot write to its audit log"}
	case wire.CodeServerPermissionDenied:
		return apiError{status: http.StatusServiceUnavailable, code: code, retryAfter: later}
	case wire.CodeShuttingDown:
		return *errShuttingDown
	case wire.CodeLockTimeout, wire.CodeLockLost, wire.CodeSandboxConflict:
		return apiError{status: http.StatusServiceUnavailable, code: code, retryAfter: soon}
	case wire.CodeNotPlaced, wire.CodeNotStopped:
		return apiError{status: http.StatusServiceUnavailable, code: code, retryAfter: later}
	case wire.CodeNotReady:
		// A sandbox that took too long may be faster next time. A sandbox that failed
		// to start, because its image is missing or its process exited, will fail again
		// until somebody fixes it. Its error says so.
		if late {
			return apiError{status: http.StatusGatewayTimeout, code: code}
		}
		return apiError{status: http.StatusServiceUnavailable, code: code}
	case wire.CodeStoreUnavailable:
		return apiError{status: http.StatusServiceUnavailable, code: code, retryAfter: later}
	case wire.CodeNewerRecord:
		return apiError{status: http.StatusServiceUnavailable, code: code, retryAfter: later,
			message: "a newer version of Bivouac wrote the chat's record and this replica may not read it: ask another replica, or upgrade this one"}
	case wire.CodeRuntimeUnavailable:
		return apiError{status: http.StatusServiceUnavailable, code: code, retryAfter: later,
			message: "the runtime cannot be reached, or its answer is unknown"}
	case wire.CodeDeadlineExceeded:
		return apiError{status: http.StatusServiceUnavailable, code: code, retryAfter: later,
			message: "the operation took too long"}
	case wire.CodeCanceled:
		return apiError{status: http.StatusServiceUnavailable, code: code, retryAfter: soon,
			message: "the operation was canceled"}
	case wire.CodeDamagedRecord:
		return apiError{status: http.StatusInternalServerError, code: code,
			message: "the chat's record cannot be read; the server's log says why. An operator can repair it: bivouac operator repair CHAT_ID"}
	default:
		return apiError{status: http.StatusInternalServerError, code: wire.CodeInternal,
			message: "internal error; search the server's log for this request ID"}
	}
}
