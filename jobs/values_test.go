package jobs_test

import (
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"
	"github.com/zclconf/go-cty/cty"
	"pgregory.net/rapid"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// tricky yields what means something to Nomad, HCL, docker or a shell, among
// other text.
func tricky() *rapid.Generator[string] {
	part := rapid.OneOf(
		rapid.SampledFrom([]string{
			"$", "$$", "{", "}", "%", "%%", "{node.unique.name}", "{ if true }", ":", ",", "\"", "\\", "'", " ", "{{ env }}", "`id`", "~", "é", "日",
		}),
		rapid.StringMatching(`[a-zA-Z0-9._-]{1,8}`),
	)
	return rapid.Custom(func(t *rapid.T) string {
		s := strings.Join(rapid.SliceOfN(part, 1, 10).Draw(t, "parts"), "")
		return s[:min(len(s), 250)]
	}).Filter(func(s string) bool { return runtime.ValidateAgentID(s) == nil })
}

func trickyPath() *rapid.Generator[string] {
	return rapid.Map(rapid.SliceOfN(tricky(), 1, 3), func(parts []string) string {
		return path.Clean("/" + strings.Join(parts, "/"))
	}).Filter(func(p string) bool { return runtime.ValidateVolumeHostPath(p) == nil })
}

func trickySpec(t *rapid.T) runtime.Spec {
	s := spec()
	s.AgentID, s.VolumeHostPath = tricky().Draw(t, "agent"), trickyPath().Draw(t, "volume")
	return s
}

// An agent ID and a volume path change nothing in a job but their own places,
// and arrive there as they are.
func TestProperty_session_values_change_nothing_but_themselves(t *testing.T) {
	ownPlaces := map[string][]string{
		"docker":   {".TaskGroups.0.Tasks.0.Config.mount.0.source"},
		"exec":     {".TaskGroups.0.Tasks.0.Env.BIVOUAC_WORKSPACE"},
		"raw_exec": {".TaskGroups.0.Tasks.0.Env.BIVOUAC_WORKSPACE"},
	}
	everywhere := []string{
		".Meta.agent_id", ".Meta.volume_host_path", ".Meta.bivouac_spec",
		".TaskGroups.0.Tasks.0.Env.BIVOUAC_AGENT_ID",
	}
	for name, places := range ownPlaces {
		t.Run(name, func(t *testing.T) {
			variables := map[string]string{}
			if name == "exec" {
				variables["command"] = "/bin/sandbox"
			}
			template := load(t, name, variables)
			plain := leaves(asJSON(t, jobOf(t, template, spec())))
			rapid.Check(t, func(rt *rapid.T) {
				s := trickySpec(rt)
				job := jobOf(t, template, s)
				got := leaves(asJSON(t, job))
				for _, at := range slices.Sorted(maps.Keys(merged(plain, got))) {
					if plain[at] != got[at] && !slices.Contains(places, at) && !slices.Contains(everywhere, at) {
						rt.Fatalf("%s: %v became %v", at, plain[at], got[at])
					}
				}
				task := job.TaskGroups[0].Tasks[0]
				env := clientEnv(job, task)
				must.Eq(rt, s.AgentID, env["BIVOUAC_AGENT_ID"])
				must.Eq(rt, s.AgentID, env["NOMAD_META_agent_id"])
				must.Eq(rt, s.AgentID, env["NOMAD_META_AGENT_ID"])
				must.Eq(rt, s.AgentID, job.Meta[jobs.MetaAgentID])
				back, ok := jobs.SpecOf(job.Meta)
				must.True(rt, ok)
				s.AccessToken = "" // meta does not have it
				must.Eq(rt, s, back)
				if name == "docker" {
					mount := task.Config["mount"].([]map[string]any)[0]
					must.Eq(rt, s.VolumeHostPath, driverConfig(rt, mount["source"].(string), env))
				} else {
					must.Eq(rt, s.VolumeHostPath, env["BIVOUAC_WORKSPACE"])
				}
			})
		})
	}
}

// Also next to other text, and next to what Nomad is to interpolate, a value
// arrives as it is, or the job is refused.
func TestProperty_session_values_stand_beside_others(t *testing.T) {
	template, err := jobs.Parse("test.hcl", []byte(around("", `meta { j = session.agent_id }`, `meta { g = "-${session.agent_id}" }`, besides)), nil)
	must.NoError(t, err)
	rapid.Check(t, func(rt *rapid.T) {
		s := trickySpec(rt)
		job, err := template.Job(s, "prod")
		if err != nil {
			must.ErrorIs(rt, err, runtime.ErrInvalid)
			must.ErrorContains(rt, err, "with the template's text beside it")
			must.True(rt, strings.ContainsAny(s.AgentID+s.VolumeHostPath, "$%{"))
			return
		}
		task := job.TaskGroups[0].Tasks[0]
		env := clientEnv(job, task)
		must.Eq(rt, s.AgentID+"{x}"+s.VolumeHostPath+"alloc", env["BESIDE"])
		must.Eq(rt, s.AgentID+"{"+s.AgentID, env["MADE_UP"])
		must.Eq(rt, s.AgentID, env["NOMAD_META_j"])
		must.Eq(rt, "-"+s.AgentID, env["NOMAD_META_G"])
		must.Eq(rt, strings.ToUpper(s.AgentID), env["NOMAD_META_t"])
		must.Eq(rt, "-"+s.AgentID, job.TaskGroups[0].Meta["g"])
		args := task.Config["args"].([]any)
		must.Eq(rt, s.AgentID+s.VolumeHostPath+"{x}", driverConfig(rt, args[0].(string), env))
		must.Eq(rt, s.AgentID+"alloc", driverConfig(rt, args[1].(string), env))
	})
}

const besides = `
	config {
		args = ["${session.agent_id}${session.volume_host_path}{x}", "${session.agent_id}${NOMAD_ALLOC_ID}"]
	}
	env {
		BESIDE  = "${session.agent_id}{x}${session.volume_host_path}${NOMAD_ALLOC_ID}"
		MADE_UP = join("{", [session.agent_id, session.agent_id])
	}
	meta { t = upper(session.agent_id) }
`

// clientEnv is the environment that Nomad's client makes of meta and env: each
// value interpolated once, with the node's attributes, env after meta. Meta is
// interpolated in no fixed order, so here a reference to other meta finds
// nothing.
func clientEnv(job *api.Job, task *api.Task) map[string]string {
	known := map[string]string{"node.unique.name": "leaked", "NOMAD_ALLOC_ID": "alloc", "NOMAD_PORT_http": "8080", "NOMAD_IP_http": "127.0.0.1"}
	env := maps.Clone(known)
	for _, meta := range []map[string]string{job.Meta, job.TaskGroups[0].Meta, task.Meta} {
		for key, value := range meta {
			value = interpolated(value, known)
			env["NOMAD_META_"+key], env["NOMAD_META_"+strings.ToUpper(key)] = value, value
		}
	}
	done := maps.Clone(env)
	for key, value := range task.Env {
		done[key] = interpolated(value, env)
	}
	return done
}

var reference = regexp.MustCompile(`\$\{[a-zA-Z0-9_\-.]+\}`)

func interpolated(s string, env map[string]string) string {
	return reference.ReplaceAllStringFunc(s, func(ref string) string {
		if value, ok := env[ref[2:len(ref)-1]]; ok {
			return value
		}
		return ref
	})
}

// driverConfig is what a driver gets of a string in its config: the client reads
// it as an HCL template that knows the environment.
func driverConfig(t must.T, s string, env map[string]string) string {
	variables := make(map[string]cty.Value)
	for name, value := range env {
		variables[name] = cty.StringVal(value)
	}
	expr, diags := hclsyntax.ParseTemplate([]byte(s), "config", hcl.InitialPos)
	must.False(t, diags.HasErrors(), must.Sprintf("%s: %v", s, diags))
	value, diags := expr.Value(&hcl.EvalContext{Variables: variables})
	must.False(t, diags.HasErrors(), must.Sprintf("%s: %v", s, diags))
	return value.AsString()
}

// leaves returns the values in a tree by where they stand.
func leaves(tree any) map[string]any {
	found := make(map[string]any)
	var walk func(at string, v any)
	walk = func(at string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for key, inner := range v {
				walk(at+"."+key, inner)
			}
		case []any:
			for i, inner := range v {
				walk(fmt.Sprintf("%s.%d", at, i), inner)
			}
		default:
			found[at] = v
		}
	}
	walk("", tree)
	return found
}

func merged(a, b map[string]any) map[string]any {
	all := maps.Clone(a)
	maps.Copy(all, b)
	return all
}
