package simulate

import (
	"fmt"
	"os"
	"runtime"
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

// simulate carries out the run of a seed.
func simulate(t *testing.T, seed uint64, template *jobs.Template, verbose bool) *world {
	cryptotest.SetGlobalRandom(t, seed)
	var w *world
	synctest.Test(t, func(t *testing.T) { w = run(t, newPlan(seed), template, verbose) })
	for _, chat := range w.checkHistory() {
		w.violations = append(w.violations, fmt.Sprintf("chat %d: no order of events explains what callers were told", chat))
	}
	return w
}

func TestSimulations(t *testing.T) {
	runtime.GOMAXPROCS(1) // for one order of events; other runs go in other processes
	template, err := jobs.Parse("simulation.hcl", []byte(template), nil)
	must.NoError(t, err)
	first, runs := number(t, "FROM", 1), number(t, "RUNS", defaultRuns)
	verbose := os.Getenv("SEED") != ""
	if verbose {
		first, runs = number(t, "SEED", 1), 1
	}
	for seed := first; seed < first+runs; seed++ {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			w := simulate(t, seed, template, verbose)
			if verbose {
				fmt.Println(strings.Join(w.trace, "\n"))
			}
			if verbose || len(w.violations) > 0 {
				t.Log(w.report())
			}
			if len(w.violations) > 0 {
				t.Fail()
			}
		})
	}
}

// report tells what happened in a run.
func (w *world) report() string {
	var out strings.Builder
	fmt.Fprintf(&out, "seed %d: %d replicas, %d nodes of %d, digest %016x\n",
		w.seed, w.hosts, w.nodes, w.capacity, w.net.Digest())
	fmt.Fprintf(&out, "odds %+v, settled in %v\n", w.odds, w.settled)
	for _, f := range w.faults {
		fmt.Fprintf(&out, "fault %v\n", f)
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
