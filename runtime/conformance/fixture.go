package conformance

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"reflect"
	"runtime/debug"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

// fixture is the driver of one check, with helper methods. A method that does
// not find what it should ends the check by a panic, so call the methods only
// from the check's own goroutine.
type fixture struct {
	ctx     context.Context
	harness Harness
	driver  runtime.Driver
	order   string // the order for the demo sandboxes
	made    []runtime.Spec
	folders []string
	cancels []context.CancelFunc
}

// failure is the panic value that ends a check. withFixture recovers it.
type failure struct{ error }

// notApplicableError ends a check that turns out not to apply.
type notApplicableError string

func (e notApplicableError) Error() string { return string(e) }

// withFixture runs a check and returns why it failed.
func withFixture(ctx context.Context, h Harness, check func(*fixture)) error {
	driver, err := h.Open(ctx)
	if err != nil {
		return fmt.Errorf("open the driver: %w", err)
	}
	return (&fixture{ctx: ctx, harness: h, driver: driver}).attempt(check)
}

// attempt runs a check and then removes everything that it made.
func (f *fixture) attempt(check func(*fixture)) (err error) {
	defer func() { err = errors.Join(err, f.cleanUp()) }()
	defer func() {
		switch caught := recover().(type) {
		case nil:
		case failure:
			err = caught.error
		default: // most likely the driver's fault, and of this check only
			err = fmt.Errorf("panic: %v\n%s", caught, debug.Stack())
		}
	}()
	check(f)
	return nil
}

// cleanUp deletes and removes what the check made, even if the suite is
// interrupted.
func (f *fixture) cleanUp() error {
	f.ctx = context.WithoutCancel(f.ctx)
	var problems []error
	for _, spec := range f.made {
		if err := f.driver.Delete(f.patience(), spec.SessionID); err != nil {
			problems = append(problems, fmt.Errorf("delete after the check: %w", err))
		}
	}
	for _, cancel := range f.cancels {
		cancel()
	}
	for _, folder := range f.folders {
		problems = append(problems, os.RemoveAll(folder))
	}
	return errors.Join(problems...)
}

// sub runs a part of the check with its own cleanup.
func (f *fixture) sub(name string, check func(*fixture)) {
	sub := &fixture{ctx: f.ctx, harness: f.harness, driver: f.driver}
	err := sub.attempt(check)
	f.driver = sub.driver // it may have been replaced
	f.noError(err, name)
}

func (f *fixture) fail(err error) { panic(failure{err}) }

// require ends the check unless ok.
func (f *fixture) require(ok bool, format string, args ...any) {
	if !ok {
		f.fail(fmt.Errorf(format, args...))
	}
}

func (f *fixture) noError(err error, what string) {
	if err != nil {
		f.fail(fmt.Errorf("%s: %w", what, err))
	}
}

func (f *fixture) isError(err, want error, what string) {
	if err == nil {
		f.fail(fmt.Errorf("%s: it succeeded, and must fail with %q", what, want.Error()))
	}
	if !errors.Is(err, want) {
		f.fail(fmt.Errorf("%s: it must fail with %q, and failed with: %w", what, want.Error(), err))
	}
}

// same ends the check if the two values differ.
func same[T any](f *fixture, want, got T, what string) {
	f.require(reflect.DeepEqual(want, got), "%s: %+v, and must be %+v", what, got, want)
}

func (f *fixture) volume() string {
	if f.harness.Volume != nil {
		folder, err := f.harness.Volume(f.ctx)
		f.noError(err, "make a volume")
		return folder
	}
	folder, err := os.MkdirTemp("", "bivouac-conformance-")
	f.noError(err, "make a volume")
	f.folders = append(f.folders, folder)
	return folder
}

// spec returns the spec of a new session. Its sandbox is deleted after the
// check.
func (f *fixture) spec() runtime.Spec {
	now := time.Now().UTC()
	spec := runtime.Spec{
		SessionID:      uuid.NewString(),
		ChatID:         uuid.NewString(),
		AgentID:        "agent-1",
		VolumeHostPath: f.volume(),
		CreatedAt:      now,
		ExpiresAt:      now.Add(time.Hour),
		AccessToken:    newAccessToken(),
	}
	f.made = append(f.made, spec)
	f.giveOrder(spec)
	return spec
}

func newAccessToken() runtime.Secret {
	var b [32]byte
	_, _ = rand.Read(b[:]) // it does not fail
	return runtime.Secret(hex.EncodeToString(b[:]))
}

// limit returns how long a call may take.
func (f *fixture) limit() time.Duration {
	if f.harness.Patience > 0 {
		return f.harness.Patience
	}
	return time.Minute
}

func (f *fixture) patience() context.Context {
	ctx, cancel := context.WithTimeout(f.ctx, f.limit())
	f.cancels = append(f.cancels, cancel)
	return ctx
}

func ignore(runtime.Stage) {}

func (f *fixture) create(spec runtime.Spec) runtime.Sandbox {
	sandbox, err := f.driver.Create(f.patience(), spec, ignore)
	f.noError(err, "Create")
	return sandbox
}

// refusesCreate checks that the session ID cannot be used again.
func (f *fixture) refusesCreate(spec runtime.Spec) {
	_, err := f.driver.Create(f.patience(), spec, ignore)
	f.isError(err, runtime.ErrConflict, "Create after a Stop or Delete")
}

func (f *fixture) stop(spec runtime.Spec) {
	f.noError(f.driver.Stop(f.patience(), spec.SessionID), "Stop")
	f.hasEnded(spec)
}

func (f *fixture) delete(spec runtime.Spec) {
	f.noError(f.driver.Delete(f.patience(), spec.SessionID), "Delete")
	f.hasEnded(spec)
}

func (f *fixture) inspect(spec runtime.Spec) runtime.Sandbox {
	sandbox, err := f.driver.Inspect(f.patience(), spec.SessionID)
	f.noError(err, "Inspect")
	return sandbox
}

// listed returns the listed sandboxes of these specs, by session ID. The list
// may also contain sandboxes of other tests, or older ones.
func (f *fixture) listed(specs ...runtime.Spec) map[string]runtime.Sandbox {
	found := map[string]runtime.Sandbox{}
	for sandbox, err := range f.driver.List(f.patience()) {
		f.noError(err, "List")
		for _, spec := range specs {
			if sandbox.SessionID == spec.SessionID {
				_, twice := found[spec.SessionID]
				f.require(!twice, "List: session %s is listed twice", spec.SessionID)
				found[spec.SessionID] = sandbox
			}
		}
	}
	return found
}

// isGone checks that nothing is left of the sandbox.
func (f *fixture) isGone(spec runtime.Spec) {
	_, err := f.driver.Inspect(f.patience(), spec.SessionID)
	f.isError(err, runtime.ErrNotFound, "Inspect after a Delete")
	f.require(len(f.listed(spec)) == 0, "List: it shows a sandbox that was deleted")
	if f.harness.Leftovers != nil {
		left, err := f.harness.Leftovers(f.ctx, spec.SessionID)
		f.noError(err, "look for what is left")
		f.require(len(left) == 0, "after a Delete there is left: %s", strings.Join(left, ", "))
	}
}

// runs checks that the sandbox belongs to the spec and that its endpoint
// answers.
func (f *fixture) runs(spec runtime.Spec, sandbox runtime.Sandbox) {
	same(f, spec.SessionID, sandbox.SessionID, "the sandbox's session")
	same(f, spec.ChatID, sandbox.ChatID, "the sandbox's chat")
	same(f, runtime.StateRunning, sandbox.State, "the sandbox's state")
	f.require(sandbox.ContainerID != "", "the sandbox has no container ID")
	f.require(sandbox.Endpoint.IsValid(), "the sandbox has no endpoint")
	f.require(f.answers(sandbox.Endpoint), "the sandbox does not answer at %s", sandbox.Endpoint.AddrPort())
	if f.harness.Demo {
		f.wasToldTruth(spec, sandbox)
	}
}

// isDead checks that the sandbox is dead with a reason and that nothing answers
// at its endpoint.
func (f *fixture) isDead(sandbox runtime.Sandbox, endpoint runtime.Endpoint) {
	same(f, runtime.StateDead, sandbox.State, "the state of a sandbox that has ended")
	f.require(strings.TrimSpace(sandbox.Reason) != "", "a dead sandbox gives no reason")
	f.isSilent(sandbox.SessionID, endpoint)
}

// isSilent checks that a sandbox does not answer at its endpoint. Another program may have
// the port by now.
func (f *fixture) isSilent(sessionID string, endpoint runtime.Endpoint) {
	f.require(!f.answers(endpoint) || f.isOther(sessionID, endpoint), "a sandbox that has ended still answers at %s", endpoint.AddrPort())
}

// isOther reports whether the sandbox of another session answers.
func (f *fixture) isOther(sessionID string, endpoint runtime.Endpoint) bool {
	if !f.harness.Demo {
		return false
	}
	status, body, err := f.send(http.MethodGet, runtime.Sandbox{Endpoint: endpoint}, "/healthz", "", "")
	return err == nil && status == http.StatusOK && !bytes.Contains(body, []byte(sessionID))
}

func (f *fixture) answers(endpoint runtime.Endpoint) bool {
	ctx, cancel := context.WithTimeout(f.ctx, 5*time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", endpoint.AddrPort().String())
	if err != nil {
		return false
	}
	return conn.Close() == nil
}
