package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// violation is a kind of event that must not happen.
type violation string

const (
	duplicate violation = "duplicate" // two live sandboxes of one chat
	leak      violation = "leak"      // something is left after everything must have settled
	loss      violation = "loss"      // a session that callers knew ended without a cause
	wrong     violation = "wrong"     // a wrong answer

	twice       violation = "spare given twice"  // to two chats
	spareLeak   violation = "leaked spare"       // it is left after everything must have settled
	silentSpare violation = "spare without life" // a create got a spare that did not answer
)

// blameFor is how long after its end a fault counts as a possible cause.
const blameFor = 30 * time.Second

// scores counts how often each fault came and what followed.
type scores struct {
	mu     sync.Mutex
	byName map[string]*score
	total  score
}

type score struct {
	times    int
	inFlight int
	broken   map[violation]int
	gap      time.Duration // longest time without service
	active   int
	endedAt  time.Time
}

func newScores() *scores {
	return &scores{byName: make(map[string]*score), total: score{broken: make(map[violation]int)}}
}

// begin counts a fault. The function that it returns records the end; a fault
// that hit nothing does not count.
func (s *scores) begin(name string, inFlight int) (end func(hit bool)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	one := s.named(name)
	one.times++
	one.inFlight += inFlight
	one.active++
	s.total.times++
	s.total.inFlight += inFlight
	return func(hit bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if !hit {
			one.times--
			one.inFlight -= inFlight
			s.total.times--
			s.total.inFlight -= inFlight
		}
		one.active--
		one.endedAt = time.Now()
	}
}

func (s *scores) named(name string) *score {
	one := s.byName[name]
	if one == nil {
		one = &score{broken: make(map[violation]int)}
		s.byName[name] = one
	}
	return one
}

func (s *scores) times(name string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.named(name).times
}

// blame counts a violation once in total and once for each fault that may be
// its cause.
func (s *scores) blame(kind violation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total.broken[kind]++
	for _, one := range s.byName {
		if one.active > 0 || time.Since(one.endedAt) < blameFor {
			one.broken[kind]++
		}
	}
}

// silence records a period without service that ends now.
func (s *scores) silence(gap time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total.gap = max(s.total.gap, gap)
	for _, one := range s.byName {
		if one.active > 0 || time.Since(one.endedAt) < gap {
			one.gap = max(one.gap, gap)
		}
	}
}

// report describes the result of a run.
func (w *world) report(took time.Duration) string {
	s := w.log.faults
	s.mu.Lock()
	defer s.mu.Unlock()
	var b strings.Builder
	out := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintf(out, "fault\ttimes provoked\toperations in flight\tduplicates\tleaks after %.0f s\tlosses\twrong answers\tlongest time without service\n", settleLimit.Seconds())
	row := func(name string, one *score) {
		_, _ = fmt.Fprintf(out, "%s\t%d\t%d\t%d\t%d\t%d\t%d\t%.1f s\n", name, one.times, one.inFlight, one.broken[duplicate],
			one.broken[leak], one.broken[loss], one.broken[wrong], one.gap.Seconds())
	}
	for _, name := range slices.Sorted(maps.Keys(s.byName)) {
		row(name, s.byName[name])
	}
	row("all", &s.total)
	_ = out.Flush() // it writes to memory
	if w.pools != nil {
		b.WriteString(w.poolReport(s.total.broken))
	}
	fmt.Fprintf(&b, "\nSeed %d, %s. %s\n", w.plan.seed, took.Round(time.Second), w.load.summary())
	fmt.Fprintf(&b, "Sandboxes seen in /proc: %d; scans: %d, the longest pause between two %s.\n",
		w.census.total(), w.census.scans.Load(), time.Duration(w.census.pause.Load()).Round(time.Millisecond))
	fmt.Fprintf(&b, "Sandboxes that callers had been told of and that ended: %s.\n", w.told.howTheyEnded())
	settled := slices.SortedFunc(slices.Values(w.settled), cmp.Compare[time.Duration])
	if len(settled) > 0 {
		fmt.Fprintf(&b, "Settled %d times after the last fault, in %.1f s at the median and %.1f s at most (limit %s, and %s after a record was deleted).\n",
			len(settled), settled[len(settled)/2].Seconds(), settled[len(settled)-1].Seconds(), settleLimit, adoptLimit)
	}
	fmt.Fprintf(&b, "Creates served in quiet, by every replica for each chat: %d.\n", w.served.Load())
	fmt.Fprintln(&b, w.eventsSummary())
	fmt.Fprintf(&b, "A violation counts for each fault of the last %s before it; the last row counts each once.\n", blameFor)
	return b.String()
}

func (w *world) progress(round int) string {
	s := w.log.faults
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Sprintf("round %d settled in %.1f s: %d faults so far, %d duplicates, %d leaks, %d losses, %d wrong answers; %d of %d creates warm, %d spares given twice, %d leaked, %d given that did not answer",
		round, w.settled[len(w.settled)-1].Seconds(), s.total.times,
		s.total.broken[duplicate], s.total.broken[leak], s.total.broken[loss], s.total.broken[wrong],
		w.load.warm.Load(), w.load.made.Load(), s.total.broken[twice], s.total.broken[spareLeak], s.total.broken[silentSpare])
}
