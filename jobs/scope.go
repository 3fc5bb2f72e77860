package jobs

import (
	"maps"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/function"
	"github.com/zclconf/go-cty/cty/function/stdlib"
)

// scope is what a template's expressions may name.
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

// eval returns expr's value, fully known and without marks.
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
		d.problem(expr.Range(), "Unknown value", "The value cannot be told here.")
		return cty.NilVal, false
	}
	structure := false
	_ = cty.Walk(value, func(_ cty.Path, v cty.Value) (bool, error) {
		structure = structure || v.IsMarked() && v.Type() != cty.String
		return true, nil
	})
	if structure {
		d.problem(expr.Range(), "Free text as structure",
			"session.agent_id and session.volume_host_path can be texts, but not decide which other values there are.")
		return cty.NilVal, false
	}
	value, marks := value.UnmarkDeep()
	if _, marked := marks[freeText]; marked && !free {
		d.problem(expr.Range(), "Free text not allowed here",
			"session.agent_id and session.volume_host_path can be used in env, meta and config, where they are data and nothing else. "+
				"A task finds them in its environment, as BIVOUAC_AGENT_ID and BIVOUAC_WORKSPACE.")
		return cty.NilVal, false
	}
	return value, true
}

// context returns what expr is evaluated in: the scope, and each name that
// Nomad itself will interpolate standing for its own interpolation.
func (s scope) context(expr hclsyntax.Expression) (*hcl.EvalContext, hcl.Diagnostics) {
	var diags hcl.Diagnostics
	names := make(map[string]any)
	for _, traversal := range expr.Variables() {
		root := traversal.RootName()
		if _, ok := s[root]; ok {
			continue
		}
		path, ok := runtimeName(traversal)
		if !ok || !place(names, path, "${"+strings.Join(path, ".")+"}") {
			diags = diags.Append(problem(traversal.SourceRange(), "Unknown variable",
				"%q is neither var.NAME, nor one of session's, nor a name that Nomad interpolates (NOMAD_…, attr, device, env, meta, node).", root))
		}
	}
	variables := make(map[string]cty.Value, len(s)+len(names))
	maps.Copy(variables, s)
	for name, value := range names {
		variables[name] = nested(value)
	}
	return &hcl.EvalContext{Variables: variables, Functions: functions()}, diags
}

// runtimeName splits a name that Nomad's client or scheduler interpolates.
func runtimeName(traversal hcl.Traversal) ([]string, bool) {
	root := traversal.RootName()
	if !strings.HasPrefix(root, "NOMAD_") && !slices.Contains([]string{"attr", "device", "env", "meta", "node"}, root) {
		return nil, false
	}
	path := []string{root}
	for _, step := range traversal[1:] {
		attr, ok := step.(hcl.TraverseAttr)
		if !ok {
			return nil, false
		}
		path = append(path, attr.Name)
	}
	return path, true
}

// place puts text into a tree of names, unless a part of the path is text.
func place(tree map[string]any, path []string, text string) bool {
	for _, name := range path[:len(path)-1] {
		next, ok := tree[name].(map[string]any)
		if !ok {
			if tree[name] != nil {
				return false
			}
			next = make(map[string]any)
			tree[name] = next
		}
		tree = next
	}
	last := path[len(path)-1]
	if old := tree[last]; old != nil && old != text {
		return false
	}
	tree[last] = text
	return true
}

// nested returns a tree of names, or a text in it, as a value.
func nested(value any) cty.Value {
	switch value := value.(type) {
	case string:
		return cty.StringVal(value)
	case map[string]any:
		object := make(map[string]cty.Value, len(value))
		for name, inner := range value {
			object[name] = nested(inner)
		}
		return cty.ObjectVal(object)
	default:
		return cty.DynamicVal
	}
}
