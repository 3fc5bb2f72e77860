package nomad_test

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/node"
	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/internal/test/certs"
	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/conformance"
	"github.com/bivouac/bivouac/runtime/nomad"
)

func TestConformance_raw_exec(t *testing.T) {
	t.Parallel()
	conform(t, rawExec(t, nil), conformance.Harness{Unconfined: true})
}

func TestConformance_docker(t *testing.T) {
	t.Parallel()
	template, err := jobs.Load("docker", map[string]string{"image": stack.DockerForTest(t)})
	must.NoError(t, err)
	conform(t, template, conformance.Harness{})
}

// TestConformance_exec uses the exec driver, whose tasks see only the parts of
// this machine that Nomad's client shows them.
func TestConformance_exec(t *testing.T) {
	t.Parallel()
	stack.NeedServers(t)
	if os.Geteuid() != 0 && os.Getenv("CI") == "" {
		t.Skip("the exec driver needs a client that is root")
	}
	stack.NeedShell(t)
	n := stack.NomadForTest(t)
	must.NoError(t, stack.BuildBivouac(t.Context(), filepath.Join(n.ExecDir, "bivouac")))
	must.NoError(t, stack.AddTools(n.ExecDir))
	template, err := jobs.Load("exec", map[string]string{
		"command":     "/usr/local/bin/bivouac",
		"args":        `["demo-sandbox"]`,
		"volume_root": n.VolumeDir,
	})
	must.NoError(t, err)
	conform(t, template, conformance.Harness{Volume: func(context.Context) (string, error) {
		dir := filepath.Join(n.VolumeDir, uuid.NewString())
		return dir, os.Mkdir(dir, 0o755) // for the user nobody
	}})
}

// conform runs the suite with the shared Nomad. The harness says what is special about a
// template.
func conform(t *testing.T, template *jobs.Template, special conformance.Harness) {
	client, err := stack.NomadForTest(t).Client()
	must.NoError(t, err)
	helper, namespace := nodeHelper(t, client)
	own := openMortal(t, template, "test-"+uuid.NewString(), helper, namespace)
	foreign := openMortal(t, template, "test-"+uuid.NewString(), helper, namespace)
	conformance.Run(t, conformance.Harness{
		Open:    func(context.Context) (runtime.Driver, error) { return own.Driver, nil },
		Foreign: func(context.Context) (runtime.Driver, error) { return foreign.Driver, nil },
		// There is no Reopen: the driver remembers which sandboxes it has
		// deleted only as long as it runs. The comment of Delete says why that
		// is enough.
		Crash: func(context.Context, runtime.Driver) (runtime.Driver, error) {
			own.die()
			own = openMortal(t, template, own.instance, helper, namespace)
			return own.Driver, nil
		},
		Kill: func(ctx context.Context, sandbox runtime.Sandbox) error {
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			opts := (&api.QueryOptions{}).WithContext(ctx)
			alloc, _, err := client.Allocations().Info(sandbox.ContainerID, opts)
			if err != nil {
				return err
			}
			return client.Allocations().Signal(alloc, opts, "sandbox", "SIGKILL")
		},
		Leftovers: func(ctx context.Context, sessionID string) ([]string, error) {
			job, _, err := client.Jobs().Info(jobs.ID(sessionID), (&api.QueryOptions{}).WithContext(ctx))
			if unexpected, ok := errors.AsType[api.UnexpectedResponseError](err); ok && unexpected.StatusCode() == http.StatusNotFound {
				return nil, nil
			}
			if err != nil {
				return nil, err
			}
			if job.Meta[jobs.MetaTombstone] != "" {
				return nil, nil
			}
			return []string{"job " + *job.ID}, nil
		},
		Volume:     special.Volume,
		Unconfined: special.Unconfined,
		Demo:       true,
	})
}

// nodeHelper runs a node helper, and returns a client of it and the namespace in which Nomad
// knows it. Without root there is none, and the requirements of claims do not apply.
func nodeHelper(t *testing.T, client *api.Client) (helper nomad.Helper, namespace string) {
	t.Helper()
	if os.Geteuid() != 0 && os.Getenv("CI") == "" {
		return nil, ""
	}
	ca := certs.NewCA(t)
	files := func(name string) credentials.Files {
		caFile, certFile, keyFile := certs.Write(t, t.TempDir(), ca, ca.Issue(t, name))
		return credentials.Files{CA: caFile, Certificate: certFile, Key: keyFile}
	}
	namespace = helperNamespace(t, client)
	config := node.Config{
		HTTPAddr: runHelpers(t, client, namespace), TLS: files(nodeapi.ServerName), ClientName: nodeapi.ClientName,
		VolumeRoots: []string{os.TempDir(), stack.NomadForTest(t).VolumeDir}, LogLevel: "debug",
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- node.Run(ctx, config, testWriter{t}, nil) }()
	t.Cleanup(func() {
		stop()
		must.NoError(t, <-ended)
	})
	mine, err := credentials.LoadTLS(files(nodeapi.ClientName))
	must.NoError(t, err)
	return nodeapi.New(&http.Client{Transport: &http.Transport{DialTLSContext: mine.Dial(nodeapi.ServerName)}}), namespace
}

// mortal is a replica that can die in the middle of a call. After that, no
// request of it reaches Nomad.
type mortal struct {
	replica
	die context.CancelFunc
}

func openMortal(t *testing.T, template *jobs.Template, instance string, helper nomad.Helper, namespace string) mortal {
	t.Helper()
	alive, die := context.WithCancel(context.Background())
	t.Cleanup(die)
	client, err := api.NewClient(&api.Config{
		Address:    "http://" + stack.NomadForTest(t).Addr(),
		HttpClient: &http.Client{Transport: lifeline{alive, http.DefaultTransport}},
	})
	must.NoError(t, err)
	return mortal{openWithHelper(t, client, template, instance, helper, namespace), die}
}

// lifeline passes requests until its context is done. Then it also cuts what is still
// under way.
type lifeline struct {
	alive context.Context
	http.RoundTripper
}

func (l lifeline) RoundTrip(r *http.Request) (*http.Response, error) {
	if l.alive.Err() != nil {
		return nil, errors.New("the replica is dead")
	}
	response, err := l.RoundTripper.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	body := response.Body // a websocket's too
	context.AfterFunc(l.alive, func() { _ = body.Close() })
	return response, nil
}
