package jobs

import (
	"maps"
	"slices"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/ext/typeexpr"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/convert"
)

// values returns the value of each variable that the template declares: the given
// one, or the default.
func (f *file) values(given map[string]string) (map[string]cty.Value, hcl.Diagnostics) {
	var diags hcl.Diagnostics
	values := make(map[string]cty.Value)
	for _, block := range f.variables {
		name := block.Labels[0]
		if _, ok := values[name]; ok {
			diags = diags.Append(problem(block.LabelRanges[0], "Duplicate variable", "There is already a variable %q.", name))
			continue
		}
		text, ok := given[name]
		value, more := variable(block, text, ok)
		diags = diags.Extend(more)
		values[name] = value
	}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		if _, ok := values[name]; !ok {
			diags = diags.Append(problem(f.job.TypeRange, "Unknown variable",
				"A value is set for %q, but the template has no such variable.", name))
		}
	}
	return values, diags
}

func variable(block *hclsyntax.Block, text string, given bool) (cty.Value, hcl.Diagnostics) {
	var diags hcl.Diagnostics
	var fallback *hclsyntax.Attribute
	typ := cty.NilType
	for _, attr := range sortedAttributes(block.Body) {
		switch attr.Name {
		case "default":
			fallback = attr
		case "type":
			var more hcl.Diagnostics
			typ, more = typeexpr.TypeConstraint(attr.Expr)
			diags = diags.Extend(more)
		case "description": // for the reader
		default:
			diags = diags.Append(problem(attr.NameRange, "Unknown argument",
				"%q is not known here. A variable can have default, type and description.", attr.Name))
		}
	}
	for _, inner := range block.Body.Blocks {
		diags = diags.Append(problem(inner.TypeRange, "Unknown block", "A variable cannot contain blocks."))
	}
	value := cty.NilVal
	if fallback != nil {
		var more hcl.Diagnostics
		value, more = fallback.Expr.Value(&hcl.EvalContext{Functions: functions()})
		diags = diags.Extend(more)
	}
	if diags.HasErrors() {
		return cty.DynamicVal, diags
	}

	// Without a type the variable has its default's type, and without a default it
	// is a string.
	switch {
	case typ != cty.NilType:
	case fallback == nil || value.IsNull():
		typ = cty.String
	default:
		typ = looseType(value.Type())
	}
	at := block.LabelRanges[0]
	switch {
	case given:
		value, diags = fromText(text, typ, at)
	case fallback == nil:
		return cty.DynamicVal, hcl.Diagnostics{problem(at, "Missing value", "Variable %q has no default: set a value for it.", block.Labels[0])}
	default:
		at = fallback.Expr.Range()
	}
	if diags.HasErrors() {
		return cty.DynamicVal, diags
	}
	converted, err := convert.Convert(value, typ)
	if err != nil {
		return cty.DynamicVal, hcl.Diagnostics{problem(at, "Wrong value", "Variable %q: %v.", block.Labels[0], err)}
	}
	return converted, nil
}

// looseType returns the type of a variable whose default has type typ. The length
// of a list is not part of it.
func looseType(typ cty.Type) cty.Type {
	if !typ.IsTupleType() {
		return typ
	}
	elements := typ.TupleElementTypes()
	if len(elements) == 0 {
		return cty.List(cty.String)
	}
	if common, _ := convert.Unify(elements); common != cty.NilType {
		return cty.List(common)
	}
	return cty.DynamicPseudoType
}

// fromText reads a value that a person typed: plain text for a string, number or
// bool, and an HCL expression such as ["a", "b"] for anything else.
func fromText(text string, typ cty.Type, at hcl.Range) (cty.Value, hcl.Diagnostics) {
	if typ.IsPrimitiveType() {
		return cty.StringVal(text), nil
	}
	expr, diags := hclsyntax.ParseExpression([]byte(text), "value", hcl.InitialPos)
	if diags.HasErrors() {
		return cty.DynamicVal, hcl.Diagnostics{problem(at, "Wrong value", "The value %q is not an HCL expression: %s.", text, diags[0].Summary)}
	}
	value, diags := expr.Value(nil)
	if diags.HasErrors() {
		return cty.DynamicVal, hcl.Diagnostics{problem(at, "Wrong value", "The value %q: %s.", text, diags[0].Summary)}
	}
	return value, nil
}
