package nomad_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/internal/demosandbox"
	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/nomad"
)

// TestMain runs the tests, the demo sandbox, the broken one or a spare: the jobs of these tests
// run this binary.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "broken-sandbox" {
		fmt.Fprintln(os.Stderr, runBroken("127.0.0.1:"+os.Getenv("PORT")))
		os.Exit(1)
	}
	if len(os.Args) == 2 && os.Args[1] == "spare-sandbox" {
		fmt.Fprintln(os.Stderr, runSpare("127.0.0.1:"+os.Getenv("PORT")))
		os.Exit(1)
	}
	if len(os.Args) > 1 && os.Args[1] == "demo-sandbox" {
		os.Exit(demosandbox.Main(os.Args[2:], func() error {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return demosandbox.Run(ctx, demosandbox.FromEnv(os.Getenv))
		}))
	}
	os.Exit(stack.Main(m))
}

// runBroken serves a sandbox that never becomes ready.
func runBroken(addr string) error {
	server := &http.Server{Addr: addr, ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "no database for "+os.Getenv("BIVOUAC_ACCESS_TOKEN"), http.StatusInternalServerError)
	})}
	return server.ListenAndServe()
}

// runSpare serves a sandbox that does not need its workspace to start. It answers with
// its session ID, and at /claimed with its session file and the file "notes" of its workspace.
func runSpare(addr string) error {
	server := &http.Server{Addr: addr, ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/claimed" {
			_, _ = fmt.Fprintln(w, os.Getenv("BIVOUAC_SESSION_ID"))
			return
		}
		for _, name := range []string{os.Getenv("BIVOUAC_SESSION_FILE"), filepath.Join(os.Getenv("BIVOUAC_WORKSPACE"), "notes")} {
			text, err := os.ReadFile(name)
			if err != nil {
				http.Error(w, err.Error(), http.StatusNotFound)
				return
			}
			_, _ = w.Write(text)
		}
	})}
	return server.ListenAndServe()
}

// replica is one driver whose Run is running, as in a Bivouac server.
type replica struct {
	*nomad.Driver
	client   *api.Client
	template *jobs.Template
	instance string
}

// patience is how long these tests wait for Nomad, and also for what should
// happen at once. It is long because the machine may be busy.
const patience = 2 * time.Minute

// rawExec returns the raw_exec template with this binary as the command.
func rawExec(t testing.TB, variables map[string]string) *jobs.Template {
	t.Helper()
	self, err := os.Executable()
	must.NoError(t, err)
	all := map[string]string{"command": self, "ready_timeout": patience.String()}
	maps.Copy(all, variables)
	template, err := jobs.Load("raw_exec", all)
	must.NoError(t, err)
	return template
}

// open starts a replica. It stops when the test ends.
func open(t testing.TB, client *api.Client, template *jobs.Template, instance string) replica {
	t.Helper()
	return openWithLegacy(t, client, template, instance, "")
}

// openWithLegacy is like open, for an instance whose older jobs have another
// ID.
func openWithLegacy(t testing.TB, client *api.Client, template *jobs.Template, instance, legacy string) replica {
	t.Helper()
	driver, err := nomad.New(nomad.Config{Client: client, Template: template, Logger: testLogger(t)})
	must.NoError(t, err)
	driver.SetInstance(instance, legacy)
	run(t, driver)
	return replica{driver, client, template, instance}
}

// run runs a driver until the test ends.
func run(t testing.TB, driver *nomad.Driver) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- driver.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		must.ErrorIs(t, <-ended, context.Canceled)
	})
}

func testLogger(t testing.TB) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Output: testWriter{t}, Level: hclog.Debug})
}

// awaitHealth waits until Health returns an error that contains all of the words, or no
// error if there are no words. Health keeps a result for some seconds.
func (r replica) awaitHealth(t testing.TB, words ...string) error {
	t.Helper()
	var health error
	must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.BoolFunc(func() bool {
		health = r.Health(patiently(t))
		if len(words) == 0 {
			return health == nil
		}
		return health != nil && !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(health.Error(), word) })
	})), must.Sprintf("health says %q", words))
	t.Log(health)
	return health
}

// openShared starts a replica with its own instance on the Nomad that all tests
// share.
func openShared(t testing.TB, template *jobs.Template) replica {
	t.Helper()
	client, err := stack.NomadForTest(t).Client()
	must.NoError(t, err)
	return open(t, client, template, "test-"+uuid.NewString())
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}

// newSpec returns the spec of a new session. Its sandbox is deleted after the
// test in any case.
func newSpec(t testing.TB, r replica) runtime.Spec {
	t.Helper()
	now := time.Now().UTC()
	spec := runtime.Spec{
		SessionID:      uuid.NewString(),
		ChatID:         uuid.NewString(),
		AgentID:        "agent-1",
		VolumeHostPath: t.TempDir(),
		CreatedAt:      now,
		ExpiresAt:      now.Add(time.Hour),
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		must.NoError(t, r.Delete(ctx, spec.SessionID))
	})
	return spec
}

// patiently returns a context that is done when the test ends or after
// patience.
func patiently(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func ignore(runtime.Stage) {}

func isAny(err error, targets ...error) bool {
	return slices.ContainsFunc(targets, func(target error) bool { return errors.Is(err, target) })
}
