package jobs_test

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/ready"
)

var update = flag.Bool("update", false, "write the expected jobs anew")

func spec() runtime.Spec {
	return runtime.Spec{
		SessionID:      "0c7a4f9e-6a53-4b4c-9f0c-3b2f5d1e8a77",
		ChatID:         "5f0e3b0e-1f1b-4a43-8a0e-6a7c2f9f5f11",
		AgentID:        "agent-1",
		VolumeHostPath: "/srv/volumes/one",
		CreatedAt:      time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		ExpiresAt:      time.Date(2026, 1, 2, 3, 34, 5, 0, time.UTC),
		Owner:          "team-a",
		Labels:         map[string]string{"ticket": "${node.unique.name} %{x}", "tier": ""},
		AccessToken:    runtime.Secret(strings.Repeat("5e", 32)),
	}
}

func load(t testing.TB, name string, variables map[string]string) *jobs.Template {
	t.Helper()
	template, err := jobs.Load(name, variables)
	must.NoError(t, err)
	return template
}

func jobOf(t testing.TB, template *jobs.Template, spec runtime.Spec) *api.Job {
	t.Helper()
	job, err := template.Job(spec, "prod")
	must.NoError(t, err)
	return job
}

// asJSON is what Nomad is sent, without what is not set.
func asJSON(t testing.TB, job *api.Job) any {
	t.Helper()
	data, err := json.Marshal(job)
	must.NoError(t, err)
	var tree any
	must.NoError(t, json.Unmarshal(data, &tree))
	return pruned(tree)
}

func pruned(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for key, inner := range v {
			if inner = pruned(inner); inner == nil {
				delete(v, key)
			} else {
				v[key] = inner
			}
		}
	case []any:
		for i := range v {
			v[i] = pruned(v[i])
		}
	}
	return v
}

// The embedded templates give exactly the jobs in testdata.
func TestEmbeddedTemplates(t *testing.T) {
	given := map[string]map[string]string{
		"docker":   nil,
		"exec":     {"command": "/usr/local/bin/sandbox"},
		"raw_exec": nil,
	}
	for _, name := range jobs.Names() {
		t.Run(name, func(t *testing.T) {
			got, err := json.MarshalIndent(asJSON(t, jobOf(t, load(t, name, given[name]), spec())), "", "  ")
			must.NoError(t, err)
			got = append(got, '\n')
			file := filepath.Join("testdata", name+".json")
			if *update {
				must.NoError(t, os.WriteFile(file, got, 0o644))
			}
			want, err := os.ReadFile(file)
			must.NoError(t, err)
			must.Eq(t, string(want), string(got))
		})
	}
}

func TestJob_is_the_same_each_time(t *testing.T) {
	template := load(t, "docker", nil)
	must.Eq(t, asJSON(t, jobOf(t, template, spec())), asJSON(t, jobOf(t, template, spec())))
	later := spec()
	later.CreatedAt, later.ExpiresAt = later.CreatedAt.Add(time.Hour), later.ExpiresAt.Add(time.Hour)
	// Other times change the meta that tells them, and nothing else.
	job, moved := jobOf(t, template, spec()), jobOf(t, template, later)
	must.NotEq(t, job.Meta, moved.Meta)
	moved.Meta[jobs.MetaCreatedAt], moved.Meta[jobs.MetaExpiresAt] = job.Meta[jobs.MetaCreatedAt], job.Meta[jobs.MetaExpiresAt]
	must.Eq(t, asJSON(t, job), asJSON(t, moved))
}

func TestSpecOf(t *testing.T) {
	made := func(change func(meta map[string]string)) map[string]string {
		meta := jobOf(t, load(t, "raw_exec", nil), spec()).Meta
		change(meta)
		return meta
	}
	t.Run("returns_what_the_job_was_made_from", func(t *testing.T) {
		got, ok := jobs.SpecOf(made(func(map[string]string) {}))
		must.True(t, ok)
		want := spec()
		want.AccessToken = "" // meta does not have it
		must.Eq(t, want, got)
	})
	t.Run("returns_no_owner_and_no_labels_of_a_job_from_before_them", func(t *testing.T) {
		got, ok := jobs.SpecOf(made(func(meta map[string]string) { delete(meta, jobs.MetaDescription) }))
		must.True(t, ok)
		want := spec()
		want.Owner, want.Labels, want.AccessToken = "", nil, ""
		must.Eq(t, want, got)
	})
	for name, change := range map[string]func(map[string]string){
		"the_job_of_an_older_version": func(meta map[string]string) {
			for _, key := range []string{jobs.MetaVolumeHostPath, jobs.MetaCreatedAt, jobs.MetaExpiresAt} {
				delete(meta, key)
			}
		},
		"a_job_without_a_fingerprint":      func(meta map[string]string) { delete(meta, jobs.MetaSpec) },
		"a_job_whose_chat_was_edited":      func(meta map[string]string) { meta[jobs.MetaChatID] = spec().SessionID },
		"a_job_whose_volume_was_edited":    func(meta map[string]string) { meta[jobs.MetaVolumeHostPath] = "/" },
		"a_job_whose_labels_were_edited":   func(meta map[string]string) { meta[jobs.MetaDescription] = "{" },
		"a_job_whose_times_cannot_be_read": func(meta map[string]string) { meta[jobs.MetaExpiresAt] = "tomorrow" },
	} {
		t.Run("refuses_"+name, func(t *testing.T) {
			_, ok := jobs.SpecOf(made(change))
			must.False(t, ok)
		})
	}
}

func TestJob_refuses_what_no_spec_may_hold(t *testing.T) {
	template := load(t, "raw_exec", nil)
	for name, change := range map[string]func(*runtime.Spec){
		"a session ID that is no UUID":    func(s *runtime.Spec) { s.SessionID = "../x" },
		"a chat ID that is no UUID":       func(s *runtime.Spec) { s.ChatID = "" },
		"a UUID in another form":          func(s *runtime.Spec) { s.SessionID = strings.ToUpper(s.SessionID) },
		"no agent ID":                     func(s *runtime.Spec) { s.AgentID = "" },
		"a variable of Nomad's":           func(s *runtime.Spec) { s.AgentID = "${node.unique.id}" },
		"a directive of a template":       func(s *runtime.Spec) { s.AgentID = "%{ if true }" },
		"a control character":             func(s *runtime.Spec) { s.AgentID = "a\x01b" },
		"an agent ID that is too long":    func(s *runtime.Spec) { s.AgentID = strings.Repeat("a", 257) },
		"a path that is not absolute":     func(s *runtime.Spec) { s.VolumeHostPath = "volumes/one" },
		"a path that is not clean":        func(s *runtime.Spec) { s.VolumeHostPath = "/volumes/../etc" },
		"a path with an opening brace":    func(s *runtime.Spec) { s.VolumeHostPath = "/${x}" },
		"a path that is not UTF-8":        func(s *runtime.Spec) { s.VolumeHostPath = "/\xff" },
		"a path with a control character": func(s *runtime.Spec) { s.VolumeHostPath = "/a\nb" },
	} {
		t.Run(name, func(t *testing.T) {
			s := spec()
			change(&s)
			_, err := template.Job(s, "prod")
			must.ErrorIs(t, err, runtime.ErrInvalid)
		})
	}
}

func TestFingerprint_tells_specs_apart(t *testing.T) {
	one := spec()
	for name, change := range map[string]func(*runtime.Spec){
		"session": func(s *runtime.Spec) { s.SessionID = "x" },
		"chat":    func(s *runtime.Spec) { s.ChatID = "x" },
		"agent":   func(s *runtime.Spec) { s.AgentID = "x" },
		"volume":  func(s *runtime.Spec) { s.VolumeHostPath = "/x" },
		"a shift of bytes between agent and volume": func(s *runtime.Spec) {
			s.AgentID, s.VolumeHostPath = s.AgentID+s.VolumeHostPath[:1], s.VolumeHostPath[1:]
		},
	} {
		other := one
		change(&other)
		must.NotEq(t, jobs.Fingerprint(one), jobs.Fingerprint(other), must.Sprint(name))
	}
	later := one
	later.ExpiresAt = later.ExpiresAt.Add(time.Hour)
	must.Eq(t, jobs.Fingerprint(one), jobs.Fingerprint(later))
}

func TestVariables(t *testing.T) {
	const head = `
		variable "text" { default = "t" }
		variable "number" { default = 1 }
		variable "flag" { default = false }
		variable "list" { default = ["a"] }
		variable "map" {
			type    = map(string)
			default = {}
		}
		variable "absent" {
			type    = string
			default = null
		}
		variable "needed" { type = string }
		ready { port = "http" }
		job {
			group "g" {
				network {
					port "http" {}
				}
				task "t" {
					driver = "raw_exec"
					user   = var.absent
					config {
						text   = var.text
						number = var.number
						flag   = var.flag
						list   = var.list
						map    = var.map
						needed = var.needed
						absent = var.absent
					}
				}
			}
		}`
	cases := []struct {
		name  string
		given map[string]string
		want  map[string]any // of the config; nil where it is refused
		says  string
	}{
		{"defaults", map[string]string{"needed": "n"}, map[string]any{
			"text": "t", "number": 1.0, "flag": false, "list": []any{"a"}, "map": map[string]any{}, "needed": "n",
		}, ""},
		{"text is converted to what the variable is", map[string]string{
			"needed": "${n}", "text": "7", "number": "2.5", "flag": "true", "list": `["b", "c"]`, "map": `{ k = "v" }`, "absent": "nobody",
		}, map[string]any{
			"text": "7", "number": 2.5, "flag": true, "list": []any{"b", "c"}, "map": map[string]any{"k": "v"}, "needed": "${n}", "absent": "nobody",
		}, ""},
		{"a missing one", nil, nil, `"needed" has no default`},
		{"an unknown one", map[string]string{"needed": "n", "nedeed": "n"}, nil, `"nedeed"`},
		{"a number that is none", map[string]string{"needed": "n", "number": "many"}, nil, `test.hcl:3,`},
		{"a list that is none", map[string]string{"needed": "n", "list": "a,b"}, nil, `test.hcl:5,`},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			template, err := jobs.Parse("test.hcl", []byte(head), tc.given)
			if tc.want == nil {
				must.ErrorContains(t, err, tc.says)
				return
			}
			must.NoError(t, err)
			data, err := json.Marshal(jobOf(t, template, spec()).TaskGroups[0].Tasks[0].Config)
			must.NoError(t, err)
			var got map[string]any
			must.NoError(t, json.Unmarshal(data, &got))
			must.Eq(t, tc.want, got)
		})
	}
}

func TestReady(t *testing.T) {
	r := load(t, "docker", map[string]string{"ready_path": "/up", "ready_timeout": "90s"}).Ready()
	must.Eq(t, "http", r.Port)
	must.Eq(t, 90*time.Second, r.Timeout)
	must.Eq(t, "/up", r.Check.HTTPPath)
	must.True(t, r.Check.WantSessionID)
}

// An image that knows nothing of Bivouac needs a variable and no template of its own.
func TestReady_of_an_image_that_knows_nothing_of_sessions(t *testing.T) {
	for _, name := range jobs.Names() {
		command := map[string]string{"exec": "/bin/x"}[name]
		given := func(vars map[string]string) jobs.Ready {
			if command != "" {
				vars["command"] = command
			}
			return load(t, name, vars).Ready()
		}
		tcp := ready.Check{}
		if name == "docker" { // its proxy listens before the container does
			tcp.StayOpen = ready.DockerStayOpen
		}
		must.Eq(t, tcp, given(map[string]string{"ready_type": "tcp"}).Check)
		must.Eq(t, ready.Check{HTTPPath: "/"}, given(map[string]string{"ready_path": "/", "ready_session_id": "false"}).Check)
	}
}

// Ports of a network of its own lead to the task, with no proxy between.
func TestReady_of_a_group_with_a_network_of_its_own(t *testing.T) {
	for mode, want := range map[string]time.Duration{"host": ready.DockerStayOpen, "bridge": 0} {
		src := strings.Replace(around("", "", "", ""), "network {", "network {\nmode = \""+mode+"\"", 1)
		template, err := jobs.Parse("test.hcl", []byte(src), nil)
		must.NoError(t, err)
		must.Eq(t, want, template.Ready().Check.StayOpen)
	}
}

func TestLoad_refuses_a_wrong_ready_check(t *testing.T) {
	for says, vars := range map[string]map[string]string{
		"counts only after it stayed open for 3s": {"ready_type": "tcp", "ready_timeout": "3s"},
		`not "udp"`:           {"ready_type": "udp"},
		"docker.hcl:":         {"ready_timeout": "4m1s"},
		"at most 4m0s":        {"ready_timeout": "4m1s"},
		"greater than 0":      {"ready_timeout": "0s"},
		"does not begin with": {"ready_path": "healthz"},
	} {
		_, err := jobs.Load("docker", vars)
		must.ErrorContains(t, err, says)
	}
	must.Eq(t, jobs.MaxReadyTimeout, load(t, "docker", map[string]string{"ready_timeout": "4m"}).Ready().Timeout)
}

func TestLoad_names_what_there_is(t *testing.T) {
	_, err := jobs.Load("podman", nil)
	must.ErrorContains(t, err, "docker, exec, raw_exec")
	_, err = jobs.Load(filepath.Join(t.TempDir(), "none.hcl"), nil)
	must.ErrorIs(t, err, os.ErrNotExist)
}

func TestLoad_reads_a_user_s_file(t *testing.T) {
	src, err := os.ReadFile(filepath.Join("templates", "raw_exec.hcl"))
	must.NoError(t, err)
	file := filepath.Join(t.TempDir(), "own.hcl")
	must.NoError(t, os.WriteFile(file, src, 0o644))
	must.Eq(t, asJSON(t, jobOf(t, load(t, "raw_exec", nil), spec())), asJSON(t, jobOf(t, load(t, file, nil), spec())))
}

// A tombstone takes up the ID and can run nothing.
func TestTombstone(t *testing.T) {
	job := load(t, "docker", nil).Tombstone(spec().SessionID, "prod")
	must.Eq(t, *jobOf(t, load(t, "docker", nil), spec()).ID, *job.ID)
	must.True(t, *job.Stop)
	must.Eq(t, 0, *job.TaskGroups[0].Count)
	must.Eq(t, "prod", job.Meta[jobs.MetaInstance])
}

// What the project shows to its users works.
func TestExamples(t *testing.T) {
	files, err := filepath.Glob("../examples/jobs/*.hcl")
	must.NoError(t, err)
	must.SliceNotEmpty(t, files)
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			job := jobOf(t, load(t, file, map[string]string{"image": "registry.example/agent:1.4"}), spec())
			must.Eq(t, "agent-1", job.TaskGroups[0].Tasks[0].Env["AGENT"])
		})
	}
}
