package jobs

import (
	"cmp"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/nomad/api"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/convert"
	"github.com/zclconf/go-cty/cty/gocty"
)

// decoder fills structs that carry hcl tags, above all those of nomad/api, from
// the syntax tree. It collects problems instead of stopping at the first.
type decoder struct {
	scope scope
	diags hcl.Diagnostics
	// ranges has the position of each block, by the address of its decoded value.
	ranges map[any]hcl.Range
}

func newDecoder(s scope) *decoder {
	return &decoder{scope: s, ranges: make(map[any]hcl.Range)}
}

func (d *decoder) problem(at hcl.Range, summary, format string, args ...any) {
	d.diags = d.diags.Append(problem(at, summary, format, args...))
}

// field is a struct's field as its hcl tag names it.
type field struct {
	name               string
	index              int
	block, label, must bool
}

// fieldsOf reads the hcl tags of a struct type.
func fieldsOf(typ reflect.Type) []field {
	var fields []field
	for i := range typ.NumField() {
		tag, ok := typ.Field(i).Tag.Lookup("hcl")
		if !ok {
			continue
		}
		name, kind, _ := strings.Cut(tag, ",")
		fields = append(fields, field{
			name:  name,
			index: i,
			block: kind == "block",
			label: kind == "label",
			must:  kind == "",
		})
	}
	return fields
}

var (
	durationType  = reflect.TypeFor[time.Duration]()
	anyMapType    = reflect.TypeFor[map[string]any]()
	stringMapType = reflect.TypeFor[map[string]string]()
)

// body fills the struct target from a block's body.
func (d *decoder) body(body *hclsyntax.Body, target reflect.Value) {
	typ := target.Type()
	fields := fieldsOf(typ)
	find := func(name string) (field, bool) {
		i := slices.IndexFunc(fields, func(f field) bool { return f.name == name && !f.label })
		if i < 0 {
			return field{}, false
		}
		return fields[i], true
	}
	given := make(map[string]bool)
	for _, attr := range sortedAttributes(body) {
		given[attr.Name] = true
		if d.refused(typ, attr.Name, attr.NameRange, attr.Expr) || d.shorthand(target, attr) {
			continue
		}
		f, ok := find(attr.Name)
		switch {
		case !ok:
			d.problem(attr.NameRange, "Unknown argument", "%q is not known here.", attr.Name)
		case !f.block:
			d.value(attr.Expr, target.Field(f.index), false)
		case typ.Field(f.index).Type == stringMapType:
			// A block in Nomad's syntax. Written as an argument, it may have keys that
			// are not identifiers.
			d.value(attr.Expr, target.Field(f.index), freeTextAllowed(typ, f.name))
		default:
			d.problem(attr.NameRange, "Block expected", "%q is a block here: write it without \"=\".", attr.Name)
		}
	}
	for _, block := range body.Blocks {
		if d.refused(typ, block.Type, block.TypeRange, nil) {
			continue
		}
		f, ok := find(block.Type)
		switch {
		case !ok:
			d.problem(block.TypeRange, "Unknown block", "%q is not known here.", block.Type)
		case !f.block:
			d.problem(block.TypeRange, "Argument expected", "%q is an argument here: write it with \"=\".", block.Type)
		default:
			if given[block.Type] && !repeatable(target.Field(f.index)) {
				d.problem(block.TypeRange, "Duplicate block", "There is already a %s block.", block.Type)
				continue
			}
			d.block(block, target.Field(f.index), freeTextAllowed(typ, f.name))
		}
		given[block.Type] = true
	}
	for _, f := range fields {
		if f.must && !given[f.name] {
			d.problem(body.MissingItemRange(), "Missing argument", "%q is required here.", f.name)
		}
	}
}

// repeatable reports whether several blocks may fill the field.
func repeatable(target reflect.Value) bool {
	switch target.Kind() {
	case reflect.Slice:
		return true
	case reflect.Map: // by label
		return target.Type().Elem().Kind() == reflect.Pointer
	default:
		return false
	}
}

// block fills one field from one block.
func (d *decoder) block(block *hclsyntax.Block, target reflect.Value, free bool) {
	typ := target.Type()
	switch {
	case typ == anyMapType:
		d.diags = d.diags.Extend(wantLabels(block, 0))
		target.Set(reflect.ValueOf(d.anyMap(block.Body, free)))
	case typ.Kind() == reflect.Map && typ.Elem().Kind() != reflect.Pointer:
		d.diags = d.diags.Extend(wantLabels(block, 0))
		if len(block.Body.Blocks) > 0 {
			d.problem(block.Body.Blocks[0].TypeRange, "Unknown block", "A %s block cannot contain blocks.", block.Type)
		}
		entries := reflect.MakeMap(typ)
		for _, attr := range sortedAttributes(block.Body) {
			entry := reflect.New(typ.Elem()).Elem()
			if d.value(attr.Expr, entry, free) {
				entries.SetMapIndex(reflect.ValueOf(attr.Name), entry)
			}
		}
		target.Set(entries)
	case typ.Kind() == reflect.Map:
		item := d.labelled(block, typ.Elem().Elem())
		if target.IsNil() {
			target.Set(reflect.MakeMap(typ))
		}
		if len(block.Labels) != 1 {
			return // reported by labelled
		}
		label := reflect.ValueOf(block.Labels[0])
		if target.MapIndex(label).IsValid() {
			d.problem(block.LabelRanges[0], "Duplicate block", "There is already a %s %q.", block.Type, block.Labels[0])
		}
		target.SetMapIndex(label, item)
	case typ.Kind() == reflect.Slice && typ.Elem().Kind() == reflect.Pointer:
		target.Set(reflect.Append(target, d.labelled(block, typ.Elem().Elem())))
	case typ.Kind() == reflect.Slice:
		target.Set(reflect.Append(target, d.labelled(block, typ.Elem()).Elem()))
	case typ.Kind() == reflect.Pointer:
		target.Set(d.labelled(block, typ.Elem()))
	default:
		d.problem(block.TypeRange, "Unsupported block", "%q is not supported in job templates.", block.Type)
	}
}

// labelled makes a struct from a block and its label.
func (d *decoder) labelled(block *hclsyntax.Block, typ reflect.Type) reflect.Value {
	item := reflect.New(typ)
	d.ranges[item.Interface()] = block.DefRange()
	fields := fieldsOf(typ)
	i := slices.IndexFunc(fields, func(f field) bool { return f.label })
	if i < 0 {
		d.diags = d.diags.Extend(wantLabels(block, 0))
	} else if diags := wantLabels(block, 1); diags.HasErrors() {
		d.diags = d.diags.Extend(diags)
	} else {
		label := item.Elem().Field(fields[i].index)
		if label.Kind() == reflect.Pointer {
			label.Set(reflect.ValueOf(&block.Labels[0]))
		} else {
			label.SetString(block.Labels[0])
		}
	}
	d.body(block.Body, item.Elem())
	switch c := item.Interface().(type) {
	case *api.Constraint:
		c.Operand = cmp.Or(c.Operand, "=")
	case *api.Affinity:
		c.Operand = cmp.Or(c.Operand, "=")
	default:
		d.checkBlock(block, c)
	}
	return item
}

// value evaluates expr into target and reports whether it set target; null does
// not. free is true if a session's free text is allowed here.
func (d *decoder) value(expr hclsyntax.Expression, target reflect.Value, free bool) bool {
	value, ok := d.eval(expr, free)
	if !ok || value.IsNull() {
		return false
	}
	at := expr.Range()
	pointer := target
	if target.Kind() != reflect.Pointer {
		pointer = target.Addr()
	} else {
		pointer = reflect.New(target.Type().Elem())
		defer func() { target.Set(pointer) }()
	}
	if pointer.Type().Elem() == durationType {
		duration, err := durationOf(value)
		if err != nil {
			d.problem(at, "Wrong value", "Want a duration such as \"10s\": %v.", err)
			return false
		}
		pointer.Elem().SetInt(int64(duration))
		return true
	}
	want, err := gocty.ImpliedType(pointer.Elem().Interface())
	if err != nil {
		d.problem(at, "Unsupported argument", "This argument is not supported in job templates.")
		return false
	}
	if value, err = convert.Convert(value, want); err == nil {
		err = gocty.FromCtyValue(value, pointer.Interface())
	}
	if err != nil {
		d.problem(at, "Wrong value", "%v.", err)
		return false
	}
	return true
}

func durationOf(value cty.Value) (time.Duration, error) {
	text, err := convert.Convert(value, cty.String)
	if err != nil {
		return 0, err
	}
	return time.ParseDuration(text.AsString())
}

func sortedAttributes(body *hclsyntax.Body) []*hclsyntax.Attribute {
	attrs := make([]*hclsyntax.Attribute, 0, len(body.Attributes))
	for _, attr := range body.Attributes {
		attrs = append(attrs, attr)
	}
	slices.SortFunc(attrs, func(a, b *hclsyntax.Attribute) int { return a.SrcRange.Start.Byte - b.SrcRange.Start.Byte })
	return attrs
}
