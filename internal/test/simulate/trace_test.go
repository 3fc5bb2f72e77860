package simulate

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
)

// event is a line of a run's trace. It is formatted only if it is read: a trace
// is always kept, because a seed that failed may not fail again.
type event struct {
	at     time.Duration
	format string
	args   []any
}

func (e event) String() string {
	return fmt.Sprintf("%12v  %s", e.at, fmt.Sprintf(e.format, e.args...))
}

// lines formats the trace, with or without the replicas' logs.
func (w *world) lines(logs bool) []string {
	var lines []string
	for _, e := range w.trace {
		if logs || e.format != logged {
			lines = append(lines, e.String())
		}
	}
	return lines
}

// outcome returns what happened in a run. Lines are sorted, so the order within
// one instant does not matter.
func (w *world) outcome() []string {
	lines := w.lines(false)
	slices.Sort(lines)
	return append(lines, w.violations...)
}

// logged is the format of events that replicas log.
const logged = "%s"

// logLine is a line of a replica's log.
type logLine struct {
	level   hclog.Level
	name    string
	message string
	args    []any
}

func (l logLine) String() string {
	var s strings.Builder
	fmt.Fprintf(&s, "[%s] %s: %s", strings.ToUpper(l.level.String()), l.name, l.message)
	for pair := range slices.Chunk(l.args, 2) {
		fmt.Fprintf(&s, " %v=%v", pair[0], pair[len(pair)-1])
	}
	return s.String()
}

// newLogger returns a logger that writes into the trace.
func (w *world) newLogger(name string) hclog.Logger {
	log := hclog.NewInterceptLogger(&hclog.LoggerOptions{Name: name, Level: hclog.Off})
	log.RegisterSink(sink{w})
	return log
}

type sink struct{ w *world }

// Accept implements [hclog.SinkAdapter].
func (s sink) Accept(name string, level hclog.Level, message string, args ...any) {
	s.w.note(logged, logLine{level, name, message, args})
}
