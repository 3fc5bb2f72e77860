//go:build faults

package simulate

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"testing/cryptotest"
	"testing/synctest"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/jobs"
)

// defaultRuns is how many seeds "go test" tries; "make simulate" tries more.
const defaultRuns = 300

// TestSimulations runs the seeds from FROM on, RUNS of them, or the one that
// SEED names, which it then tells all about.
func TestSimulations(t *testing.T) {
	first, runs := number(t, "FROM", 1), number(t, "RUNS", defaultRuns)
	watched := os.Getenv("SEED") != ""
	if watched {
		first, runs = number(t, "SEED", 1), 1
	}
	if runs > chunk {
		share(t, first, runs)
		return
	}
	// With one processor goroutines run in one order. Other runs go in other
	// processes, as a seed decides all randomness of a process.
	t.Cleanup(func(n int) func() { return func() { runtime.GOMAXPROCS(n) } }(runtime.GOMAXPROCS(1)))
	template, err := jobs.Parse("simulation.hcl", []byte(template), nil)
	must.NoError(t, err)
	sum := newTally()
	for seed := first; seed < first+runs; seed++ {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			w := simulate(t, seed, template, watched)
			sum.count(w)
			for _, line := range w.trace {
				t.Log(line)
			}
			if watched || len(w.violations) > 0 {
				t.Log(w.report())
			}
			if len(w.violations) > 0 {
				t.Errorf("seed %d failed; to watch it: make simulate SEED=%d", seed, seed)
			}
		})
	}
	sum.write(t)
}

// simulate carries out the run of a seed.
func simulate(t *testing.T, seed uint64, template *jobs.Template, watched bool) *world {
	cryptotest.SetGlobalRandom(t, seed)
	// The garbage collector's goroutines would come between those of a run.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	var w *world
	synctest.Test(t, func(t *testing.T) { w = run(t, newPlan(seed), template, watched) })
	for _, chat := range w.checkHistory() {
		w.violations = append(w.violations, fmt.Sprintf("chat %d: no order of events explains what callers were told", chat))
	}
	return w
}

// number reads a number from the environment.
func number(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	must.NoError(t, err)
	return n
}

// report tells what happened in a run.
func (w *world) report() string {
	var out strings.Builder
	fmt.Fprintf(&out, "seed %d: %d replicas, %d nodes with room for %d each\n", w.seed, w.hosts, w.nodes, w.capacity)
	fmt.Fprintf(&out, "odds %+v, settled in %v\n", w.odds, w.settled)
	for _, f := range w.faults {
		fmt.Fprintf(&out, "fault: %v\n", f)
	}
	for _, d := range w.deaths {
		fmt.Fprintf(&out, "%12v  session %s: %s\n", d.at, d.sessionID, d.why)
	}
	for _, c := range w.history {
		fmt.Fprintln(&out, c)
	}
	for _, v := range w.violations {
		fmt.Fprintf(&out, "VIOLATED %s\n", v)
	}
	return out.String()
}
