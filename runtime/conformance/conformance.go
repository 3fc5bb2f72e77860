// Package conformance is the test suite for runtime drivers: Bivouac's own, and those of
// plugin authors. It checks what package runtime documents.
//
// A driver's own tests call [Run]:
//
//	func TestConformance(t *testing.T) {
//		conformance.Run(t, conformance.Harness{
//			Open: func(context.Context) (runtime.Driver, error) { return mydriver.New(...) },
//		})
//	}
//
// A program calls [Verify], which yields the results. The package is part of the
// product, so it imports no testing library.
//
// # The demo sandbox
//
// With Harness.Demo the suite needs no hook to make a sandbox fail, and can check more of
// each sandbox. The program in the sandbox must then
//
//   - answer GET / with a JSON object of session_id, chat_id and agent_id from its
//     environment, and GET /workspace/FILE with a file of the volume. If there is
//     BIVOUAC_SESSION_FILE in its environment, it reads chat and agent from that file at
//     each request, and both are empty as long as there is no such file;
//   - print the body of a POST to /print?stream=stdout or /print?stream=stderr;
//   - say in the field command of GET / with which command it can be run in its sandbox.
//     With -do=ACTIONS appended, that command does what package internal/demosandbox
//     documents, for example locks files of the volume as long as it runs;
//   - answer 401 to a request with "Authorization: Bearer TOKEN" if there is a
//     BIVOUAC_ACCESS_TOKEN in its environment and TOKEN is another. The suite sends the
//     right token with all requests but one, so the program may require it;
//   - exit with an error after a POST to /exit;
//   - look for a file .demo-sandbox-SESSION_ID in the volume when it starts. If there is
//     one, the program locks it with flock(2) for as long as it runs, and exits with an
//     error if another process has the lock. If the file contains "exit", it exits with an
//     error. If the file contains "hang", it runs without ever listening.
//
// # Abilities
//
// What a driver need not have is checked if the driver has it, and skipped with the reason
// otherwise. With Harness.Demo the suite learns without the driver and without a shell in the
// sandbox whether a command has been killed: the command has a file of the volume locked.
//
// The suite does not know any driver.
package conformance

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/bivouac/bivouac/runtime"
)

// Harness is the environment of the driver under test. Only Open is required; a
// requirement whose hook is nil is skipped. A hook's error fails the requirement that
// called it. The context of a hook ends with the requirement, so the suite's caller must
// own what has to outlive it.
type Harness struct {
	// Open returns the driver, ready for use and with room for ten sandboxes. It is called
	// once for each requirement, and may return the same driver each time. The suite does
	// not close the driver.
	Open func(ctx context.Context) (runtime.Driver, error)

	// Reopen replaces a driver as a restart of its process would, without ending its
	// sandboxes. It is nil for drivers without a memory; for those a second Open is the
	// same.
	Reopen func(ctx context.Context, old runtime.Driver) (runtime.Driver, error)

	// Crash ends the driver's process like kill -9, while calls are running, and returns
	// the driver once it is up again.
	Crash func(ctx context.Context, old runtime.Driver) (runtime.Driver, error)

	// Volume returns an empty directory for sandboxes. Nil means a temporary directory of
	// this machine.
	Volume func(ctx context.Context) (string, error)

	// Kill ends the sandbox without the driver, as a crash would.
	Kill func(ctx context.Context, sandbox runtime.Sandbox) error

	// Leftovers returns what remains of a session ID outside the driver: processes, jobs,
	// containers, files. A mark of a used session ID does not count.
	Leftovers func(ctx context.Context, sessionID string) ([]string, error)

	// Failing opens a driver whose sandboxes end at once with an error.
	Failing func(ctx context.Context) (runtime.Driver, error)

	// Slow opens a driver whose sandboxes run but do not answer.
	Slow func(ctx context.Context) (runtime.Driver, error)

	// Foreign opens a driver of another Bivouac instance on the same machine or engine.
	Foreign func(ctx context.Context) (runtime.Driver, error)

	// Demo is true if the sandboxes run bivouac demo-sandbox, or a program that behaves
	// like it. Then the suite checks each sandbox's environment, checks without the driver
	// whether it runs, and does not need Kill, Failing and Slow. See "The demo sandbox" in
	// the package comment.
	Demo bool

	// Unconfined is true if the runtime does not confine its sandboxes, so that a child that
	// a command left in the background may outlive the sandbox. Nomad's raw_exec is such a
	// runtime.
	Unconfined bool

	// Patience bounds each call. Zero means a minute, because the suite does not measure
	// speed.
	Patience time.Duration
}

// requirement is one thing that every driver must do.
type requirement struct {
	name     string
	requires string               // in words for the driver's author
	without  func(Harness) string // what is missing for the check, "" if nothing
	check    func(*fixture)
}

// requirements returns all requirements: those of every driver, the simple ones first,
// and then those of drivers with an ability.
func requirements() []requirement {
	return slices.Concat(requirementsOfAll(), requirementsOfLogs(), requirementsOfExec(), requirementsOfExplain(), requirementsOfClaim())
}

func requirementsOfAll() []requirement {
	return []requirement{
		{"says who it is", "Info returns a name of a-z, 0-9 and '-' and a version, both of at most 64 bytes", nothing, saysWhoItIs},
		{"creates a sandbox that answers", "Create returns once the endpoint answers; Inspect and List then show the same as it returned", nothing, createsASandbox},
		{"hands over the access token", "the sandbox finds the spec's access token in BIVOUAC_ACCESS_TOKEN", needsDemo, handsOverTheToken},
		{"creates once however often it is asked", "a repeated Create returns the existing sandbox", nothing, createsOnce},
		{"refuses another spec for the same ID", "Create with the same session ID and another chat, agent or volume returns ErrConflict", nothing, refusesAnotherSpec},
		{"creates many at a time", "concurrent Creates and Deletes of different sessions do not mix them up", nothing, createsMany},
		{"may be inspected while it starts", "Inspect during a Create returns ErrNotFound, starting or running, for that session only", nothing, inspectsTheStarting},
		{"carries odd names unharmed", "agent IDs and volumes with spaces, quotes, and special characters of shells and templates arrive unchanged", nothing, carriesOddNames},
		{"takes the longest names", "an agent ID of 256 bytes and a volume path of 1000 bytes work", nothing, takesLongNames},
		{"stops for good", "after Stop nothing runs, Inspect returns dead with the reason, and Create returns ErrConflict", nothing, stopsForGood},
		{"deletes without a trace", "after Delete, repeated or not, nothing runs or is found, and Create returns ErrConflict", nothing, deletesWithoutTrace},
		{"stops what it has never seen", "Stop and Delete of an unknown ID succeed, and a later Create returns ErrConflict", nothing, stopsTheUnknown},
		{"does not find what is not there", "Inspect of an unknown ID returns ErrNotFound, even if the ID is similar to that of another sandbox", nothing, findsNothing},
		{"leaves others alone", "Stop and Delete end the sandbox of their ID and no other", nothing, leavesOthersAlone},
		{"leaves nothing of a create that was given up", "a Create whose context ends returns its error. The Delete that follows leaves nothing, and need not wait for that Create", nothing, leavesNothingOfTheGivenUp},
		{"lets a stop overtake a create", "a Stop during a Create ends the sandbox for good", nothing, letsStopOvertake},
		{"ends a list early", "List ends when its caller stops reading", nothing, endsAListEarly},
		{"sees a sandbox die", "Inspect of a sandbox that ended by itself returns dead with the reason", needsKill, seesADeath},
		{"reports a death to a watcher", "Watch, if the driver has it, reports a sandbox that ended by itself", needsKill, reportsADeath},
		{"outlives a restart", "sandboxes keep running, and the driver finds them again, and what it had ended", needsReopen, outlivesARestart},
		{"leaks nothing when it dies in a create", "after kill -9 during a Create a repeat makes no second sandbox, and a Delete leaves nothing", needsCrash, diesInACreate},
		{"reports a sandbox that fails", "Create returns ErrNotReady if the sandbox ends before it answers", needsFailing, tellsOfFailure},
		{"gives up on a slow sandbox", "Create returns soon after its context ended while the sandbox does not answer, and the Delete that follows does too", needsSlow, givesUpTheSlow},
		{"leaves what is not its own alone", "List leaves out the sandboxes of another Bivouac, and no call changes them", needsForeign, passesOverTheForeign},
	}
}

func nothing(Harness) string { return "" }

func needsDemo(h Harness) string {
	return missing(!h.Demo, "a sandbox that compares tokens: run bivouac demo-sandbox in the sandboxes and say so (-demo, Demo)")
}

func needsDemoToTell(h Harness) string {
	return missing(!h.Demo, "a sandbox that tells of itself: run bivouac demo-sandbox in the sandboxes and say so (-demo, Demo)")
}

func needsDemoToPrint(h Harness) string {
	return missing(!h.Demo, "a sandbox that prints: run bivouac demo-sandbox in the sandboxes and say so (-demo, Demo)")
}

func needsDemoToRun(h Harness) string {
	return missing(!h.Demo, "a command to run: run bivouac demo-sandbox in the sandboxes and say so (-demo, Demo)")
}

func needsConfinement(h Harness) string {
	if h.Unconfined {
		return "the runtime does not confine its sandboxes"
	}
	return needsDemoToRun(h)
}

func needsDemoAndCrash(h Harness) string {
	return cmp.Or(needsDemoToRun(h), needsCrash(h))
}

func needsKill(h Harness) string {
	return orDemo(h, h.Kill == nil, "a sandbox that ends by itself", "Kill")
}

func needsFailing(h Harness) string {
	return orDemo(h, h.Failing == nil, "a sandbox that fails at its start", "Failing")
}

func needsSlow(h Harness) string {
	return orDemo(h, h.Slow == nil, "a sandbox that does not answer", "Slow")
}

func needsReopen(h Harness) string {
	return missing(h.Reopen == nil, "a way to restart the driver: hook Reopen")
}

func needsCrash(h Harness) string {
	return missing(h.Crash == nil, "a way to kill the driver in the middle of a call: hook Crash")
}

func needsForeign(h Harness) string {
	return missing(h.Foreign == nil, "a driver of another Bivouac beside this one: hook Foreign")
}

func orDemo(h Harness, isNil bool, what, hook string) string {
	return missing(isNil && !h.Demo, what+": run bivouac demo-sandbox in the sandboxes and say so (-demo, Demo), or give the hook "+hook)
}

func missing(isMissing bool, what string) string {
	if isMissing {
		return "to check this takes " + what
	}
	return ""
}

// TestingT is the part of *testing.T that [Run] uses.
type TestingT[T any] interface {
	Context() context.Context
	Errorf(format string, args ...any)
	Logf(format string, args ...any)
	Run(name string, f func(T)) bool
}

// Run runs the suite. Each requirement that applies is a subtest.
func Run[T TestingT[T]](t T, h Harness) {
	for _, r := range requirements() {
		if r.without(h) != "" {
			continue
		}
		t.Run(r.name, func(t T) {
			switch result := r.try(t.Context(), h); result.Verdict {
			case Fail:
				t.Errorf("required: %s\nbut: %s", result.Requires, result.Reason)
			case Skip:
				t.Logf("does not apply: %s", result.Reason)
			case Pass:
			}
		})
	}
}
