package jobs_test

import (
	"strings"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// spareSpec is the spec of a spare with the session ID of spec.
func spareSpec() runtime.Spec {
	s := spec()
	return runtime.Spec{SessionID: s.SessionID, Pool: "small", CreatedAt: s.CreatedAt, ExpiresAt: s.ExpiresAt, AccessToken: s.AccessToken}
}

var givenVariables = map[string]map[string]string{
	"docker":   nil,
	"exec":     {"command": "/usr/local/bin/sandbox"},
	"raw_exec": nil,
}

func TestSpare(t *testing.T) {
	const id = "0c7a4f9e-6a53-4b4c-9f0c-3b2f5d1e8a77"
	for _, c := range []struct{ template, workspace, sessionFile string }{
		{"docker", "/workspace", "/run/bivouac/session.json"},
		{"exec", "/alloc/data", "/run/bivouac/session.json"},
		{"raw_exec", "/run/bivouac/sandboxes/" + id + "/workspace", "/run/bivouac/sandboxes/" + id + "/session.json"},
	} {
		t.Run(c.template, func(t *testing.T) {
			template := load(t, c.template, givenVariables[c.template])
			must.NoError(t, template.Spares())
			must.Eq(t, jobs.SpareTask{Name: "sandbox", Driver: c.template, Workspace: c.workspace}, template.SpareTask(id))

			spare, cold := jobOf(t, template, spareSpec()), jobOf(t, template, spec())
			must.Eq(t, map[string]string{
				jobs.MetaPool: "small", jobs.MetaSessionID: id, jobs.MetaInstance: "prod", jobs.MetaMainTasks: "sandbox",
				jobs.MetaSpec: jobs.Fingerprint(spareSpec()), jobs.MetaDescription: "{}",
				jobs.MetaCreatedAt: cold.Meta[jobs.MetaCreatedAt], jobs.MetaExpiresAt: cold.Meta[jobs.MetaExpiresAt],
			}, spare.Meta)
			want := cold.TaskGroups[0].Tasks[0].Env
			delete(want, "BIVOUAC_CHAT_ID")
			delete(want, "BIVOUAC_AGENT_ID")
			want["BIVOUAC_WORKSPACE"], want["BIVOUAC_SESSION_FILE"] = c.workspace, c.sessionFile
			must.Eq(t, want, spare.TaskGroups[0].Tasks[0].Env)
			got, ok := jobs.SpecOf(spare.Meta)
			must.True(t, ok)
			wantSpec := spareSpec()
			wantSpec.AccessToken = ""
			must.Eq(t, wantSpec, got)
		})
	}
	t.Run("of_docker_has_an_empty_folder_in_the_place_of_the_volume", func(t *testing.T) {
		config := jobOf(t, load(t, "docker", nil), spareSpec()).TaskGroups[0].Tasks[0].Config
		must.Eq(t, []map[string]any{
			{"type": "tmpfs", "target": "/workspace", "readonly": false},
		}, config["mount"].([]map[string]any)[:1])
	})
	t.Run("has_a_fingerprint_of_its_own", func(t *testing.T) {
		other := spareSpec()
		other.Pool = "large"
		must.NotEq(t, jobs.Fingerprint(spareSpec()), jobs.Fingerprint(other))
		other.Pool = ""
		must.NotEq(t, jobs.Fingerprint(spareSpec()), jobs.Fingerprint(other))
	})
	t.Run("is_not_known_by_an_edited_pool", func(t *testing.T) {
		meta := jobOf(t, load(t, "raw_exec", nil), spareSpec()).Meta
		meta[jobs.MetaPool] = "large"
		_, ok := jobs.SpecOf(meta)
		must.False(t, ok)
	})
}

func TestFingerprint_of_a_session_is_what_it_was_before_pools(t *testing.T) {
	must.Eq(t, "6f2762748981a215092a2dcd7e04153534781b68ee6506ea52c6313e51928ddf", jobs.Fingerprint(spec()))
}

// withConfig returns a docker template whose task has a line in its config.
func withConfig(line string) string {
	return around("", "", "", "config {\n"+line+"\n}")
}

func TestSpares(t *testing.T) {
	first := `task "first" { driver = "docker" }`
	for name, c := range map[string]struct {
		src  string
		want []string // in the error; none: it can make spares
	}{
		"a_template_that_does_not_use_the_volume":  {withConfig(`args = []`), nil},
		"a_template_that_tells_spares_apart":       {withConfig(`args = session.spare ? ["x"] : [session.volume_host_path]`), nil},
		"null_for_a_spare":                         {withConfig(`source = session.spare ? null : session.volume_host_path`), nil},
		"a_template_that_always_needs_the_volume":  {withConfig(`source = session.volume_host_path`), []string{"test.hcl:13", "Not known for a spare", "session.spare ?"}},
		"a_template_with_the_volume_in_a_text":     {withConfig(`volume = "x${session.volume_host_path}"`), []string{"Not known for a spare"}},
		"a_template_with_the_volume_in_capitals":   {withConfig(`volume = upper(session.volume_host_path)`), []string{"Not known for a spare"}},
		"a_template_that_needs_the_chat":           {around("", "", "", `meta { chat = session.chat_id }`), []string{"test.hcl:12", "Not known for a spare"}},
		"a_template_whose_workspace_is_the_volume": {around(`workspace = session.volume_host_path`, "", "", ""), []string{"test.hcl:2", "Not known for a spare"}},
		"a_runtime_with_mounts_of_its_own":         {withConfig(`runtime = "runsc"`), []string{`container runtime "runsc"`, "runc"}},
		"the_usual_runtime":                        {withConfig(`runtime = "runc"`), nil},
		"a_driver_that_the_helper_does_not_know":   {strings.Replace(around("", "", "", ""), `"docker"`, `"podman"`, 1), []string{`task "t" has the driver "podman"`, "docker, exec, raw_exec"}},
		"a_second_task_with_the_volume": {
			around("", "", first, "config {\nargs = session.spare ? [] : [session.volume_host_path]\n}"),
			[]string{`task "t" uses session.volume_host_path`, `only task "first"`},
		},
	} {
		t.Run(name, func(t *testing.T) {
			template, err := jobs.Parse("test.hcl", []byte(c.src), nil)
			must.NoError(t, err)
			err = template.Spares()
			if c.want == nil {
				must.NoError(t, err)
				must.NotEq(t, "", template.Variant())
				return
			}
			for _, want := range c.want {
				must.ErrorContains(t, err, want)
			}
			must.Eq(t, "", template.Variant())
			_, err = template.Job(spareSpec(), "prod")
			must.ErrorIs(t, err, runtime.ErrInvalid)
			_, err = template.Job(spec(), "prod")
			must.NoError(t, err) // a pool is refused, not the template
		})
	}
}

func TestVariant(t *testing.T) {
	variant := func(variables map[string]string) string { return load(t, "docker", variables).Variant() }
	must.Eq(t, variant(nil), variant(nil))
	must.NotEq(t, variant(nil), variant(map[string]string{"image": "other"}))
	must.NotEq(t, variant(nil), variant(map[string]string{"memory": "512"}))
	must.NotEq(t, variant(nil), load(t, "raw_exec", nil).Variant())
	must.LessEq(t, 64, len(variant(nil)))
}
