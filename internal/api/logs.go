package api

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

const (
	maxLogLines = 1_000_000 // of tail; more do not fit into what is searched for them
	// logHeartbeat is how often a reader of frames gets a heartbeat.
	logHeartbeat = 10 * time.Second
)

var errNotAcceptable = &apiError{
	status: http.StatusNotAcceptable, code: wire.CodeNotAcceptable,
	message: "the Accept header must allow text/plain or " + wire.TypeFrames,
}

// logs sends the output of a session's sandbox. An answer that is complete says how the
// session was at its end: that of frames in the last frame, that of text in a trailer.
func (a *API) logs(w http.ResponseWriter, r *http.Request, q query) error {
	chat, err := chatID(r)
	if err != nil {
		return err
	}
	query, err := q.logs()
	if err != nil {
		return err
	}
	if r.Method == http.MethodHead {
		query.Follow = false
	}
	out, err := newLogOutput(w, r.Header)
	if err != nil {
		return err
	}
	defer out.close()
	end, err := a.config.Sessions.Logs(r.Context(), chat, query, out.write)
	if end.Session.ChatID != uuid.Nil {
		auditSession(w, end.Session)
	}
	if why, ok := a.endedByServer(r.Context()); ok && err != nil && out.hasBegun() {
		end.State, end.Reason, err = string(end.Session.State), why, nil
	}
	if err != nil {
		return err
	}
	return out.end(end)
}

// endedByServer returns why the server ended a stream that would have gone on.
func (a *API) endedByServer(ctx context.Context) (why string, ok bool) {
	if a.stopping.Err() != nil {
		return "server shutting down", true
	}
	own, ok := errors.AsType[*apiError](context.Cause(ctx))
	if !ok {
		return "", false
	}
	return own.Error(), true
}

// logs reads the query of a log. By default it is all that is kept of stdout.
func (q query) logs() (scheduler.LogQuery, error) {
	query := scheduler.LogQuery{Stream: runtime.Stdout, Task: q["task"], Tail: -1}
	switch s := runtime.LogStream(q["type"]); s {
	case "":
	case runtime.Stdout, runtime.Stderr:
		query.Stream = s
	default:
		return query, invalid("type is neither stdout nor stderr")
	}
	var err error
	if query.Follow, err = q.follow(false); err != nil {
		return query, err
	}
	if s := q["tail"]; s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 || n > maxLogLines {
			return query, invalid("tail is not a number from 0 to %d", maxLogLines)
		}
		query.Tail = n
	}
	return query, nil
}

// follow returns whether a stream goes on with what is new.
func (q query) follow(byDefault bool) (bool, error) {
	switch q["follow"] {
	case "":
		return byDefault, nil
	case "true":
		return true, nil
	case "false":
		return false, nil
	default:
		return false, invalid("follow is neither true nor false")
	}
}

// logOutput is the answer with a log.
type logOutput interface {
	// write sends output. It sends at once that the answer has begun, even if there is
	// no output.
	write(runtime.LogChunk) error
	hasBegun() bool
	// end completes the answer.
	end(scheduler.LogEnd) error
	// close ends what write has started.
	close()
}

// newLogOutput returns an answer of the type that the caller accepts: frames if it names
// them, and otherwise text. It ignores the weights of types.
func newLogOutput(w http.ResponseWriter, header http.Header) (logOutput, error) {
	accepts := map[string]bool{}
	for _, value := range header.Values("Accept") {
		for part := range strings.SplitSeq(value, ",") {
			mediaType, _, _ := strings.Cut(part, ";")
			accepts[strings.ToLower(strings.TrimSpace(mediaType))] = true
		}
	}
	switch {
	case accepts[wire.TypeFrames]:
		return &logFrames{w: w, done: make(chan struct{})}, nil
	case len(accepts) == 0 || accepts["text/plain"] || accepts["text/*"] || accepts["*/*"]:
		return &logText{w: w}, nil
	default:
		return nil, errNotAcceptable
	}
}

// logText sends the output as it is.
type logText struct {
	w     http.ResponseWriter
	begun bool
}

func (t *logText) begin() {
	if !t.begun {
		t.begun = true
		t.w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		t.w.Header().Set("Trailer", wire.TrailerEnd)
	}
}

func (t *logText) write(chunk runtime.LogChunk) error {
	t.begin()
	return writeBody(t.w, chunk.Data)
}

func (t *logText) hasBegun() bool { return t.begun }

func (t *logText) end(end scheduler.LogEnd) error {
	if !t.begun {
		if err := t.write(runtime.LogChunk{}); err != nil {
			return err
		}
	}
	text := end.State
	if end.Reason != "" {
		text += ": " + end.Reason
	}
	t.w.Header().Set(wire.TrailerEnd, printable(clip(text, 1024)))
	return nil
}

func (t *logText) close() {}

// printable makes text fit for a header.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, text)
}

// logFrames sends the output as frames, and heartbeats in between.
type logFrames struct {
	w    http.ResponseWriter
	rest runtime.LogChunk // the beginning of a character; its Data has at most 3 bytes

	done      chan struct{} // closed to end heartbeats
	heartbeat sync.WaitGroup

	mu    sync.Mutex // guards begun, and writes
	begun bool
}

func (f *logFrames) write(chunk runtime.LogChunk) error {
	if len(chunk.Data) == 0 {
		return f.send(struct{}{})
	}
	if len(f.rest.Data) > 0 {
		if chunk.Offset != f.rest.Offset+int64(len(f.rest.Data)) { // the rest of the character was dropped
			if err := f.flush(); err != nil {
				return err
			}
		}
		chunk.Offset -= int64(len(f.rest.Data))
		chunk.Data = slices.Concat(f.rest.Data, chunk.Data)
	}
	whole := wholeCharacters(chunk.Data)
	f.rest = runtime.LogChunk{Offset: chunk.Offset + int64(whole), Data: bytes.Clone(chunk.Data[whole:])}
	if whole == 0 {
		return nil
	}
	return f.sendData(chunk.Offset, chunk.Data[:whole])
}

// wholeCharacters returns the length of text without an incomplete character at its end.
func wholeCharacters(text []byte) int {
	for n := 1; n < utf8.UTFMax && n <= len(text); n++ {
		if last := text[len(text)-n:]; utf8.RuneStart(last[0]) {
			if !utf8.FullRune(last) {
				return len(text) - n
			}
			break
		}
	}
	return len(text)
}

// flush sends the beginning of a character that is not continued.
func (f *logFrames) flush() error {
	rest := f.rest
	f.rest = runtime.LogChunk{}
	if len(rest.Data) == 0 {
		return nil
	}
	return f.sendData(rest.Offset, rest.Data)
}

func (f *logFrames) sendData(offset int64, data []byte) error {
	frame := wire.LogFrame{Offset: offset, Time: time.Now().UTC()}
	if utf8.Valid(data) {
		frame.Data = string(data)
	} else {
		frame.DataBase64 = data
	}
	return f.send(frame)
}

// send sends a frame as a line of JSON. The first one also starts heartbeats.
func (f *logFrames) send(frame any) error {
	line, err := jsonLine(frame)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.begun {
		f.begun = true
		f.w.Header().Set("Content-Type", wire.TypeFrames)
		f.heartbeat.Go(f.beat)
	}
	return writeBody(f.w, line)
}

// beat sends heartbeats.
func (f *logFrames) beat() {
	tick := time.NewTicker(logHeartbeat)
	defer tick.Stop()
	for {
		select {
		case <-f.done:
			return
		case <-tick.C:
		}
		_ = f.send(struct{}{}) // if it fails, so does the next frame
	}
}

func (f *logFrames) hasBegun() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.begun
}

func (f *logFrames) end(end scheduler.LogEnd) error {
	if err := f.flush(); err != nil {
		return err
	}
	return f.send(wire.LogEndFrame{End: wire.LogEnd{State: end.State, Reason: end.Reason}})
}

func (f *logFrames) close() {
	close(f.done)
	f.heartbeat.Wait()
}

// writeBody writes a part of an answer. An answer to HEAD has no body.
func writeBody(w io.Writer, data []byte) error {
	_, err := w.Write(data)
	if errors.Is(err, http.ErrBodyNotAllowed) {
		return nil
	}
	return err
}
