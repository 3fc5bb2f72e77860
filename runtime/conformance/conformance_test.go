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
		"hands over the access token":                      "a sandbox that compares tokens: run bivouac demo-sandbox in the sandboxes and say so (-demo, Demo)",
		"sees a sandbox die":                               "a sandbox that ends by itself: run bivouac demo-sandbox in the sandboxes and say so (-demo, Demo), or give the hook Kill",
		"reports a death to a watcher":                     "a sandbox that ends by itself",
		"reports a sandbox that fails":                     "hook Failing",
		"gives up on a slow sandbox":                       "hook Slow",
		"outlives a restart":                               "a way to restart the driver: hook Reopen",
		"leaks nothing when it dies in a create":           "a way to kill the driver in the middle of a call: hook Crash",
		"leaves what is not its own alone":                 "a driver of another Bivouac beside this one: hook Foreign",
		"keeps what a sandbox prints":                      "a sandbox that prints: run bivouac demo-sandbox in the sandboxes and say so (-demo, Demo)",
		"reads output from an offset":                      "a sandbox that prints",
		"follows what a sandbox prints":                    "a sandbox that prints",
		"follows only while somebody reads":                "a sandbox that prints",
		"runs a command":                                   "a command to run: run bivouac demo-sandbox in the sandboxes and say so (-demo, Demo)",
		"passes input to a command":                        "a command to run",
		"runs a command in its environment":                "a command to run",
		"runs a command on a terminal":                     "a command to run",
		"runs many commands at a time":                     "a command to run",
		"refuses a command that cannot run":                "a command to run",
		"kills a command whose caller is gone":             "a command to run",
		"kills a command when it dies":                     "a command to run",
		"leaves what a command left behind":                "a command to run",
		"ends what a command left behind with the sandbox": "a command to run",
		"explains what became of a sandbox":                "a sandbox that ends by itself",
		"binds the volume of a claim":                      "a sandbox that tells of itself: run bivouac demo-sandbox in the sandboxes and say so (-demo, Demo)",
		"runs commands in a claimed sandbox":               "a command to run",
		"claims nothing that is dead":                      "a sandbox that ends by itself",
		"keeps claims over a restart":                      "a way to restart the driver: hook Reopen",
	}
	must.MapLen(t, len(wanted), reasons)
	for requirement, why := range wanted {
		must.StrContains(t, reasons[requirement], why)
	}
}

// TestVerify_skips_abilities checks that a driver need not have any ability, nor say so
// before it is asked.
func TestVerify_skips_abilities(t *testing.T) {
	for name, wrap := range map[string]func(sound) runtime.Driver{
		"that the driver lacks":               func(d sound) runtime.Driver { return unable{d} },
		"that a driver behind this one lacks": func(d sound) runtime.Driver { return forwards{unable{d}} },
	} {
		t.Run(name, func(t *testing.T) {
			results := verify(t, harness(wrap))
			must.SliceEmpty(t, named(conformance.Fail, results), must.Sprint(results))
			reasons := map[string]int{}
			for _, r := range results {
				if r.Verdict == conformance.Skip {
					reasons[r.Reason]++
				}
			}
			must.Eq(t, map[string]int{
				"the driver has no Watch, which it need not have":   1,
				"the driver has no Logs, which it need not have":    5,
				"the driver has no Exec, which it need not have":    10,
				"the driver has no Explain, which it need not have": 2,
				"the driver has no Claim, which it need not have":   11,
			}, reasons)
		})
	}
	t.Run("that does not work in these sandboxes", func(t *testing.T) {
		results := verify(t, harness(func(d sound) runtime.Driver { return shellBound{d} }))
		must.SliceEmpty(t, named(conformance.Fail, results), must.Sprint(results))
		for _, r := range results {
			if r.Verdict == conformance.Skip {
				must.StrContains(t, r.Reason, "the driver runs no commands in these sandboxes")
				must.StrContains(t, r.Reason, "there is no shell")
			}
		}
		must.Len(t, 11, named(conformance.Skip, results))
	})
	t.Run("that is only partly there", func(t *testing.T) {
		results := verify(t, harness(func(d sound) runtime.Driver { return plain{d} }))
		must.SliceEmpty(t, named(conformance.Fail, results), must.Sprint(results))
		must.Eq(t, []string{
			"keeps what a sandbox prints", "reads output from an offset", "follows what a sandbox prints",
			"follows only while somebody reads", "has no output of the unknown", "runs a command on a terminal",
		}, named(conformance.Skip, results))
	})
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
			results := verify(t, harness(fault.withoutAbilities))
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
			h := harness(fault.withoutAbilities)
			h.Patience = 6 * time.Second
			results := verify(t, h)
			must.Eq(t, fault.caught, named(conformance.Fail, results), must.Sprint(results))
		})
	}
}

// TestVerify_catches_each_fault_of_abilities checks only the requirements of the abilities
// that a driver has wrong.
func TestVerify_catches_each_fault_of_abilities(t *testing.T) {
	abilities := map[string][]string{} // requirements, by why they are skipped without an ability
	for _, r := range verify(t, harness(func(d sound) runtime.Driver { return unable{d} })) {
		if r.Verdict == conformance.Skip {
			abilities[r.Reason] = append(abilities[r.Reason], r.Name)
		}
	}
	for _, fault := range abilityFaults() {
		t.Run(fault.name, func(t *testing.T) {
			t.Parallel()
			h := harness(fault.wrap)
			h.Patience = 9 * time.Second
			var checked []string
			for _, ability := range abilities {
				if slices.ContainsFunc(ability, func(name string) bool { return slices.Contains(fault.caught, name) }) {
					checked = append(checked, ability...)
				}
			}
			results := slices.Collect(conformance.Verify(t.Context(), h, regexp.MustCompile("^("+strings.Join(checked, "|")+")$")))
			must.Eq(t, fault.caught, named(conformance.Fail, results), must.Sprint(results))
		})
	}
}

// TestFaults_break_every_requirement checks that each requirement fails for at
// least one wrong driver. Otherwise it might check nothing.
func TestFaults_break_every_requirement(t *testing.T) {
	caught := map[string]bool{}
	for _, fault := range slices.Concat(faults(), slowFaults(), abilityFaults()) {
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
