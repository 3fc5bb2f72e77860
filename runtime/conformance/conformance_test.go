package conformance_test

import (
	"context"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/conformance"
)

// harness is that of a driver which wrap makes of a sound one, anew for each of
// its processes.
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
	report, ok := verify(t, soundHarness())
	must.True(t, ok, must.Sprint(report))
	must.StrContains(t, report, "creates a sandbox that answers\n")
	must.StrContains(t, report, " passed, 0 failed, 0 skipped in ")
}

// What cannot be checked is said, with what is missing.
func TestVerify_says_why_it_skips(t *testing.T) {
	bare := conformance.Harness{Open: soundHarness().Open}
	report, ok := verify(t, bare)
	must.True(t, ok, must.Sprint(report))
	for requirement, why := range map[string]string{
		"sees a sandbox die":                     "a sandbox that ends by itself: run bivouac demo-sandbox in the sandboxes and say so (-demo, Demo), or give the hook Kill",
		"reports a death to a watcher":           "a sandbox that ends by itself",
		"tells of a sandbox that fails":          "hook Failing",
		"gives up on a slow sandbox":             "hook Slow",
		"outlives a restart":                     "a way to restart the driver: hook Reopen",
		"leaks nothing when it dies in a create": "a way to kill the driver in the middle of a call: hook Crash",
		"passes over what is not its own":        "a driver of another Bivouac beside this one: hook Foreign",
	} {
		must.RegexMatch(t, regexp.MustCompile(`(?m)^SKIP +0.00 s  `+requirement+`\n.*\n +skipped: to check this takes .*`+regexp.QuoteMeta(why)), report)
	}
}

func TestVerify_ends_with_its_context(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	ok, err := conformance.Verify(ctx, soundHarness(), &strings.Builder{})
	must.ErrorIs(t, err, context.Canceled)
	must.False(t, ok)
}

func TestVerify_catches_each_fault(t *testing.T) {
	for _, fault := range faults() {
		t.Run(fault.name, func(t *testing.T) {
			t.Parallel()
			report, ok := verify(t, harness(fault.wrap))
			must.False(t, ok)
			must.Eq(t, fault.caught, verdicts("FAIL", report), must.Sprint(report))
		})
	}
}

// Those who wait in vain are given less time.
func TestVerify_catches_each_fault_of_patience(t *testing.T) {
	for _, fault := range slowFaults() {
		t.Run(fault.name, func(t *testing.T) {
			t.Parallel()
			h := harness(fault.wrap)
			h.Patience = 6 * time.Second
			report, ok := verify(t, h)
			must.False(t, ok)
			must.Eq(t, fault.caught, verdicts("FAIL", report), must.Sprint(report))
		})
	}
}

// A requirement that no wrong driver breaks may as well check nothing.
func TestFaults_break_every_requirement(t *testing.T) {
	report, _ := verify(t, soundHarness())
	caught := map[string]bool{}
	for _, fault := range slices.Concat(faults(), slowFaults()) {
		for _, requirement := range fault.caught {
			caught[requirement] = true
		}
	}
	for _, requirement := range verdicts("PASS", report) {
		must.True(t, caught[requirement], must.Sprintf("no wrong driver breaks %q", requirement))
	}
}

func verify(t *testing.T, h conformance.Harness) (report string, ok bool) {
	t.Helper()
	var out strings.Builder
	ok, err := conformance.Verify(t.Context(), h, &out)
	must.NoError(t, err)
	return out.String(), ok
}

// verdicts returns the requirements that a report says the verdict of.
func verdicts(verdict, report string) []string {
	var names []string
	for _, line := range regexp.MustCompile(`(?m)^`+verdict+` +[0-9.]+ s  (.*)$`).FindAllStringSubmatch(report, -1) {
		names = append(names, line[1])
	}
	return names
}
