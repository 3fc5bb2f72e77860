package config

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/hcl/v2/json"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/convert"
	ctyjson "github.com/zclconf/go-cty/cty/json"

	"github.com/bivouac/bivouac/internal/credentials"
)

// Read sets the values in the files, in order. A later file overrides an earlier one, but
// job_vars are merged. In a directory Read reads the files that end in .hcl or .json,
// sorted by name, without those that begin with a dot, such as backups of editors. Errors
// contain file and line.
func (c *Config) Read(paths ...string) error {
	var errs []error
	for _, path := range paths {
		files, err := filesAt(path)
		errs = append(errs, err)
		for _, file := range files {
			errs = append(errs, c.readFile(file))
		}
	}
	return errors.Join(errs...)
}

func filesAt(path string) ([]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	entries, err := os.ReadDir(path) // sorted by name
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	var files []string
	for _, entry := range entries {
		ext := filepath.Ext(entry.Name())
		if !entry.IsDir() && (ext == ".hcl" || ext == ".json") && !strings.HasPrefix(entry.Name(), ".") {
			files = append(files, filepath.Join(path, entry.Name()))
		}
	}
	if files == nil {
		return nil, fmt.Errorf("config: %s contains no .hcl or .json file", path)
	}
	return files, nil
}

func (c *Config) readFile(path string) error {
	text, err := credentials.ReadFile(path)
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	return c.parse(path, text)
}

func (c *Config) parse(path string, text []byte) error {
	var file *hcl.File
	var diags hcl.Diagnostics
	if filepath.Ext(path) == ".json" {
		file, diags = json.Parse(text, path)
	} else {
		file, diags = hclsyntax.ParseConfig(text, path, hcl.InitialPos)
	}
	if diags.HasErrors() {
		return told(diags)
	}
	return told(c.decode(file.Body))
}

// told returns an error with one line for each diagnostic, which begins with file and
// line.
func told(diags hcl.Diagnostics) error {
	var errs []error
	for _, diag := range diags {
		if diag.Severity != hcl.DiagError {
			continue
		}
		where := ""
		if diag.Subject != nil {
			where = position(*diag.Subject) + ": "
		}
		errs = append(errs, fmt.Errorf("%s%s: %s", where, diag.Summary, strings.TrimSpace(diag.Detail)))
	}
	return errors.Join(errs...)
}

func position(r hcl.Range) string { return fmt.Sprintf("%s:%d", r.Filename, r.Start.Line) }

func (c *Config) decode(body hcl.Body) hcl.Diagnostics {
	blocks := c.blocks()
	var schema hcl.BodySchema
	for name := range maps.Keys(blocks) {
		schema.Blocks = append(schema.Blocks, hcl.BlockHeaderSchema{Type: name})
	}
	labelled := map[string]func(*hcl.Block) hcl.Diagnostics{
		"plugin": c.decodePlugin, "policy": c.decodePolicy, "token": c.decodeToken, "jwt": c.decodeJWT, "audit": c.decodeAudit, "pool": c.decodePool,
	}
	for name := range maps.Keys(labelled) {
		schema.Blocks = append(schema.Blocks, hcl.BlockHeaderSchema{Type: name, LabelNames: []string{"name"}})
	}
	diags := c.decodeKeys(body, schema, "", c.keys(), func(block *hcl.Block) hcl.Diagnostics {
		if decode, ok := labelled[block.Type]; ok {
			if diags := c.refuseDuplicate(block); diags != nil {
				return diags
			}
			return decode(block)
		}
		c.setBy(block.Type, position(block.DefRange))
		return c.decodeKeys(block.Body, hcl.BodySchema{}, block.Type+".", blocks[block.Type], nil)
	})
	return diags
}

// refuseDuplicate refuses two blocks of a kind with one name, even in different files, because a
// reader of one file would miss the other. It records where the block is.
func (c *Config) refuseDuplicate(block *hcl.Block) hcl.Diagnostics {
	origin := block.Type + "." + block.Labels[0]
	if first, again := c.origins[origin]; again {
		return hcl.Diagnostics{{
			Severity: hcl.DiagError,
			Summary:  "Duplicate " + block.Type + " block",
			Detail:   fmt.Sprintf("%s %q is already defined at %s.", block.Type, block.Labels[0], first),
			Subject:  block.DefRange.Ptr(),
		}}
	}
	c.setBy(origin, position(block.DefRange))
	return nil
}

func (c *Config) decodeKeys(body hcl.Body, schema hcl.BodySchema, prefix string, keys []key, inner func(*hcl.Block) hcl.Diagnostics) hcl.Diagnostics {
	for _, k := range keys {
		schema.Attributes = append(schema.Attributes, hcl.AttributeSchema{Name: k.name})
	}
	content, diags := body.Content(&schema)
	for _, k := range keys {
		attr, ok := content.Attributes[k.name]
		if !ok {
			continue
		}
		diags = append(diags, setValue(k, attr)...)
		c.setBy(prefix+k.name, position(attr.Range))
	}
	for _, block := range content.Blocks {
		diags = append(diags, inner(block)...)
	}
	return diags
}

// setValue evaluates an attribute for a key's target.
func setValue(k key, attr *hcl.Attribute) hcl.Diagnostics {
	value, diags := attr.Expr.Value(nil)
	if diags.HasErrors() {
		return diags
	}
	if value.IsNull() {
		return wrong(attr, errors.New("must not be null"))
	}
	switch target := k.target.(type) {
	case *time.Duration:
		var text string
		if diags := gohcl.DecodeExpression(attr.Expr, nil, &text); diags.HasErrors() {
			return diags
		}
		if err := setText(target, text); err != nil {
			return wrong(attr, err)
		}
	case *map[string]string:
		more, diags := texts(k, attr, value)
		if diags.HasErrors() {
			return diags
		}
		if *target == nil {
			*target = map[string]string{}
		}
		maps.Copy(*target, more)
	case *[]string:
		if k.name == "http_addr" && value.Type() == cty.String { // it may be a single address
			*target = []string{value.AsString()}
			return nil
		}
		return gohcl.DecodeExpression(attr.Expr, nil, target)
	default:
		return gohcl.DecodeExpression(attr.Expr, nil, target)
	}
	return nil
}

// texts returns the values of a map as strings. Only values of job_vars may be lists and
// maps.
func texts(k key, attr *hcl.Attribute, value cty.Value) (map[string]string, hcl.Diagnostics) {
	var all map[string]string
	if k.name != "job_vars" || !value.Type().IsObjectType() {
		diags := gohcl.DecodeExpression(attr.Expr, nil, &all)
		return all, diags
	}
	all = map[string]string{}
	for name, element := range value.AsValueMap() {
		text, err := textOf(element)
		if err != nil {
			return nil, wrong(attr, fmt.Errorf("%s: %w", name, err))
		}
		all[name] = text
	}
	return all, nil
}

// textOf returns a value as a person would type it. It returns a list or a map as an
// expression that is the same in HCL and JSON.
func textOf(value cty.Value) (string, error) {
	if value.IsNull() {
		return "", errors.New("must not be null")
	}
	if value.Type().IsPrimitiveType() {
		text, err := convert.Convert(value, cty.String)
		if err != nil {
			return "", err
		}
		return text.AsString(), nil
	}
	text, err := ctyjson.SimpleJSONValue{Value: value}.MarshalJSON()
	if err != nil {
		return "", err
	}
	return asHCL(string(text)), nil
}

var jsonEscape = regexp.MustCompile(`\\.`)

// asHCL rewrites JSON so that it is also an HCL expression with the same value. HCL
// interpolates ${ and %{, and knows fewer escapes.
func asHCL(text string) string {
	text = jsonEscape.ReplaceAllStringFunc(text, func(escape string) string {
		switch escape {
		case `\b`:
			return `\u0008`
		case `\f`:
			return `\u000c`
		default:
			return escape
		}
	})
	return strings.NewReplacer("${", `\u0024{`, "%{", `\u0025{`).Replace(text)
}

func wrong(attr *hcl.Attribute, err error) hcl.Diagnostics {
	return hcl.Diagnostics{{
		Severity: hcl.DiagError,
		Summary:  "Wrong value",
		Detail:   fmt.Sprintf("%s: %v.", attr.Name, err),
		Subject:  attr.Expr.Range().Ptr(),
	}}
}
