package api

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/audit"
	"github.com/bivouac/bivouac/scheduler"
)

// answer is the http.ResponseWriter of the API's handlers. It has the request's ID and
// remembers what was answered, for the log.
type answer struct {
	http.ResponseWriter
	requestID string
	caller    scheduler.Caller // once it is known
	audited   *audit.Operation // nil: not in the audit log
	store     string           // name of the session store, for messages
	status    int              // 0 until the final status is written
	err       error            // why the request failed
	broken    bool             // the answer cannot be completed
	flush     bool             // send each part of the answer when it is written
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

// saneRequestID reports whether an ID can be used in a log line and in a shell without
// quoting.
func saneRequestID(id string) bool {
	const allowed = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-._"
	return id != "" && len(id) <= maxRequestID && strings.Trim(id, allowed) == ""
}

// Unwrap gives http.ResponseController access to the underlying writer.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// WriteHeader begins an answer, or writes an interim one. Each write has its own time
// limit. A server's WriteTimeout would include the time that a blocking read waits.
func (a *answer) WriteHeader(status int) {
	if status >= http.StatusOK {
		a.status = status
	}
	a.writeLimit()
	a.ResponseWriter.WriteHeader(status)
}

// writeLimit sets the deadline for what is written next.
func (a *answer) writeLimit() {
	// Only the writers of tests have no deadlines, so ignore the error.
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

// readLimit sets how long the caller may take to send the rest of the request. 0
// removes the limit. Remove it once the body is read: net/http keeps reading, to notice
// when the caller disconnects.
func (a *answer) readLimit(limit time.Duration) {
	var deadline time.Time
	if limit > 0 {
		deadline = time.Now().Add(limit)
	}
	// As in writeLimit.
	_ = http.NewResponseController(a.ResponseWriter).SetReadDeadline(deadline)
}

// writeJSON sends body as the answer. It returns an error only if nothing has been
// written yet. It ignores errors of writing, because the caller has gone then.
func writeJSON(w http.ResponseWriter, status int, body any) error {
	line, err := jsonLine(body)
	if err != nil {
		return err
	}
	writeBytes(w, status, line)
	return nil
}

// jsonLine returns a value as a line of JSON.
func jsonLine(value any) ([]byte, error) {
	var line bytes.Buffer
	encoder := json.NewEncoder(&line)
	encoder.SetEscapeHTML(false)
	err := encoder.Encode(value)
	return line.Bytes(), err
}

func writeBytes(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(body) //nolint:gosec // JSON with the type of JSON; fails only if the caller has gone
}

// fail sends an error as the answer. If the answer has already begun, it marks the
// answer as broken instead.
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
	if e.status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", `Bearer realm="bivouac"`)
	}
	if e.retryAfter > 0 {
		w.Header().Set("Retry-After", retryAfterHeader(e.retryAfter))
	}
	_ = writeJSON(w, e.status, body) // strings and a session always encode
}
