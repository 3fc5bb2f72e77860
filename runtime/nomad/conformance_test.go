package nomad_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/stack"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/conformance"
)

func TestConformance_raw_exec(t *testing.T) { conform(t, rawExec(t, nil), nil) }

func TestConformance_docker(t *testing.T) {
	template, err := jobs.Load("docker", map[string]string{"image": stack.DockerForTest(t)})
	must.NoError(t, err)
	conform(t, template, nil)
}

// The exec driver sees of this machine what Nomad's client was told to show.
func TestConformance_exec(t *testing.T) {
	if os.Geteuid() != 0 && os.Getenv("CI") == "" {
		t.Skip("the exec driver needs a client that is root")
	}
	n := stack.NomadForTest(t)
	must.NoError(t, stack.BuildBivouac(t.Context(), filepath.Join(n.ExecDir, "bivouac")))
	template, err := jobs.Load("exec", map[string]string{
		"command":     "/usr/local/bin/bivouac",
		"args":        `["demo-sandbox"]`,
		"volume_root": n.VolumeDir,
	})
	must.NoError(t, err)
	conform(t, template, func(t *testing.T) string {
		dir := filepath.Join(n.VolumeDir, uuid.NewString())
		must.NoError(t, os.Mkdir(dir, 0o755)) // for the user nobody
		return dir
	})
}

// conform runs the suite on the shared Nomad.
func conform(t *testing.T, template *jobs.Template, volume func(*testing.T) string) {
	client, err := stack.NomadForTest(t).Client()
	must.NoError(t, err)
	driver := open(t, client, template, "test-"+uuid.NewString())
	conformance.Run(t, conformance.Harness{
		Open: func(*testing.T) runtime.Driver { return driver.Driver },
		Kill: func(t *testing.T, sandbox runtime.Sandbox) {
			opts := (&api.QueryOptions{}).WithContext(within(t, 10*time.Second))
			alloc, _, err := client.Allocations().Info(sandbox.ContainerID, opts)
			must.NoError(t, err)
			must.NoError(t, client.Allocations().Signal(alloc, opts, "sandbox", "SIGKILL"))
		},
		Leftovers: func(t *testing.T, sessionID string) []string {
			job, _, err := client.Jobs().Info(jobs.ID(sessionID), nil)
			if err != nil || job.Meta[jobs.MetaTombstone] != "" {
				return nil
			}
			return []string{"job " + *job.ID}
		},
		Volume: volume,
		Demo:   true,
	})
}
