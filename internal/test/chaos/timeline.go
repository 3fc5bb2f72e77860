package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// timeline is the log of what happened, in order.
type timeline struct {
	file *os.File

	mu     sync.Mutex
	out    *bufio.Writer
	recent []entry  // the latest entries
	broken []string // the violations, each with the entries before it
	faults *scores
}

// entry is a line of the log.
type entry struct {
	at   time.Time
	text string
}

const (
	maxRecent = 4000 // entries that are searched for the past of a violation
	maxPast   = 30   // number of them that are printed
	maxBroken = 10   // number of violations that are printed
)

func newTimeline(dir string) (*timeline, error) {
	file, err := os.Create(filepath.Join(dir, "timeline.log"))
	if err != nil {
		return nil, err
	}
	return &timeline{file: file, out: bufio.NewWriter(file), faults: newScores()}, nil
}

func (t *timeline) note(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.add(fmt.Sprintf(format, args...))
}

func (t *timeline) add(text string) {
	now := time.Now()
	line := now.UTC().Format("15:04:05.000") + " " + text
	t.recent = append(t.recent, entry{now, line})
	if len(t.recent) > 2*maxRecent {
		t.recent = append([]entry(nil), t.recent[maxRecent:]...)
	}
	_, _ = fmt.Fprintln(t.out, line) // close returns the error
}

// violation records a violation. about names a chat, a session or a part; the
// entries that mention it, and faults, are printed as its past.
func (t *timeline) violation(kind violation, about, format string, args ...any) {
	t.violationAt(time.Now(), kind, about, format, args...)
}

// violationAt records a violation that was seen at an earlier time and is certain only now.
func (t *timeline) violationAt(at time.Time, kind violation, about, format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := fmt.Sprintf("VIOLATION %s: ", kind) + fmt.Sprintf(format, args...)
	t.add(text)
	t.faults.blame(kind)
	var past []string
	for _, e := range t.recent {
		if !e.at.After(at) && (strings.Contains(e.text, about) || strings.Contains(e.text, "FAULT")) {
			past = append(past, e.text)
		}
	}
	past = past[max(0, len(past)-maxPast):]
	t.broken = append(t.broken, text+"\n    "+strings.Join(past, "\n    "))
	_ = t.out.Flush() // close returns the error
}

func (t *timeline) violations() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.broken)
}

// worst returns the first violations, which often caused the others.
func (t *timeline) worst() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Join(t.broken[:min(len(t.broken), maxBroken)], "\n")
}

func (t *timeline) close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := t.out.Flush()
	if closeErr := t.file.Close(); err == nil {
		err = closeErr
	}
	return err
}
