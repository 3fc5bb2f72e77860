package jobs

import (
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/nomad/api"
	"github.com/zclconf/go-cty/cty"

	"github.com/bivouac/bivouac/runtime"
)

// notForTemplates lists what a template must not set, and why.
var notForTemplates = map[reflect.Type]map[string]string{
	reflect.TypeFor[api.Job](): {
		"id":            "Bivouac derives the job's ID from the session",
		"region":        "Bivouac uses the region of its Nomad connection (NOMAD_REGION)",
		"periodic":      "a sandbox starts when its session does",
		"parameterized": "a sandbox starts when its session does",
		"multiregion":   "a session has one sandbox",
		"reschedule":    oneLife,
		"update":        "a sandbox's job is never updated",
		"migrate":       oneLife,
	},
	reflect.TypeFor[api.TaskGroup](): {
		"restart":                      oneLife,
		"reschedule":                   oneLife,
		"disconnect":                   "Bivouac sets it, so that the Nomad client stops a lost sandbox and Nomad never replaces it",
		"migrate":                      oneLife,
		"update":                       "a sandbox's job is never updated",
		"scaling":                      "a session has one sandbox",
		"stop_after_client_disconnect": "Bivouac sets disconnect instead",
		"max_client_disconnect":        "Bivouac sets disconnect instead",
		"prevent_reschedule_on_lost":   "Bivouac sets disconnect instead",
	},
	reflect.TypeFor[api.Task](): {
		"restart":  oneLife,
		"scaling":  "a session has one sandbox",
		"schedule": oneLife,
	},
}

const oneLife = "a sandbox that ended is not started again; its session is replaced"

// onlyAs lists what a template may set only to the value that Bivouac sets anyway.
var onlyAs = map[reflect.Type]map[string]cty.Value{
	reflect.TypeFor[api.Job]():       {"type": cty.StringVal(api.JobTypeBatch)},
	reflect.TypeFor[api.TaskGroup](): {"count": cty.NumberIntVal(1)},
}

// refused reports an argument or block that a template must not set.
func (d *decoder) refused(typ reflect.Type, name string, at hcl.Range, expr hclsyntax.Expression) bool {
	if reason, ok := notForTemplates[typ][name]; ok {
		d.problem(at, "Not for job templates", "%q cannot be set: %s.", name, reason)
		return true
	}
	want, ok := onlyAs[typ][name]
	if !ok || expr == nil {
		return false
	}
	if value, ok := d.eval(expr, false); ok && !value.RawEquals(want) {
		text := "1"
		if want.Type() == cty.String {
			text = `"` + want.AsString() + `"`
		}
		d.problem(at, "Not for job templates", "%q can only be %s here: a session has one sandbox, which runs once.", name, text)
	}
	return true
}

// shorthands are the arguments of a constraint or affinity that set an operator
// and its right side at once.
var shorthands = []string{
	api.ConstraintVersion, api.ConstraintSemver, api.ConstraintRegex,
	api.ConstraintSetContains, api.ConstraintSetContainsAll, api.ConstraintSetContainsAny,
	api.ConstraintDistinctHosts, api.ConstraintDistinctProperty,
}

// shorthand decodes such an argument and reports whether attr is one.
func (d *decoder) shorthand(target reflect.Value, attr *hclsyntax.Attribute) bool {
	var operator, left, right *string
	switch c := target.Addr().Interface().(type) {
	case *api.Constraint:
		operator, left, right = &c.Operand, &c.LTarget, &c.RTarget
	case *api.Affinity:
		operator, left, right = &c.Operand, &c.LTarget, &c.RTarget
	default:
		return false
	}
	if !slices.Contains(shorthands, attr.Name) {
		return false
	}
	*operator = attr.Name
	side := right
	if attr.Name == api.ConstraintDistinctProperty {
		side = left
	}
	d.value(attr.Expr, reflect.ValueOf(side).Elem(), false)
	return true
}

func (t *Template) newDecoder(spec runtime.Spec) *decoder {
	return newDecoder(scope{"var": cty.ObjectVal(t.variables), "session": sessionValue(spec)})
}

// decodeReady reads the ready block. Nothing in it depends on a session.
func (t *Template) decodeReady() (Ready, hcl.Diagnostics) {
	d := newDecoder(scope{"var": cty.ObjectVal(t.variables)})
	block := struct {
		Port      string        `hcl:"port"`
		Type      string        `hcl:"type,optional"`
		Path      string        `hcl:"path,optional"`
		SessionID bool          `hcl:"session_id,optional"`
		Timeout   time.Duration `hcl:"timeout,optional"`
	}{Type: "tcp", Timeout: 30 * time.Second}
	d.body(t.file.ready.Body, reflect.ValueOf(&block).Elem())
	at := t.file.ready.DefRange()
	switch {
	case d.diags.HasErrors():
	case block.Type == "tcp" && (block.Path != "" || block.SessionID):
		d.problem(at, "Wrong ready check", "path and session_id require type \"http\".")
	case block.Type == "http" && block.Path == "":
		d.problem(at, "Wrong ready check", "type \"http\" needs a path.")
	case block.Type != "tcp" && block.Type != "http":
		d.problem(at, "Wrong ready check", "The type must be \"tcp\" or \"http\", not %q.", block.Type)
	case block.Timeout <= 0:
		d.problem(at, "Wrong ready check", "The timeout must be greater than 0.")
	case block.Timeout > MaxReadyTimeout:
		d.problem(at, "Wrong ready check", "The timeout is %v, but must be at most %v.", block.Timeout, MaxReadyTimeout)
	}
	r := Ready{Port: block.Port, Timeout: block.Timeout}
	r.Check.HTTPPath, r.Check.WantSessionID = block.Path, block.SessionID
	if err := r.Check.Validate(); err != nil && !d.diags.HasErrors() {
		d.problem(at, "Wrong ready check", "%v.", err)
	}
	return r, d.diags
}

// decodeJob evaluates the template for a session and sets what every sandbox's
// job must have.
func (t *Template) decodeJob(spec runtime.Spec, instance string) (*api.Job, hcl.Diagnostics) {
	d := t.newDecoder(spec)
	job := &api.Job{}
	d.body(t.file.job.Body, reflect.ValueOf(job).Elem())
	workspace := d.workspace(t, job, spec)
	if d.diags.HasErrors() {
		return nil, d.diags
	}
	d.checkShape(t, job)
	if d.diags.HasErrors() {
		return nil, d.diags
	}
	d.force(t, job, spec, instance, workspace)
	return job, d.diags
}

// checkShape refuses a job that is not one sandbox with one port.
func (d *decoder) checkShape(t *Template, job *api.Job) {
	at := t.file.job.DefRange()
	if len(job.TaskGroups) != 1 {
		if len(job.TaskGroups) > 1 {
			at = d.ranges[job.TaskGroups[1]]
		}
		d.problem(at, "Wrong number of groups", "A sandbox is one allocation: the job needs exactly one group.")
		return
	}
	group := job.TaskGroups[0]
	at = d.ranges[group]
	if !slices.ContainsFunc(group.Tasks, isMain) {
		d.problem(at, "Missing task", "The group needs a task without a lifecycle block.")
	}
	if len(group.Networks) > 1 {
		d.problem(d.ranges[group.Networks[1]], "Too many networks", "The group can have one network.")
	}
	hasPort := func(port api.Port) bool { return port.Label == t.ready.Port }
	if !slices.ContainsFunc(group.Networks, func(n *api.NetworkResource) bool {
		return slices.ContainsFunc(n.DynamicPorts, hasPort)
	}) {
		d.problem(t.file.ready.DefRange(), "Unknown port", "The group's network has no port %q.", t.ready.Port)
	}
	d.checkStop(group)
	d.checkNames(at, job.Meta, group.Meta)
	for _, task := range group.Tasks {
		d.checkNames(d.ranges[task], task.Env, task.Meta)
	}
}

// checkNames refuses env and meta names that Bivouac or Nomad sets.
func (d *decoder) checkNames(at hcl.Range, values ...map[string]string) {
	for _, m := range values {
		for _, name := range slices.Sorted(maps.Keys(m)) {
			upper := strings.ToUpper(name)
			own := slices.Contains([]string{"PORT", "SESSION_ID", "CHAT_ID", "AGENT_ID"}, upper) ||
				strings.HasPrefix(upper, "BIVOUAC_") && upper != "BIVOUAC_BIND" ||
				strings.HasPrefix(upper, "NOMAD_")
			if own {
				d.problem(at, "Not for job templates", "%q in env or meta is set by Bivouac or Nomad.", name)
			}
		}
	}
}

// isMain reports whether the task is a main task: one without a lifecycle block.
func isMain(task *api.Task) bool { return task.Lifecycle == nil }
