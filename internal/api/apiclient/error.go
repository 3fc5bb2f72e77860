package apiclient

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/bivouac/bivouac/internal/api/wire"
)

// ErrUnreachable is wrapped by the errors of requests that got no answer, other
// than those whose context ended. A request that changes something may have
// been carried out.
var ErrUnreachable = errors.New("the server cannot be reached")

// Error is an answer of the agent that is an error. Errors of other types say
// that there was no answer, or none of an agent's.
type Error struct {
	Status     int       // as in HTTP
	Code       wire.Code // empty where the answer was not an agent's
	Message    string
	Reason     string        // of a conflict: the fields that differ, by comma
	Session    *wire.Session // of a conflict: the one that stands
	RequestID  string        // as in the agent's log
	RetryAfter time.Duration // 0: the agent does not say that waiting helps

	body []byte
}

func (e *Error) Error() string {
	if e.Code == "" {
		return fmt.Sprintf("unexpected answer: %d %s", e.Status, http.StatusText(e.Status))
	}
	return e.Message
}

func errorOf(res *http.Response, body []byte) error {
	e := &Error{Status: res.StatusCode, RequestID: res.Header.Get(wire.HeaderRequestID), body: body}
	var answer wire.ErrorAnswer
	// Not JSON, or not the API's: then Code stays empty, and says so.
	if json.Unmarshal(body, &answer) == nil {
		e.Code, e.Message, e.Reason, e.Session = answer.Error.Code, answer.Error.Message, answer.Error.Reason, answer.Session
	}
	if seconds, err := strconv.Atoi(res.Header.Get("Retry-After")); err == nil {
		e.RetryAfter = time.Duration(seconds) * time.Second
	}
	return e
}
