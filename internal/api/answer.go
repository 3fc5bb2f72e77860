package api

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/wire"
)

// answer is the http.ResponseWriter that the API's handlers get: it knows the
// request's ID and remembers, for the log, what was answered.
type answer struct {
	http.ResponseWriter
	requestID string
	store     string // what keeps the sessions, for messages
	status    int    // 0 until the final status is written
	err       error  // what the request failed with
	broken    bool   // the answer cannot be completed
	flush     bool   // send each part of the answer when it is written
}

func newAnswer(w http.ResponseWriter, r *http.Request, store string) *answer {
	id := r.Header.Get(wire.HeaderRequestID)
	if !saneRequestID(id) {
		id = uuid.NewString()
	}
	w.Header().Set(wire.HeaderRequestID, id)
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	return &answer{ResponseWriter: w, requestID: id, store: store}
}

// saneRequestID accepts what can stand in a log line and in a shell as it is.
func saneRequestID(id string) bool {
	const allowed = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-._"
	return id != "" && len(id) <= maxRequestID && strings.Trim(id, allowed) == ""
}

// Unwrap lets an http.ResponseController through.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// WriteHeader begins an answer, or writes an interim one. Each write has a limit
// of its own. A server's WriteTimeout would count the time that a blocking read
// waits.
func (a *answer) WriteHeader(status int) {
	if status >= http.StatusOK {
		a.status = status
	}
	a.writeLimit()
	a.ResponseWriter.WriteHeader(status)
}

// writeLimit gives the caller this long to take what is written next.
func (a *answer) writeLimit() {
	// A writer without deadlines is a test's; there is nothing to do about it.
	_ = http.NewResponseController(a.ResponseWriter).SetWriteDeadline(time.Now().Add(writeLimit))
}

// Write implements io.Writer.
func (a *answer) Write(p []byte) (int, error) {
	if a.status == 0 {
		a.WriteHeader(http.StatusOK)
	}
	a.writeLimit()
	n, err := a.ResponseWriter.Write(p)
	if err == nil && a.flush {
		err = http.NewResponseController(a.ResponseWriter).Flush()
	}
	return n, err
}

// readLimit gives the caller this long to send the rest of the request, or any
// time where limit is 0. Once a body is read the limit must go: net/http keeps
// reading, to notice a caller who leaves.
func (a *answer) readLimit(limit time.Duration) {
	var deadline time.Time
	if limit > 0 {
		deadline = time.Now().Add(limit)
	}
	// As in WriteHeader.
	_ = http.NewResponseController(a.ResponseWriter).SetReadDeadline(deadline)
}

// writeJSON answers with body. It fails only before anything is written: a
// caller who is gone by then needs no answer.
func writeJSON(w http.ResponseWriter, status int, body any) error {
	var buf bytes.Buffer
	encoder := json.NewEncoder(&buf)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(body); err != nil {
		return err
	}
	writeBytes(w, status, buf.Bytes())
	return nil
}

func writeBytes(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(body) // fails only where the caller is gone
}

// fail answers with an error. If the answer has begun, it is cut off instead.
func fail(w http.ResponseWriter, err error) {
	ans, ok := w.(*answer)
	var store string
	if ok {
		store = ans.store
		if ans.status != 0 {
			ans.err, ans.broken = err, true
			return
		}
	}
	e := errorFor(err, store)
	body := wire.ErrorAnswer{Error: e.wire(), Session: e.session}
	if ok {
		ans.err = err
		body.Error.RequestID = ans.requestID
	}
	if e.retryAfter > 0 {
		w.Header().Set("Retry-After", retryAfterHeader(e.retryAfter))
	}
	_ = writeJSON(w, e.status, body) // strings and a session always encode
}
