package nomad_test

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
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

// TestCreate_tells_why_there_is_no_sandbox checks that the error of a Create says in
// Nomad's words what happened, and how the last readiness check ended. Create fails at
// once if the sandbox cannot become ready any more. Delete then leaves nothing, but
// Explain still tells what happened.
func TestCreate_tells_why_there_is_no_sandbox(t *testing.T) {
	t.Parallel()
	const (
		runs    = `in Nomad task "sandbox" is running (started: Task started by client)`
		checked = "; the last readiness check: GET /healthz: "
		refused = checked + "dial tcp 127.0.0.1:"
	)
	self, err := os.Executable()
	must.NoError(t, err)
	sleeps := task("raw_exec", shell("exec sleep 100"), "")
	with := func(old, replacement string) string { return strings.Replace(sleeps, old, replacement, 1) }
	demo := task("docker", `image = IMAGE
			ports = ["http"]
			mount {
				type   = "bind"
				source = session.volume_host_path
				target = "/workspace"
			}`, `env { BIVOUAC_BIND = "0.0.0.0" }`)

	cases := []struct {
		name, body string
		order      string        // to a demo sandbox
		within     time.Duration // the template's limit, if it is reached
		is         error
		says       []string
		tells      []string // what Explain tells, in this order
	}{
		{"a device that no node has", with("memory = 32", "memory = 32\ndevice \"nvidia/gpu\" {}"), "", 0, runtime.ErrNotPlaced, []string{"missing devices rules out 1 node"}, nil},
		{"a constraint that no node meets", `constraint {
			attribute = "${attr.kernel.name}"
			value     = "plan9"
		}
		` + sleeps, "", 0, runtime.ErrNotPlaced, []string{"plan9 rules out 1 node"}, nil},
		{"a driver that no node has", task("no_such_driver", "", ""), "", 0, runtime.ErrNotPlaced, []string{"missing drivers rules out 1 node"}, nil},
		{"more than a node has", with("memory = 32", "memory = 99000000"), "", 0, runtime.ErrNotPlaced, []string{"memory exhausted on 1 node"},
			[]string{"job registered", "not placed: memory exhausted on 1 node; it waits for room"}},

		{"a command that is not there", task("raw_exec", `command = "/no/such/command"`, ""), "", 0, runtime.ErrNotReady, []string{"could not be found"}, nil},
		{"an exit before it is ready", task("raw_exec", shell("sleep 1; exit 3"), ""), "", 0, runtime.ErrNotReady, []string{`task "sandbox" ended: exit code 3`, refused},
			[]string{"job registered", "placed on node ", `task "sandbox": received: `, `task "sandbox": started: `, `task "sandbox": terminated: exit code 3`}},
		{"a success before it is ready", task("raw_exec", shell("exit 0"), ""), "", 0, runtime.ErrNotReady, []string{"exit code 0"}, nil},
		{"a death by a signal", task("raw_exec", shell("kill -9 $$"), ""), "", 0, runtime.ErrNotReady, []string{"signal 9"}, nil},
		// The task ends with exit code 0, which alone would look like success.
		{"a check that restarts it", `service {
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
		` + task("raw_exec", shell("trap 'exit 0' INT; while true; do sleep 0.1; done"), ""), "", 0, runtime.ErrNotReady,
			[]string{"was ended by Nomad to be restarted: healthcheck: check", "unhealthy", refused},
			[]string{`task "sandbox": started: `, `task "sandbox": restart signaled: healthcheck: check`}},

		{"a variable that is missing", task("raw_exec", shell("exec sleep 100"), `template {
			data        = "{{ with nomadVar \"nomad/jobs/no-such\" }}{{ .x }}{{ end }}"
			destination = "local/x"
			change_mode = "noop"
		}`), "", 15 * time.Second, runtime.ErrNotReady,
			[]string{`task "sandbox" is pending (template: Missing: nomad.var.block(nomad/jobs/no-such@default.global))`, refused},
			[]string{`task "sandbox": template: Missing: nomad.var.block(nomad/jobs/no-such@default.global)`}},
		{"a task that has to end first", strings.Replace(task("raw_exec", shell("exec sleep 100"), `lifecycle {
			hook = "prestart"
		}`), `"sandbox"`, `"before"`, 1) + "\n" + sleeps, "", 15 * time.Second, runtime.ErrNotReady,
			[]string{`task "before" is running`, `task "sandbox" is pending (received: Task received by client)`, refused}, nil},
		{"a process that never listens", sleeps, "", 5 * time.Second, runtime.ErrNotReady, []string{"after 5s: " + runs + refused}, nil},
		{"a process that answers with an error", task("raw_exec", shell("exec "+self+" broken-sandbox"), ""), "", 5 * time.Second, runtime.ErrNotReady,
			[]string{runs + checked + `500 Internal Server Error: "no database for"`}, nil},
		{"another process that has the port", task("raw_exec", shell("BIVOUAC_SESSION_ID=other BIVOUAC_WORKSPACE=/tmp exec "+self+" demo-sandbox"), ""), "", 5 * time.Second, runtime.ErrNotReady,
			[]string{runs + checked, `another process has this port: "other"`}, nil},

		{"on docker, an image that is missing", task("docker", `image = "127.0.0.1:1/no/such:image"`, ""), "", 0, runtime.ErrNotReady, []string{"no/such:image"},
			[]string{`task "sandbox": driver: Downloading image 127.0.0.1:1/no/such:image`, `task "sandbox": driver failure: Failed to pull`}},
		{"on docker, an exit before it is ready", demo, "exit", 0, runtime.ErrNotReady, []string{`task "sandbox" ended: exit code 1`}, nil},
		{"on docker, more memory than it may use", demo, "memory", 0, runtime.ErrNotReady, []string{`task "sandbox" ended: exit code 137 (OOM killed)`},
			[]string{`task "sandbox": started: `, `task "sandbox": terminated: exit code 137 (OOM killed)`}},
		{"on docker, a process that never listens", demo, "hang", 5 * time.Second, runtime.ErrNotReady,
			[]string{runs + checked + "the connection was closed without an answer"}, nil},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			body := tc.body
			if strings.HasPrefix(tc.name, "on docker") {
				body = strings.ReplaceAll(body, "IMAGE", strconv.Quote(stack.DockerForTest(t)))
			}
			r := openShared(t, templateOf(t, cmp.Or(tc.within, patience).String(), body))
			spec := newSpec(t, r)
			must.NoError(t, os.WriteFile(filepath.Join(spec.VolumeHostPath, ".demo-sandbox-"+spec.SessionID), []byte(tc.order), 0o644))
			start := time.Now()
			_, err := r.Create(patiently(t), spec, ignore)
			t.Logf("after %v: %v", time.Since(start).Round(time.Millisecond), err)
			must.ErrorIs(t, err, tc.is)
			must.Eq(t, tc.within != 0, errors.Is(err, context.DeadlineExceeded))
			for _, words := range tc.says {
				must.ErrorContains(t, err, words)
			}
			explains(t, r, spec.SessionID, tc.tells...)

			must.NoError(t, r.Delete(patiently(t), spec.SessionID))
			_, err = r.Inspect(t.Context(), spec.SessionID)
			must.ErrorIs(t, err, runtime.ErrNotFound)
			_, _, err = r.client.Jobs().Info(jobs.ID(spec.SessionID), nil)
			must.ErrorContains(t, err, "404")
			explains(t, r, spec.SessionID, append(tc.tells, "job stopped by this Bivouac server", "job removed")...)
		})
	}
}

func TestCreate_tells_that_a_registry_does_not_answer(t *testing.T) {
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

func TestCreate_ends_with_its_caller(t *testing.T) {
	t.Parallel()
	r := openShared(t, templateOf(t, patience.String(), task("raw_exec", shell("exec sleep 100"), "")))
	ctx, cancel := context.WithCancel(t.Context())
	_, err := r.Create(ctx, newSpec(t, r), func(runtime.Stage) { cancel() })
	must.ErrorIs(t, err, context.Canceled)
	must.False(t, isAny(err, runtime.ErrNotReady, runtime.ErrNotPlaced))
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
			var told struct {
				AgentID string `json:"agent_id"`
			}
			must.NoError(t, json.Unmarshal(get(t, sandbox, "/"), &told))
			must.Eq(t, odd, told.AgentID)
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
