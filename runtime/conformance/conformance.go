// Package conformance is the suite of tests that every runtime driver passes:
// those that come with Bivouac, and those of plugin authors. It holds a driver
// to what the runtime package documents and must never know a driver.
//
// A driver's own tests call [Run]:
//
//	func TestConformance(t *testing.T) {
//		conformance.Run(t, conformance.Harness{
//			Open: func(t *testing.T) runtime.Driver { return mydriver.New(...) },
//		})
//	}
package conformance

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
)

// Harness is what the suite needs to know of a driver's surroundings. Only Open
// is required; what is nil leaves out the tests that need it.
type Harness struct {
	// Open returns the driver, ready for use and with room for ten sandboxes.
	// It is called once for each test, and registers what has to be closed
	// with t.Cleanup. It may return the same driver each time.
	Open func(t *testing.T) runtime.Driver

	// Reopen replaces a driver as a restart of its process would, without
	// ending sandboxes. Nil for drivers that remember nothing, since for those
	// a second Open is the same.
	Reopen func(t *testing.T, old runtime.Driver) runtime.Driver

	// Volume returns an empty folder that can be given to sandboxes. Nil means
	// a temporary folder of this machine.
	Volume func(t *testing.T) string

	// Kill ends the sandbox behind the driver's back, as a crash would.
	Kill func(t *testing.T, sandbox runtime.Sandbox)

	// Leftovers names what remains of a session ID outside the driver:
	// processes, jobs, containers, files. A mark that only keeps the ID from
	// being used again does not count.
	Leftovers func(t *testing.T, sessionID string) []string

	// Demo says that what runs is bivouac demo-sandbox, or answers as that
	// does: then the suite asks each sandbox what it was told.
	Demo bool
}

// patience bounds each call. It is generous: the suite is not about speed.
const patience = 60 * time.Second

// Run runs the suite, each promise as a subtest.
func Run(t *testing.T, h Harness) {
	always := true
	for _, test := range []struct {
		name    string
		run     func(*fixture)
		applies bool
	}{
		{"says who it is", saysWhoItIs, always},
		{"creates a sandbox that answers", createsASandbox, always},
		{"creates once however often it is asked", createsOnce, always},
		{"refuses another spec for the same ID", refusesAnotherSpec, always},
		{"creates many at a time", createsMany, always},
		{"carries odd names unharmed", carriesOddNames, always},
		{"stops for good", stopsForGood, always},
		{"deletes without a trace", deletesWithoutTrace, always},
		{"stops what it has never seen", stopsTheUnknown, always},
		{"does not find what is not there", findsNothing, always},
		{"leaves nothing of a create that was given up", leavesNothingOfTheGivenUp, always},
		{"lets a stop overtake a create", letsStopOvertake, always},
		{"ends a list early", endsAListEarly, always},
		{"sees a sandbox die", seesADeath, h.Kill != nil},
		{"reports a death to a watcher", reportsADeath, h.Kill != nil},
		{"outlives a restart", outlivesARestart, h.Reopen != nil},
	} {
		if !test.applies {
			continue
		}
		t.Run(test.name, func(t *testing.T) {
			f := &fixture{T: t, harness: h, driver: h.Open(t)}
			defer f.deleteAll()
			test.run(f)
		})
	}
}

// fixture is one test's driver and the words to speak of it.
type fixture struct {
	*testing.T
	harness Harness
	driver  runtime.Driver
	made    []runtime.Spec
}

// sub runs a part of the test by itself.
func (f *fixture) sub(name string, run func(*fixture)) {
	f.Run(name, func(t *testing.T) {
		sub := &fixture{T: t, harness: f.harness, driver: f.driver}
		defer sub.deleteAll()
		run(sub)
	})
}

// deleteAll comes before t.Cleanup, which may close the driver.
func (f *fixture) deleteAll() {
	for _, spec := range f.made {
		if err := f.driver.Delete(f.patience(), spec.SessionID); err != nil {
			f.Errorf("delete after the test: %v", err)
		}
	}
}

func (f *fixture) volume() string {
	if f.harness.Volume == nil {
		return f.TempDir()
	}
	return f.harness.Volume(f.T)
}

// spec is of a fresh session, whose sandbox is deleted after the test.
func (f *fixture) spec() runtime.Spec {
	now := time.Now().UTC()
	spec := runtime.Spec{
		SessionID:      uuid.NewString(),
		ChatID:         uuid.NewString(),
		AgentID:        "agent-1",
		VolumeHostPath: f.volume(),
		CreatedAt:      now,
		ExpiresAt:      now.Add(time.Hour),
	}
	f.made = append(f.made, spec)
	return spec
}

func (f *fixture) patience() context.Context {
	ctx, cancel := context.WithTimeout(f.Context(), patience)
	f.Cleanup(cancel)
	return ctx
}

func ignore(runtime.Stage) {}

func (f *fixture) create(spec runtime.Spec) runtime.Sandbox {
	f.Helper()
	sandbox, err := f.driver.Create(f.patience(), spec, ignore)
	must.NoError(f, err)
	return sandbox
}

// refusesCreate: the session ID is used up.
func (f *fixture) refusesCreate(spec runtime.Spec) {
	f.Helper()
	_, err := f.driver.Create(f.patience(), spec, ignore)
	must.ErrorIs(f, err, runtime.ErrConflict)
}

func (f *fixture) stop(spec runtime.Spec) {
	f.Helper()
	must.NoError(f, f.driver.Stop(f.patience(), spec.SessionID))
}

func (f *fixture) delete(spec runtime.Spec) {
	f.Helper()
	must.NoError(f, f.driver.Delete(f.patience(), spec.SessionID))
}

func (f *fixture) inspect(spec runtime.Spec) runtime.Sandbox {
	f.Helper()
	sandbox, err := f.driver.Inspect(f.patience(), spec.SessionID)
	must.NoError(f, err)
	return sandbox
}

// listed returns the sandboxes of these specs that are listed, by session ID.
// Others may stand in the list as well: of other tests, or from before.
func (f *fixture) listed(specs ...runtime.Spec) map[string]runtime.Sandbox {
	f.Helper()
	found := map[string]runtime.Sandbox{}
	for sandbox, err := range f.driver.List(f.patience()) {
		must.NoError(f, err)
		for _, spec := range specs {
			if sandbox.SessionID == spec.SessionID {
				must.MapNotContainsKey(f, found, spec.SessionID, must.Sprint("listed twice"))
				found[spec.SessionID] = sandbox
			}
		}
	}
	return found
}

// isGone: nothing is left of the sandbox, as far as anybody can tell.
func (f *fixture) isGone(spec runtime.Spec) {
	f.Helper()
	_, err := f.driver.Inspect(f.patience(), spec.SessionID)
	must.ErrorIs(f, err, runtime.ErrNotFound)
	must.MapEmpty(f, f.listed(spec))
	if f.harness.Leftovers != nil {
		must.SliceEmpty(f, f.harness.Leftovers(f.T, spec.SessionID))
	}
}

// runs: the sandbox is the one of the spec, and its endpoint answers.
func (f *fixture) runs(spec runtime.Spec, sandbox runtime.Sandbox) {
	f.Helper()
	must.Eq(f, spec.SessionID, sandbox.SessionID)
	must.Eq(f, spec.ChatID, sandbox.ChatID)
	must.Eq(f, runtime.StateRunning, sandbox.State)
	must.NotEq(f, "", sandbox.ContainerID)
	must.True(f, sandbox.Endpoint.IsValid())
	must.True(f, answers(sandbox.Endpoint))
	if f.harness.Demo {
		f.wasToldTruth(spec, sandbox)
	}
}

// isDead: nothing of the sandbox runs, and it is said why.
func (f *fixture) isDead(sandbox runtime.Sandbox, endpoint runtime.Endpoint) {
	f.Helper()
	must.Eq(f, runtime.StateDead, sandbox.State)
	must.NotEq(f, "", strings.TrimSpace(sandbox.Reason), must.Sprint("a dead sandbox has a reason"))
	must.False(f, answers(endpoint))
}

func answers(endpoint runtime.Endpoint) bool {
	conn, err := net.DialTimeout("tcp", endpoint.AddrPort().String(), 5*time.Second)
	if err != nil {
		return false
	}
	return conn.Close() == nil
}
