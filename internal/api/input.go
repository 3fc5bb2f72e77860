package api

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/jsonfields"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/scheduler"
)

var errMediaType = &apiError{
	status: http.StatusUnsupportedMediaType, code: wire.CodeUnsupportedMediaType,
	message: "the Content-Type must be application/json, once, in UTF-8, and without a Content-Encoding",
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %w", scheduler.ErrInvalid, fmt.Errorf(format, args...))
}

func chatID(r *http.Request) (uuid.UUID, error) { return parseChatID(r.PathValue("chat_id")) }

func parseChatID(s string) (uuid.UUID, error) {
	id, err := uuid.Parse(s)
	if err != nil || len(s) != len(id.String()) { // Parse accepts other forms too
		return uuid.Nil, invalid("chat_id is not a UUID in its form of 36 characters")
	}
	return id, nil
}

// receive reads the request's body and replaces it with a copy in memory. A request
// that still waits for its body therefore takes no place; it holds only its connection.
func receive(ans *answer, r *http.Request) error {
	if r.ContentLength == 0 {
		return nil
	}
	text, err := io.ReadAll(http.MaxBytesReader(ans, r.Body, maxBody))
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return invalid("the body is over %d bytes", maxBody)
	}
	if err != nil {
		return invalid("the body could not be read to its end")
	}
	ans.readLimit(0)
	r.Body = io.NopCloser(bytes.NewReader(text))
	return nil
}

// readFields reads a body that is one JSON object of strings. It refuses fields other
// than those in names. A request without a body has no fields.
func readFields(r *http.Request, names ...string) (map[string]string, error) {
	fields, _, err := readObject(r, names, nil)
	return fields, err
}

// readObject works as readFields does, and also reads fields that are objects of
// strings.
func readObject(r *http.Request, names, objectNames []string) (fields map[string]string, objects map[string]map[string]string, err error) {
	text, err := io.ReadAll(r.Body) // in memory, see receive
	if err != nil {
		return nil, nil, invalid("the body could not be read to its end")
	}
	if len(text) == 0 {
		return nil, nil, nil
	}
	if !isJSON(r.Header) {
		return nil, nil, errMediaType
	}
	if fields, objects, err = jsonfields.Parse(string(text), names, objectNames); err != nil {
		return nil, nil, invalid("%w", err)
	}
	return fields, objects, nil
}

// isJSON reports whether a body's headers declare JSON in UTF-8, with one Content-Type
// and no encoding.
func isJSON(header http.Header) bool {
	types := header.Values("Content-Type")
	if len(types) != 1 {
		return false
	}
	mediaType, params, err := mime.ParseMediaType(types[0])
	if err != nil || mediaType != "application/json" {
		return false
	}
	if charset, ok := params["charset"]; ok && !strings.EqualFold(charset, "utf-8") {
		return false
	}
	for _, encoding := range header.Values("Content-Encoding") {
		if !strings.EqualFold(encoding, "identity") {
			return false
		}
	}
	return true
}

// ttl returns 0, which selects the default, if there is no such field.
func ttl(fields map[string]string) (time.Duration, error) {
	s, ok := fields["ttl"]
	if !ok {
		return 0, nil
	}
	return positiveDuration("ttl", s)
}

func positiveDuration(name, s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, invalid(`%s is not a duration such as "30m" or "90s"`, name)
	}
	if d <= 0 {
		return 0, invalid("%s is not more than zero", name)
	}
	return d, nil
}

// query holds a request's query parameters. Each occurs once and is not empty.
type query map[string]string

func parseQuery(raw string, known []string) (query, error) {
	values, err := url.ParseQuery(raw)
	if err != nil {
		return nil, invalid("the query is not well-formed")
	}
	q := make(query, len(values))
	for name, list := range values {
		if !slices.Contains(known, name) {
			return nil, invalid("unknown query parameter %.64q", name)
		}
		if len(list) > 1 {
			return nil, invalid("duplicate query parameter %s", name)
		}
		if list[0] == "" { // for example an unset variable in a script
			return nil, invalid("query parameter %s is empty", name)
		}
		if !utf8.ValidString(list[0]) {
			return nil, invalid("query parameter %s is not UTF-8", name)
		}
		q[name] = list[0]
	}
	return q, nil
}

// defaultPerPage is the page size of a list if the caller sets none.
const defaultPerPage = 100

func (q query) perPage() (int, error) {
	if q["per_page"] == "" {
		return defaultPerPage, nil
	}
	n, err := strconv.Atoi(q["per_page"])
	if err != nil || n < 1 || n > scheduler.MaxPerPage {
		return 0, invalid("per_page is not a number from 1 to %d", scheduler.MaxPerPage)
	}
	return n, nil
}

// The wait of a blocking read.
const (
	defaultWait = 5 * time.Minute
	maxWait     = 10 * time.Minute
)

// block returns the zero Block if the read must not wait. A wait without an index has
// no effect, but block still checks it.
func (q query) block() (scheduler.Block, error) {
	var block scheduler.Block
	wait := defaultWait
	if s := q["wait"]; s != "" {
		var err error
		if wait, err = positiveDuration("wait", s); err != nil {
			return block, err
		}
		if wait > maxWait {
			return block, invalid("wait is over %s", maxWait)
		}
	}
	if s := q["index"]; s != "" {
		index, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return block, invalid("index is not a number as %s has it", wire.HeaderIndex)
		}
		block.Index = index
	}
	if block.Index != 0 {
		block.Wait = wait
	}
	return block, nil
}
