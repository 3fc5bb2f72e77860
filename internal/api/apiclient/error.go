package apiclient

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/bivouac/bivouac/internal/api/wire"
)

// ErrUnreachable is wrapped by the error of a request that got no answer, unless the
// request's context ended. The server may still have carried out the request.
var ErrUnreachable = errors.New("the server cannot be reached")

// Error is an error that was the answer to a request. Errors of other types mean that
// there was no answer, or that the answer could not be read.
type Error struct {
	Status     int       // the HTTP status
	Code       wire.Code // empty if the answer did not come from a Bivouac server
	Message    string
	Reason     string        // of a conflict: the fields that differ, separated by commas
	Session    *wire.Session // of a conflict: the existing session
	RequestID  string        // as in the server's log
	RetryAfter time.Duration // when to try again; 0 if the server does not say

	body []byte
}

func (e *Error) Error() string {
	switch {
	case e.Code != "":
		return e.Message
	case strings.HasPrefix(string(e.body), needsTLS):
		return "the server uses TLS; use an address that begins with https://"
	default:
		return fmt.Sprintf("unexpected answer: %d %s", e.Status, http.StatusText(e.Status))
	}
}

// needsTLS is how net/http answers a request without TLS on a port with TLS.
const needsTLS = "Client sent an HTTP request to an HTTPS server"

func errorOf(res *http.Response, body []byte) error {
	e := &Error{Status: res.StatusCode, RequestID: res.Header.Get(wire.HeaderRequestID), body: body}
	var answer wire.ErrorAnswer
	// If the body is not JSON of the API, Code stays empty.
	if json.Unmarshal(body, &answer) == nil {
		e.Code, e.Message, e.Reason, e.Session = answer.Error.Code, answer.Error.Message, answer.Error.Reason, answer.Session
	}
	if seconds, err := strconv.Atoi(res.Header.Get("Retry-After")); err == nil {
		e.RetryAfter = time.Duration(seconds) * time.Second
	}
	return e
}
