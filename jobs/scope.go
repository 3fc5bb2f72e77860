package jobs

import (
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/convert"
	"github.com/zclconf/go-cty/cty/function"
	"github.com/zclconf/go-cty/cty/function/stdlib"
)

// scope holds the variables that a template's expressions may use.
type scope map[string]cty.Value

func functions() map[string]function.Function {
	return map[string]function.Function{
		"coalesce":   stdlib.CoalesceFunc,
		"concat":     stdlib.ConcatFunc,
		"format":     stdlib.FormatFunc,
		"join":       stdlib.JoinFunc,
		"jsonencode": stdlib.JSONEncodeFunc,
		"length":     stdlib.LengthFunc,
		"lower":      stdlib.LowerFunc,
		"merge":      stdlib.MergeFunc,
		"replace":    stdlib.ReplaceFunc,
		"split":      stdlib.SplitFunc,
		"upper":      stdlib.UpperFunc,
	}
}

// eval returns expr's value, fully known and without marks. It returns false and
// adds a problem if there is no such value.
func (d *decoder) eval(expr hclsyntax.Expression, free bool) (cty.Value, bool) {
	ctx, diags := d.scope.context(expr)
	if diags.HasErrors() {
		d.diags = d.diags.Extend(diags)
		return cty.NilVal, false
	}
	value, diags := expr.Value(ctx)
	if diags.HasErrors() {
		d.diags = d.diags.Extend(diags)
		return cty.NilVal, false
	}
	if !value.IsWhollyKnown() {
		d.problem(expr.Range(), "Unknown value", "The value is not known when the job is made.")
		return cty.NilVal, false
	}
	structure := false
	_ = cty.Walk(value, func(_ cty.Path, v cty.Value) (bool, error) {
		structure = structure || v.IsMarked() && v.Type() != cty.String
		return true, nil
	})
	if structure {
		d.problem(expr.Range(), "Free text as structure",
			"session.agent_id and session.volume_host_path can be used as strings only. They cannot decide which other values there are.")
		return cty.NilVal, false
	}
	value, marks := value.UnmarkDeep()
	if _, marked := marks[freeText]; marked && !free {
		d.problem(expr.Range(), "Free text not allowed here",
			"session.agent_id and session.volume_host_path can be used only in env, meta and config, where Nomad treats them as data. "+
				"A task can read BIVOUAC_AGENT_ID and BIVOUAC_WORKSPACE from its environment.")
		return cty.NilVal, false
	}
	if contains(value, notYet) {
		d.problem(expr.Range(), "Not known for a spare",
			"A spare starts before there is a chat, so it has no session.chat_id, session.agent_id and session.volume_host_path. "+
				"Write session.spare ? WHAT_A_SPARE_HAS : WHAT_IS_HERE_NOW. "+
				"A claimed spare has its volume at its workspace, and its IDs in the file that BIVOUAC_SESSION_FILE names.")
		return cty.NilVal, false
	}
	return value, true
}

// contains reports whether a string in value, which has no marks, contains text in
// whatever case.
func contains(value cty.Value, text string) bool {
	found := false
	_ = cty.Walk(value, func(_ cty.Path, v cty.Value) (bool, error) {
		found = found || v.Type() == cty.String && !v.IsNull() && strings.Contains(strings.ToLower(v.AsString()), text)
		return !found, nil
	})
	return found
}

// context returns the variables for expr: the scope, and each name that Nomad
// interpolates, with Nomad's own notation as its value.
func (s scope) context(expr hclsyntax.Expression) (*hcl.EvalContext, hcl.Diagnostics) {
	var diags hcl.Diagnostics
	variables := maps.Clone(s)
	for _, traversal := range expr.Variables() {
		root := traversal.RootName()
		_, known := s[root]
		switch {
		case known:
		case strings.HasPrefix(root, "${"): // as nameForNomad left it
			variables[root] = cty.StringVal(root)
		case isNomadRoot(root):
			diags = diags.Append(problem(traversal.SourceRange(), "Unknown variable",
				"Nomad does not interpolate this name. In a job, write NOMAD_NAME, attr.NAME, device.NAME, env.NAME, meta.NAME or node.NAME. "+
					"NAME may contain letters, digits, '_', '-' and '.'; the name of an environment variable cannot contain '-' or '.'."))
		default:
			diags = diags.Append(problem(traversal.SourceRange(), "Unknown variable",
				"%q is not known here. Use var.NAME, session.NAME, or a name that Nomad interpolates (NOMAD_…, attr, device, env, meta, node).", root))
		}
	}
	return &hcl.EvalContext{Variables: variables, Functions: functions()}, diags
}

// nameForNomad rewrites an expression so that each name that Nomad interpolates
// becomes one variable, named as Nomad writes it ("${name}"). A tree of objects
// could not hold all of them: the node attribute driver.docker has a value, and so
// does driver.docker.version.
func nameForNomad(expr hclsyntax.Expression) {
	outer := make(map[*hcl.Traverser]string) // without variables that a for expression declares
	for _, traversal := range expr.Variables() {
		if name, ok := nomadName(traversal); ok {
			outer[&traversal[0]] = name
		}
	}
	_ = hclsyntax.VisitAll(expr, func(node hclsyntax.Node) hcl.Diagnostics { // never returns any
		if found, ok := node.(*hclsyntax.ScopeTraversalExpr); ok {
			if name, ok := outer[&found.Traversal[0]]; ok {
				found.Traversal = hcl.Traversal{hcl.TraverseRoot{Name: name, SrcRange: found.SrcRange}}
			}
		}
		return nil
	})
}

// nameAllForNomad calls nameForNomad for all expressions of a body.
func nameAllForNomad(body *hclsyntax.Body) {
	for _, attr := range body.Attributes {
		nameForNomad(attr.Expr)
	}
	for _, block := range body.Blocks {
		nameAllForNomad(block.Body)
	}
}

func isNomadRoot(name string) bool {
	return strings.HasPrefix(name, "NOMAD_") || slices.Contains([]string{"attr", "device", "env", "meta", "node"}, name)
}

var (
	// interpolated matches a name that Nomad's client and scheduler interpolate.
	interpolated = regexp.MustCompile(`^[a-zA-Z0-9_.-]+$`)
	// envName matches an environment variable that can be used everywhere.
	envName = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_]*$`)
)

// nomadName returns how Nomad writes the interpolation of a name.
func nomadName(traversal hcl.Traversal) (string, bool) {
	if !isNomadRoot(traversal.RootName()) {
		return "", false
	}
	path := []string{traversal.RootName()}
	for _, step := range traversal[1:] {
		switch step := step.(type) {
		case hcl.TraverseAttr:
			path = append(path, step.Name)
		case hcl.TraverseIndex: // ["name"], or .0
			key, err := convert.Convert(step.Key, cty.String)
			if err != nil || key.IsNull() {
				return "", false
			}
			path = append(path, key.AsString())
		default:
			return "", false
		}
	}
	switch name := strings.Join(path[1:], "."); {
	case strings.HasPrefix(path[0], "NOMAD_"):
		return "${" + path[0] + "}", len(path) == 1
	case path[0] == "env":
		// Nomad knows "env." only in a driver's config, but the bare name everywhere.
		return "${" + name + "}", envName.MatchString(name)
	default:
		return "${" + path[0] + "." + name + "}", interpolated.MatchString(name)
	}
}
