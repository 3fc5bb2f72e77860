package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"
)

func TestMain(m *testing.M) { os.Exit(Main(m)) }

// bivouac returns the program that sandboxes run. It is built once.
var bivouac = sync.OnceValues(func() (program []byte, err error) {
	dir, err := os.MkdirTemp("", "bivouac-test-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	path := filepath.Join(dir, "bivouac")
	if err := BuildBivouac(context.Background(), path); err != nil {
		return nil, err
	}
	return os.ReadFile(path)
})

// limited returns a context that limits a test to 2 minutes.
func limited(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits until check returns nil.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	must.Wait(t, wait.InitialSuccess(
		wait.ErrorFunc(check),
		wait.Timeout(startLimit),
		wait.Gap(askEvery),
	), must.Sprint(what))
}

// leavesNothing checks that a stopped group has left nothing behind, as the
// package promises.
func leavesNothing(t *testing.T, g *group) {
	t.Helper()
	for _, a := range g.all {
		must.False(t, a.Running(), must.Sprintf("%s runs", a.Name))
	}
	must.DirNotExists(t, g.dir)
	pids, err := ProcessesWith(markName + "=" + g.dir)
	must.NoError(t, err)
	must.SliceEmpty(t, pids, must.Sprint("processes are left"))
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	must.NoError(t, err)
	must.StrNotContains(t, string(mounts), g.dir)
}

// sandbox is a job whose only task answers "here" on a port.
type sandbox struct {
	driver string
	config map[string]any
	env    map[string]string
	to     int // the port inside a container
}

// sandboxes returns one sandbox for each driver, all with the same program.
func sandboxes(t *testing.T, n *Nomad) []sandbox {
	t.Helper()
	return []sandbox{
		rawExecSandbox(t, n),
		{
			driver: "exec",
			config: map[string]any{"command": "/usr/local/bin/bivouac", "args": []string{"demo-sandbox"}},
			env:    map[string]string{"PORT": "${NOMAD_PORT_http}", "BIVOUAC_WORKSPACE": "/"},
		},
		{
			driver: "docker",
			config: map[string]any{
				"image": DockerForTest(t), "ports": []string{"http"}, "force_pull": false,
				"mount": []map[string]any{{"type": "bind", "source": t.TempDir(), "target": "/workspace"}},
			},
			env: map[string]string{"PORT": "8080", "BIVOUAC_BIND": "0.0.0.0"},
			to:  8080,
		},
	}
}

func rawExecSandbox(t *testing.T, n *Nomad) sandbox {
	t.Helper()
	program, err := bivouac()
	must.NoError(t, err)
	bin := filepath.Join(n.ExecDir, "bivouac")
	must.NoError(t, os.WriteFile(bin, program, 0o755))
	return sandbox{
		driver: "raw_exec",
		config: map[string]any{"command": bin, "args": []string{"demo-sandbox"}},
		env:    map[string]string{"PORT": "${NOMAD_PORT_http}", "BIVOUAC_WORKSPACE": "/"},
	}
}

// run registers the sandbox as a job and returns its URL when it answers.
func (s sandbox) run(t *testing.T, client *api.Client) (url string) {
	t.Helper()
	task := api.NewTask("sandbox", s.driver)
	task.Config, task.Env = s.config, s.env
	task.Env["BIVOUAC_SESSION_ID"] = "here"
	tasks := api.NewTaskGroup("sandbox", 1).AddTask(task)
	tasks.Networks = []*api.NetworkResource{{DynamicPorts: []api.Port{{Label: "http", To: s.to}}}}
	job := api.NewBatchJob(t.Name()+s.driver, s.driver, "global", 50).AddTaskGroup(tasks)
	_, _, err := client.Jobs().Register(job, nil)
	must.NoError(t, err)
	eventually(t, s.driver+" answers", func() error {
		allocs, _, err := client.Jobs().Allocations(*job.ID, true, nil)
		if err != nil {
			return err
		}
		if len(allocs) == 0 {
			return errors.New("no allocation yet")
		}
		alloc, _, err := client.Allocations().Info(allocs[0].ID, nil)
		if err != nil {
			return err
		}
		port := alloc.AllocatedResources.Shared.Ports[0]
		url = fmt.Sprintf("http://%s:%d", port.HostIP, port.Value)
		if err := answers(url); err != nil {
			return fmt.Errorf("%s, %v: %w", alloc.ClientStatus, alloc.TaskStates["sandbox"], err)
		}
		return nil
	})
	return url
}

// answers returns nil if the sandbox at that URL answers.
func answers(url string) error {
	res, err := http.Get(url + "/healthz")
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && string(body) != "here" {
		err = fmt.Errorf("somebody else answers: %q", body)
	}
	return err
}
