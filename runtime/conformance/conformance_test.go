package conformance_test

import (
	"context"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/conformance"
)

// harness returns a harness whose driver is a sound one, wrapped by wrap. Each
// process of the driver gets a new one.
func harness(wrap func(sound) runtime.Driver) conformance.Harness {
	m := newMachine()
	die := context.CancelFunc(func() {})
	open := func(context.Context) (runtime.Driver, error) {
		dead, cancel := context.WithCancel(context.Background())
		die = cancel
		return wrap(sound{m, "own", dead}), nil
	}
	crash := func(ctx context.Context, _ runtime.Driver) (runtime.Driver, error) {
		die()
		return open(ctx)
	}
	return conformance.Harness{
		Open: open, Reopen: crash, Crash: crash,
		Foreign: func(context.Context) (runtime.Driver, error) {
			return sound{m, "other", context.Background()}, nil
		},
		Demo:     true,
		Patience: 20 * time.Second,
	}
}

func soundHarness() conformance.Harness {
	return harness(func(d sound) runtime.Driver { return d })
}

func TestRun_passes_a_sound_driver(t *testing.T) { conformance.Run(t, soundHarness()) }

func TestVerify_reports_on_a_sound_driver(t *testing.T) {
	results := verify(t, soundHarness())
	must.Eq(t, "says who it is", results[0].Name)
	must.StrContains(t, results[0].Requires, "Info returns a name")
	must.Len(t, len(results), named(conformance.Pass, results), must.Sprint(results))
}

// TestVerify_says_why_it_skips checks that a skipped requirement names what is
// missing.
func TestVerify_says_why_it_skips(t *testing.T) {
	results := verify(t, conformance.Harness{Open: soundHarness().Open})
	must.SliceEmpty(t, named(conformance.Fail, results), must.Sprint(results))
	reasons := map[string]string{}
	for _, r := range results {
		if r.Verdict == conformance.Skip {
			reasons[r.Name] = r.Reason
		}
	}
	wanted := map[string]string{
		"hands over the access token":            "a sandbox that compares tokens: run bivouac demo-sandbox in the sandboxes and say so (-demo, Demo)",
		"sees a sandbox die":                     "a sandbox that ends by itself: run bivouac demo-sandbox in the sandboxes and say so (-demo, Demo), or give the hook Kill",
		"reports a death to a watcher":           "a sandbox that ends by itself",
		"reports a sandbox that fails":           "hook Failing",
		"gives up on a slow sandbox":             "hook Slow",
		"outlives a restart":                     "a way to restart the driver: hook Reopen",
		"leaks nothing when it dies in a create": "a way to kill the driver in the middle of a call: hook Crash",
		"leaves what is not its own alone":       "a driver of another Bivouac beside this one: hook Foreign",
	}
	must.MapLen(t, len(wanted), reasons)
	for requirement, why := range wanted {
		must.StrContains(t, reasons[requirement], why)
	}
}

func TestVerify_runs_what_matches_the_pattern(t *testing.T) {
	results := slices.Collect(conformance.Verify(t.Context(), soundHarness(), regexp.MustCompile("^stops")))
	must.Eq(t, []string{"stops for good", "stops what it has never seen"}, named(conformance.Pass, results))
	must.Len(t, 2, results)
}

func TestVerify_ends_with_its_context(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	must.SliceEmpty(t, slices.Collect(conformance.Verify(ctx, soundHarness(), nil)))
}

func TestVerify_catches_each_fault(t *testing.T) {
	for _, fault := range faults() {
		t.Run(fault.name, func(t *testing.T) {
			t.Parallel()
			results := verify(t, harness(fault.wrap))
			must.Eq(t, fault.caught, named(conformance.Fail, results), must.Sprint(results))
		})
	}
}

// TestVerify_catches_each_fault_of_patience gives drivers that wait too long
// less time.
func TestVerify_catches_each_fault_of_patience(t *testing.T) {
	for _, fault := range slowFaults() {
		t.Run(fault.name, func(t *testing.T) {
			t.Parallel()
			h := harness(fault.wrap)
			h.Patience = 6 * time.Second
			results := verify(t, h)
			must.Eq(t, fault.caught, named(conformance.Fail, results), must.Sprint(results))
		})
	}
}

// TestFaults_break_every_requirement checks that each requirement fails for at
// least one wrong driver. Otherwise it might check nothing.
func TestFaults_break_every_requirement(t *testing.T) {
	caught := map[string]bool{}
	for _, fault := range slices.Concat(faults(), slowFaults()) {
		for _, requirement := range fault.caught {
			caught[requirement] = true
		}
	}
	for _, requirement := range named(conformance.Pass, verify(t, soundHarness())) {
		must.True(t, caught[requirement], must.Sprintf("no wrong driver breaks %q", requirement))
	}
}

func verify(t *testing.T, h conformance.Harness) []conformance.Result {
	t.Helper()
	return slices.Collect(conformance.Verify(t.Context(), h, nil))
}

// named returns the names of the requirements with this verdict.
func named(verdict conformance.Verdict, results []conformance.Result) []string {
	var names []string
	for _, r := range results {
		if r.Verdict == verdict {
			names = append(names, r.Name)
		}
	}
	return names
}
