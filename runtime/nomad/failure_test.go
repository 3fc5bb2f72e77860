package nomad_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// templateOf returns a template whose group contains a port and body.
func templateOf(t *testing.T, timeout, body string) *jobs.Template {
	t.Helper()
	template, err := jobs.Parse("test.hcl", []byte(templateSource(timeout, body)), nil)
	must.NoError(t, err)
	return template
}

func templateSource(timeout, body string) string {
	return `
		ready {
			port       = "http"
			type       = "http"
			path       = "/healthz"
			session_id = true
			timeout    = "` + timeout + `"
		}
		job {
			datacenters = ["*"]
			group "sandbox" {
				network {
					port "http" {}
				}
				ephemeral_disk {
					size = 20
				}
				` + body + `
			}
		}`
}

// task returns a task without logs; more is inserted as further lines of it.
func task(driver, config, more string) string {
	return `task "sandbox" {
		driver = "` + driver + `"
		config {
			` + config + `
		}
		logs {
			disabled      = true
			max_files     = 1
			max_file_size = 1
		}
		resources {
			cpu    = 50
			memory = 32
		}
		` + more + `
	}`
}

func shell(script string) string {
	return `command = "/bin/sh"
			args = ["-c", "` + script + `"]`
}

// TestCreate_tells_why_there_is_no_sandbox checks that Create fails at once
// with Nomad's reason if a sandbox cannot start, and that Delete then leaves
// nothing.
func TestCreate_tells_why_there_is_no_sandbox(t *testing.T) {
	t.Parallel()
	unplaceable := `constraint {
			attribute = "${attr.kernel.name}"
			value     = "plan9"
		}
		` + task("raw_exec", shell("exec sleep 100"), "")
	huge := strings.Replace(task("raw_exec", shell("exec sleep 100"), ""), "memory = 32", "memory = 99000000", 1)
	device := strings.Replace(task("raw_exec", shell("exec sleep 100"), ""), "memory = 32", "memory = 32\ndevice \"nvidia/gpu\" {}", 1)
	cases := []struct {
		name, body string
		is         error
		says       string
	}{
		{"a device that no node has", device, runtime.ErrNotPlaced, "missing devices rules out 1 node"},
		{"a constraint that no node meets", unplaceable, runtime.ErrNotPlaced, "plan9 rules out 1 node"},
		{"a driver that no node has", task("no_such_driver", "", ""), runtime.ErrNotPlaced, "missing drivers rules out 1 node"},
		{"more than a node has", huge, runtime.ErrNotPlaced, "memory exhausted on 1 node"},
		{"a command that is not there", task("raw_exec", `command = "/no/such/command"`, ""), runtime.ErrNotReady, "could not be found"},
		{"an exit before it is ready", task("raw_exec", shell("exit 3"), ""), runtime.ErrNotReady, "exit code 3"},
		{"a success before it is ready", task("raw_exec", shell("exit 0"), ""), runtime.ErrNotReady, "exit code 0"},
		{"a death by a signal", task("raw_exec", shell("kill -9 $$"), ""), runtime.ErrNotReady, "signal 9"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := openShared(t, templateOf(t, patience.String(), tc.body))
			spec := newSpec(t, r)
			start := time.Now()
			_, err := r.Create(patiently(t), spec, ignore)
			t.Logf("after %v: %v", time.Since(start).Round(time.Millisecond), err)
			must.ErrorIs(t, err, tc.is)
			must.ErrorContains(t, err, tc.says)

			must.NoError(t, r.Delete(patiently(t), spec.SessionID))
			_, err = r.Inspect(t.Context(), spec.SessionID)
			must.ErrorIs(t, err, runtime.ErrNotFound)
			_, _, err = r.client.Jobs().Info(jobs.ID(spec.SessionID), nil)
			must.ErrorContains(t, err, "404")
		})
	}
}

func TestCreate_tells_that_an_image_is_missing(t *testing.T) {
	t.Parallel()
	stack.DockerForTest(t)
	r := openShared(t, templateOf(t, patience.String(), task("docker", `image = "127.0.0.1:1/no/such:image"`, "")))
	_, err := r.Create(patiently(t), newSpec(t, r), ignore)
	must.ErrorIs(t, err, runtime.ErrNotReady)
	must.ErrorContains(t, err, "no/such:image")
}

// TestCreate_tells_that_a_volume_is_missing checks who is blamed for a missing
// path. The volume's path comes from the caller, so its absence is the caller's
// mistake, as with other runtimes. A template's own mounts are not the
// caller's.
func TestCreate_tells_that_a_volume_is_missing(t *testing.T) {
	t.Parallel()
	image := stack.DockerForTest(t)
	for _, tc := range []struct {
		name, source string
		is           error
	}{
		{"the volume", "session.volume_host_path", runtime.ErrInvalid},
		{"another mount", `"/no/such/folder"`, runtime.ErrNotReady},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := openShared(t, templateOf(t, patience.String(), task("docker", fmt.Sprintf(`image = %q
			mount {
				type   = "bind"
				source = %s
				target = "/workspace"
			}`, image, tc.source), "")))
			spec := newSpec(t, r)
			must.NoError(t, os.Remove(spec.VolumeHostPath))
			_, err := r.Create(patiently(t), spec, ignore)
			must.ErrorIs(t, err, tc.is)
			must.ErrorContains(t, err, "bind source path does not exist: ")
		})
	}
}

// TestCreate_tells_what_it_waited_for checks the error if the time runs out
// before there is a process. A refused connection then says nothing; the error
// must contain what Nomad still waits for.
func TestCreate_tells_what_it_waited_for(t *testing.T) {
	t.Parallel()
	sleeps := task("raw_exec", shell("exec sleep 100"), "")
	before := strings.Replace(task("raw_exec", shell("exec sleep 100"), `lifecycle {
		hook = "prestart"
	}`), `"sandbox"`, `"before"`, 1)
	waits := task("raw_exec", shell("exec sleep 100"), `template {
		data        = "{{ with nomadVar \"nomad/jobs/no-such\" }}{{ .x }}{{ end }}"
		destination = "local/x"
		change_mode = "noop"
	}`)
	cases := []struct{ name, body, says string }{
		{"a variable that is missing", waits, `task "sandbox" is pending (template: Missing: nomad.var.block(nomad/jobs/no-such@default.global))`},
		{"a task that has to end first", before + "\n" + sleeps, `task "before" is running, task "sandbox" is pending (received: Task received by client)`},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := openShared(t, templateOf(t, "15s", tc.body))
			_, err := r.Create(patiently(t), newSpec(t, r), ignore)
			t.Log(err)
			must.ErrorIs(t, err, runtime.ErrNotReady)
			must.ErrorIs(t, err, context.DeadlineExceeded)
			must.ErrorContains(t, err, tc.says)
			must.ErrorContains(t, err, "connection refused")
		})
	}
	t.Run("a registry that does not answer", func(t *testing.T) {
		t.Parallel()
		stack.DockerForTest(t)
		silent, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
		must.NoError(t, err)
		image := silent.Addr().String() + "/no/such:image"
		r := openShared(t, templateOf(t, "15s", task("docker", `image = "`+image+`"`, "")))
		_, err = r.Create(patiently(t), newSpec(t, r), ignore)
		must.NoError(t, silent.Close()) // until the pull has failed, Nomad cannot end the task
		t.Log(err)
		must.ErrorIs(t, err, runtime.ErrNotReady)
		must.ErrorIs(t, err, context.DeadlineExceeded)
		must.ErrorContains(t, err, `task "sandbox" is pending (driver: Downloading image `+image+`)`)
	})
}

// TestCreate_tells_what_made_a_task_end covers a task that is asked to end and
// does so with exit code 0. The exit code alone would look like success.
func TestCreate_tells_what_made_a_task_end(t *testing.T) {
	t.Parallel()
	r := openShared(t, templateOf(t, patience.String(), `service {
		provider = "nomad"
		port     = "http"
		check {
			type     = "tcp"
			interval = "1s"
			timeout  = "1s"
			check_restart {
				limit = 1
				grace = "5s"
			}
		}
	}
	`+task("raw_exec", shell("trap 'exit 0' INT; while true; do sleep 0.1; done"), "")))
	spec := newSpec(t, r)
	_, err := r.Create(patiently(t), spec, ignore)
	t.Log(err)
	must.ErrorIs(t, err, runtime.ErrNotReady)
	must.ErrorContains(t, err, "was ended by Nomad to be restarted: healthcheck: check")
	must.ErrorContains(t, err, "unhealthy")
	allocs, _, err := r.client.Jobs().Allocations(jobs.ID(spec.SessionID), true, nil)
	must.NoError(t, err)
	must.Len(t, 1, allocs)
	must.Eq(t, uint64(0), allocs[0].TaskStates["sandbox"].Restarts, must.Sprint("it ended, once and for all"))
}

// TestCreate_gives_up_after_the_template_s_limit checks that Create does not
// wait forever for a sandbox that runs but does not answer, and that the error
// says that the time ran out.
func TestCreate_gives_up_after_the_template_s_limit(t *testing.T) {
	t.Parallel()
	r := openShared(t, templateOf(t, "1s", task("raw_exec", shell("exec sleep 100"), "")))
	_, err := r.Create(patiently(t), newSpec(t, r), ignore)
	must.ErrorIs(t, err, runtime.ErrNotReady)
	must.ErrorIs(t, err, context.DeadlineExceeded)
	must.ErrorContains(t, err, "connection refused")
}

func TestCreate_ends_with_its_caller(t *testing.T) {
	t.Parallel()
	r := openShared(t, templateOf(t, patience.String(), task("raw_exec", shell("exec sleep 100"), "")))
	ctx, cancel := context.WithCancel(t.Context())
	_, err := r.Create(ctx, newSpec(t, r), func(runtime.Stage) { cancel() })
	must.ErrorIs(t, err, context.Canceled)
	must.False(t, isAny(err, runtime.ErrNotReady, runtime.ErrNotPlaced))
}

// TestCreate_is_not_taken_in_by_a_foreign_process checks that another process
// on the sandbox's port is not taken for the sandbox.
func TestCreate_is_not_taken_in_by_a_foreign_process(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	must.NoError(t, err)
	// A demo sandbox with another session's ID.
	impostor := task("raw_exec", shell("BIVOUAC_SESSION_ID=other BIVOUAC_WORKSPACE=/tmp exec "+self+" demo-sandbox"), "")
	r := openShared(t, templateOf(t, "5s", impostor))
	_, err = r.Create(patiently(t), newSpec(t, r), ignore)
	must.ErrorIs(t, err, runtime.ErrNotReady)
	must.ErrorContains(t, err, "another process has this port")
}

// TestCreate_refuses_a_job_that_Nomad_rejects checks that a job that Nomad
// never accepts has a different error from one that it cannot run now. Nothing
// is left of it: the job never existed, so no tombstone is needed.
func TestCreate_refuses_a_job_that_Nomad_rejects(t *testing.T) {
	t.Parallel()
	r := openShared(t, templateOf(t, "2s", task("raw_exec", shell("exec sleep 100"), `constraint {
		operator = "no such operator"
	}`)))
	spec := newSpec(t, r)
	_, err := r.Create(patiently(t), spec, ignore)
	must.ErrorIs(t, err, runtime.ErrInvalid)

	must.NoError(t, r.Delete(patiently(t), spec.SessionID))
	_, _, err = r.client.Jobs().Info(jobs.ID(spec.SessionID), nil)
	must.ErrorContains(t, err, "404")
	_, err = r.Create(patiently(t), spec, ignore)
	must.ErrorIs(t, err, runtime.ErrConflict)
}

// TestCreate_delivers_what_looks_like_interpolation checks that text that looks
// like Nomad's interpolation reaches the sandbox unchanged, in every way that
// it is passed.
func TestCreate_delivers_what_looks_like_interpolation(t *testing.T) {
	t.Parallel()
	const odd = "a{node.unique.name}{ if true }$"
	templates := map[string]func(*testing.T) *jobs.Template{
		"raw_exec": func(t *testing.T) *jobs.Template { return rawExec(t, nil) },
		"docker": func(t *testing.T) *jobs.Template {
			template, err := jobs.Load("docker", map[string]string{"image": stack.DockerForTest(t)})
			must.NoError(t, err)
			return template
		},
	}
	for name, template := range templates {
		t.Run(name, func(t *testing.T) {
			r := openShared(t, template(t))
			spec := newSpec(t, r)
			spec.AgentID = odd
			spec.VolumeHostPath = filepath.Join(spec.VolumeHostPath, "{ if true }$: $")
			must.NoError(t, os.Mkdir(spec.VolumeHostPath, 0o755))
			must.NoError(t, os.WriteFile(filepath.Join(spec.VolumeHostPath, "file"), []byte("seen"), 0o644))
			sandbox, err := r.Create(patiently(t), spec, ignore)
			must.NoError(t, err)
			var told map[string]string
			must.NoError(t, json.Unmarshal(get(t, sandbox, "/"), &told))
			must.Eq(t, odd, told["agent_id"])
			must.Eq(t, "seen", string(get(t, sandbox, "/workspace/file")))
			job, _, err := r.client.Jobs().Info(jobs.ID(spec.SessionID), nil)
			must.NoError(t, err)
			must.Eq(t, odd, job.Meta[jobs.MetaAgentID])
		})
	}
}

// TestCreate_is_not_taken_in_by_Docker_s_proxy covers Docker's proxy, which
// accepts connections before the container listens. A sandbox is ready only
// when the container listens.
func TestCreate_is_not_taken_in_by_Docker_s_proxy(t *testing.T) {
	t.Parallel()
	create := func(t *testing.T, order, timeout string) (runtime.Sandbox, error) {
		t.Helper()
		template, err := jobs.Load("docker", map[string]string{
			"image": stack.DockerForTest(t), "ready_type": "tcp", "ready_timeout": timeout,
		})
		must.NoError(t, err)
		r := openShared(t, template)
		spec := newSpec(t, r)
		must.NoError(t, os.WriteFile(filepath.Join(spec.VolumeHostPath, ".demo-sandbox-"+spec.SessionID), []byte(order), 0o644))
		began := time.Now()
		sandbox, err := r.Create(patiently(t), spec, ignore)
		t.Logf("after %v: %v", time.Since(began).Round(time.Millisecond), err)
		return sandbox, err
	}
	t.Run("somebody who listens late", func(t *testing.T) {
		sandbox, err := create(t, "hang 3s", patience.String())
		must.NoError(t, err)
		get(t, sandbox, "/healthz")
	})
	t.Run("nobody", func(t *testing.T) {
		_, err := create(t, "hang", "10s")
		must.ErrorIs(t, err, runtime.ErrNotReady)
		must.ErrorIs(t, err, context.DeadlineExceeded)
	})
}

func get(t *testing.T, sandbox runtime.Sandbox, path string) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(patiently(t), http.MethodGet, "http://"+sandbox.Endpoint.AddrPort().String()+path, nil)
	must.NoError(t, err)
	resp, err := http.DefaultClient.Do(req)
	must.NoError(t, err)
	body, err := io.ReadAll(resp.Body)
	must.NoError(t, err)
	must.NoError(t, resp.Body.Close())
	must.Eq(t, http.StatusOK, resp.StatusCode)
	return body
}
