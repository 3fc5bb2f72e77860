package nomad_test

import (
	"context"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime/nomad"
)

// TestCreate_checks_a_container_once_it_has_started covers Docker's second: a connection
// to a container whose network is not up yet delays the start by a second.
func TestCreate_checks_a_container_once_it_has_started(t *testing.T) {
	t.Parallel()
	withEachCheck(t, func(t *testing.T, template *jobs.Template) {
		client, err := stack.NomadForTest(t).Client()
		must.NoError(t, err)
		var state string // when the check first connects
		var once sync.Once
		driver, err := nomad.New(nomad.Config{
			Client: client, Template: template, Logger: testLogger(t), Instance: "test-" + uuid.NewString(),
			Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
				once.Do(func() { state = containerAt(t.Context(), address) }) // a try's time may be up before docker answers
				return new(net.Dialer).DialContext(ctx, network, address)
			},
		})
		must.NoError(t, err)
		run(t, driver)
		_, err = driver.Create(patiently(t), newSpec(t, replica{Driver: driver}), ignore)
		must.NoError(t, err)
		must.Eq(t, "running", state)
	})
}

// withEachCheck runs a test with the docker template and each kind of readiness check.
func withEachCheck(t *testing.T, test func(*testing.T, *jobs.Template)) {
	t.Helper()
	image := stack.DockerForTest(t)
	for _, check := range []string{"http", "tcp"} {
		t.Run(check, func(t *testing.T) {
			template, err := jobs.Load("docker", map[string]string{"image": image, "ready_type": check})
			must.NoError(t, err)
			test(t, template)
		})
	}
}

// containerAt returns the state of the container that publishes its port at an address.
// It returns "" if there is none.
func containerAt(ctx context.Context, address string) string {
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return err.Error()
	}
	out, err := exec.CommandContext(ctx, "docker", "ps", "--all", "--format={{.State}}", "--filter=publish="+port).CombinedOutput()
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(out))
}

// TestCreate_needs_no_client_that_tells covers a token that may not read logs.
func TestCreate_needs_no_client_that_tells(t *testing.T) {
	t.Parallel()
	withEachCheck(t, func(t *testing.T, template *jobs.Template) {
		p := newProxy(t)
		p.setFault(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
			if !strings.HasPrefix(r.URL.Path, "/v1/client/") {
				return false
			}
			http.Error(w, "Permission denied", http.StatusForbidden)
			return true
		})
		r := openThrough(t, p, template)
		_, err := r.Create(patiently(t), newSpec(t, r), ignore)
		must.NoError(t, err)
	})
}
