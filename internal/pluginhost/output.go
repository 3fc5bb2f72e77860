package pluginhost

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/hashicorp/go-hclog"
)

// The limits of what a plugin may write to the host's log. Lines over the limit are
// read, dropped and counted, so that the plugin never blocks on its output.
const (
	maxLine        = 8 << 10 // bytes
	maxLines       = 500     // within outputWindow
	maxValues      = 32      // beside a line's message
	tailLines      = 5
	outputWindow   = time.Second
	outputDropNote = "the plugin prints too much; lines were dropped"
)

// lineBreaks matches line breaks with the space around them.
var lineBreaks = regexp.MustCompile(`\s*[\n\r\v\f\x{85}\x{2028}\x{2029}]\s*`)

// output turns what a plugin prints into lines of the host's log. Lines in hclog's JSON
// form keep their level and values. Other lines are logged as they are.
//
// go-plugin could do this too, but a line such as {"@message":1} makes it panic.
type output struct {
	logger hclog.Logger
	now    func() time.Time

	mu      sync.Mutex
	window  time.Time // when the current window began
	lines   int       // logged in the current window
	dropped int       // dropped but not yet reported
	tail    []string  // the last lines at info level or above, in plain text
	panic   string    // the line with which a Go program crashes; its stack follows
}

func newOutput(logger hclog.Logger) *output {
	return &output{logger: logger, now: time.Now}
}

// copy logs the lines of r until it ends.
func (o *output) copy(r io.Reader) {
	buffered := bufio.NewReaderSize(r, maxLine)
	for {
		line, err := buffered.ReadSlice('\n')
		cut := errors.Is(err, bufio.ErrBufferFull)
		if len(line) > 0 {
			o.line(line, cut)
		}
		for errors.Is(err, bufio.ErrBufferFull) {
			_, err = buffered.ReadSlice('\n')
		}
		if err != nil {
			o.flush()
			return
		}
	}
}

// Write logs p, which a plugin printed through go-plugin. A line that arrives in pieces
// is logged in pieces.
func (o *output) Write(p []byte) (int, error) {
	for line := range bytes.Lines(p) {
		for part := range slices.Chunk(line, maxLine) {
			o.line(part, false)
		}
	}
	return len(p), nil
}

func (o *output) line(line []byte, cut bool) {
	line = bytes.TrimRight(line, "\r\n")
	if len(line) == 0 {
		return
	}
	entry, ok := parseEntry(line)
	if !ok {
		entry = plainEntry(string(line))
	}
	if cut {
		entry.message += " [cut]"
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.remember(entry)
	if o.admit() {
		o.logger.Log(entry.level, entry.message, entry.values...)
	}
}

func (o *output) remember(e entry) {
	if e.level < hclog.Info {
		return
	}
	if o.panic == "" && isPanic(e.message) {
		o.panic = e.message
	}
	o.tail = append(o.tail, e.message)
	o.tail = o.tail[max(0, len(o.tail)-tailLines):]
}

func isPanic(line string) bool {
	return strings.HasPrefix(line, "panic: ") || strings.HasPrefix(line, "fatal error: ")
}

// admit reports whether one more line may be logged now.
func (o *output) admit() bool {
	if now := o.now(); now.Sub(o.window) >= outputWindow {
		o.window, o.lines = now, 0
		o.tellDropped()
	}
	if o.lines++; o.lines > maxLines {
		o.dropped++
		return false
	}
	return true
}

func (o *output) tellDropped() {
	if o.dropped > 0 {
		o.logger.Warn(outputDropNote, "lines", o.dropped)
		o.dropped = 0
	}
}

func (o *output) flush() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.tellDropped()
}

// last returns the end of what was printed, in one line. That is usually why a program
// died.
func (o *output) last() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	text := o.panic
	if text == "" {
		text = strings.Join(o.tail, " / ")
	}
	const limit = 1 << 10
	return strings.ToValidUTF8(text[max(0, len(text)-limit):], "")
}

type entry struct {
	level   hclog.Level
	message string
	values  []any
}

// parseEntry reads a line in hclog's JSON form.
func parseEntry(line []byte) (entry, bool) {
	var fields map[string]any
	if err := json.Unmarshal(line, &fields); err != nil {
		return entry{}, false
	}
	message, ok := fields["@message"].(string)
	if !ok {
		return entry{}, false
	}
	named, _ := fields["@level"].(string)
	level := hclog.LevelFromString(named)
	if level == hclog.NoLevel || level == hclog.Off {
		level = hclog.Info
	}
	e := entry{level: level, message: printable(message)}
	if module, ok := fields["@module"].(string); ok {
		e.values = append(e.values, "module", printable(module))
	}
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		if strings.HasPrefix(key, "@") || len(e.values) >= 2*maxValues {
			continue
		}
		value, ok := fields[key].(string)
		if !ok {
			text, err := json.Marshal(fields[key])
			if err != nil {
				continue
			}
			value = string(text)
		}
		e.values = append(e.values, printable(key), printable(value))
	}
	return e, true
}

// plainEntry takes the level from the line's first word, such as "[WARN]". Many Go
// programs write it there.
func plainEntry(line string) entry {
	e := entry{level: hclog.Info, message: printable(line)}
	word, _, _ := strings.Cut(line, " ")
	switch {
	case word == "[TRACE]":
		e.level = hclog.Trace
	case word == "[DEBUG]":
		e.level = hclog.Debug
	case word == "[WARN]":
		e.level = hclog.Warn
	case word == "[ERROR]", isPanic(line):
		e.level = hclog.Error
	}
	return e
}

// printable makes text fit for a log and a terminal: one line, without characters that
// cannot be printed. It joins lines with "; ", or with a space after a colon.
func printable(s string) string {
	// Most text is one line, and a plugin may print a lot of it.
	if strings.ContainsAny(s, "\n\r\v\f\u0085\u2028\u2029") {
		s = lineBreaks.ReplaceAllLiteralString(strings.Trim(s, "\r\n"), "; ")
		s = strings.ReplaceAll(s, ":; ", ": ")
	}
	return strings.Map(func(r rune) rune {
		if r == '\t' {
			return ' '
		}
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}
