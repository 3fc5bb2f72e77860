package simulate

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/shoenig/test/must"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/test/simulate/network"
)

// chunk is how many seeds one process runs.
const chunk = 500

// tally sums up what happened in many runs. It shows that the cases to be
// tested do happen.
type tally struct {
	Runs    int
	Failed  []uint64
	Told    map[string]int // requests and answers
	Faults  map[string]int // faults that took effect
	Changes int            // stored changes that were compared
	Settled time.Duration  // the longest time
	Slowest uint64         // seed of the longest time
}

func newTally() *tally { return &tally{Told: make(map[string]int), Faults: make(map[string]int)} }

func (s *tally) count(w *world) {
	s.Runs++
	if len(w.violations) > 0 {
		s.Failed = append(s.Failed, w.seed)
	}
	for _, c := range w.history {
		s.Told[c.kind+": "+c.told]++
	}
	s.Changes += w.changes
	for what, n := range w.hits.times {
		s.Faults[what] += n
	}
	for what, n := range w.net.Fates() {
		s.Faults[what] += n
	}
	if w.settled > s.Settled {
		s.Settled, s.Slowest = w.settled, w.seed
	}
}

func (s *tally) add(other *tally) {
	s.Runs += other.Runs
	s.Changes += other.Changes
	s.Failed = append(s.Failed, other.Failed...)
	for what, n := range other.Told {
		s.Told[what] += n
	}
	for what, n := range other.Faults {
		s.Faults[what] += n
	}
	if other.Settled > s.Settled {
		s.Settled, s.Slowest = other.Settled, other.Slowest
	}
}

// tallyFile is the environment variable that names the tally file of a process
// that runs a chunk.
const tallyFile = "SIMULATE_TALLY"

func (s *tally) write(t *testing.T) {
	t.Helper()
	path := os.Getenv(tallyFile)
	if path == "" {
		return
	}
	data, err := json.Marshal(s)
	must.NoError(t, err)
	must.NoError(t, os.WriteFile(path, data, 0o600))
}

func (s *tally) String() string {
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	table := func(title string, counts map[string]int) {
		_, _ = fmt.Fprintf(w, "\n%s\ttimes\n", title)
		for _, what := range slices.Sorted(maps.Keys(counts)) {
			_, _ = fmt.Fprintf(w, "%s\t%d\n", what, counts[what])
		}
	}
	table("fault", s.Faults)
	table("asked: told", s.Told)
	_ = w.Flush() // writing to a strings.Builder cannot fail
	fmt.Fprintf(&out, "\n%d runs, %d failed %v. %d changes were compared with what happened. The longest time to settle was %v, of seed %d.\n",
		s.Runs, len(s.Failed), s.Failed, s.Changes, s.Settled, s.Slowest)
	return out.String()
}

// manyRuns is the number of runs in which everything possible should happen at
// least once.
const manyRuns = 1000

// missing returns what should happen in many runs but never did.
func (s *tally) missing() []string {
	faults := append([]string{
		network.RequestsLost, network.RepliesLost, network.RequestsLate, network.RepliesLate,
		network.Failed, network.Refused, network.HeldBack, stoppedByNode, startedTwice, besideNeighbour,
		withPool, warmCreates, failedClaims, strayWarm, unheardWarm,
	}, slices.Concat(kinds, poolKinds)...)
	told := []string{
		"create: created", "create: replaced", "create: reused", "create: conflict", "create: not_placed", "create: not_ready",
		"get: creating", "get: running", "get: stopping", "get: dead", "get: lost", "get: not_found",
		"renew: renewed", "renew: expired", "renew: not_running", "renew: not_found",
		"delete: deleted", "delete: not_found", "delete: not_stopped",
	}
	for _, kind := range []string{"create", "delete"} { // answers that both requests may get
		for _, trouble := range []string{"nothing", "deadline_exceeded", "lock_lost", "store_unavailable", "runtime_unavailable"} {
			told = append(told, kind+": "+trouble)
		}
	}
	return append(
		slices.DeleteFunc(faults, func(what string) bool { return s.Faults[what] > 0 }),
		slices.DeleteFunc(told, func(what string) bool { return s.Told[what] > 0 })...)
}

// share runs many seeds in subprocesses of this program, as many at a time as
// there are processors.
func share(t *testing.T, first, runs uint64) {
	began := time.Now()
	dir := t.TempDir()
	var g errgroup.Group
	g.SetLimit(runtime.NumCPU())
	var files []string
	var busy atomic.Int64 // CPU time
	for from := first; from < first+runs; from += chunk {
		file := filepath.Join(dir, fmt.Sprint(from))
		files = append(files, file)
		g.Go(func() error {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestSimulations$", "-test.timeout=30m")
			cmd.Env = append(os.Environ(), "GOGC=400", fmt.Sprintf("FROM=%d", from),
				fmt.Sprintf("RUNS=%d", min(chunk, first+runs-from)), tallyFile+"="+file)
			out, err := cmd.CombinedOutput()
			if state := cmd.ProcessState; state != nil { // it has run
				busy.Add(int64(state.UserTime() + state.SystemTime()))
			}
			if err != nil {
				t.Errorf("seeds from %d: %v\n%s", from, err, out)
			}
			return nil
		})
	}
	_ = g.Wait() // its functions return no error
	sum := newTally()
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			continue // that process has failed and reported why
		}
		var part tally
		must.NoError(t, json.Unmarshal(data, &part))
		sum.add(&part)
	}
	t.Logf("%s%v on %d processors, of which it used %v", sum, time.Since(began).Round(time.Second),
		runtime.NumCPU(), time.Duration(busy.Load()).Round(time.Second))
	if runs >= manyRuns {
		must.Eq(t, "", strings.Join(sum.missing(), ", "), must.Sprint("what never came about"))
	}
}
