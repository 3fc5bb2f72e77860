package jobs

import (
	"bytes"
	"encoding/json"
	"reflect"
	"slices"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/nomad/api"
	"github.com/zclconf/go-cty/cty"
	ctyjson "github.com/zclconf/go-cty/cty/json"
)

// freeTextAllowed reports whether the named block of a struct may contain a
// session's free text. It may if Nomad treats the block's values as data.
func freeTextAllowed(typ reflect.Type, name string) bool {
	switch typ {
	case reflect.TypeFor[api.Task]():
		return name == "config" || name == "env" || name == "meta"
	case reflect.TypeFor[api.TaskGroup](), reflect.TypeFor[api.Job]():
		return name == "meta"
	default:
		return false
	}
}

// splitByDriver lists the arguments whose strings docker and podman split at
// ":", and what to write instead.
var splitByDriver = map[string]string{
	"volumes":     "write a mount block, which accepts a path with \":\"",
	"devices":     "write a list of objects",
	"extra_hosts": "read the value from the task's environment",
}

// anyMap decodes a body whose schema only the task driver knows. A block
// becomes a list of maps, even if there is only one, and each label adds a map
// around it. Nomad's drivers expect this form.
func (d *decoder) anyMap(body *hclsyntax.Body, free bool) map[string]any {
	result := make(map[string]any)
	for _, attr := range sortedAttributes(body) {
		instead, split := splitByDriver[attr.Name]
		value, ok := d.eval(attr.Expr, free)
		if !ok || value.IsNull() {
			continue
		}
		if split && hasFreeText(attr.Expr) {
			d.problem(attr.Expr.Range(), "Free text not allowed here",
				"The driver splits the strings of %s at \":\", so a session's value could add fields of its own: %s.", attr.Name, instead)
			continue
		}
		plain, err := goValue(value)
		if err != nil {
			d.problem(attr.Expr.Range(), "Wrong value", "%v.", err)
			continue
		}
		result[attr.Name] = plain
	}
	for _, block := range body.Blocks {
		inner := d.anyMap(block.Body, free)
		for _, label := range slices.Backward(block.Labels) {
			inner = map[string]any{label: []map[string]any{inner}}
		}
		list, ok := result[block.Type].([]map[string]any)
		if result[block.Type] != nil && !ok {
			d.problem(block.TypeRange, "Duplicate argument", "%q is already set as an argument.", block.Type)
			continue
		}
		result[block.Type] = append(list, inner)
	}
	return result
}

// hasFreeText reports whether the expression refers to the session's free text.
func hasFreeText(expr hclsyntax.Expression) bool {
	for _, traversal := range expr.Variables() {
		if traversal.RootName() != "session" {
			continue
		}
		if len(traversal) < 2 {
			return true
		}
		attr, ok := traversal[1].(hcl.TraverseAttr)
		if !ok || attr.Name == "agent_id" || attr.Name == "volume_host_path" {
			return true
		}
	}
	return false
}

// goValue converts a value to what encoding/json makes of it. Numbers stay exact.
func goValue(value cty.Value) (any, error) {
	text, err := json.Marshal(ctyjson.SimpleJSONValue{Value: value})
	if err != nil {
		return nil, err
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	var plain any
	err = decoder.Decode(&plain)
	return plain, err
}
