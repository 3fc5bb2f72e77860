package jobs

import (
	"fmt"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
)

// file is the outer structure of a template. Nothing is evaluated yet.
type file struct {
	variables []*hclsyntax.Block
	ready     *hclsyntax.Block
	job       *hclsyntax.Block
	workspace *hclsyntax.Attribute // nil: the default
}

// splitFile finds the parts of a template and refuses everything else.
func splitFile(body *hclsyntax.Body) (*file, hcl.Diagnostics) {
	var diags hcl.Diagnostics
	f := &file{}
	for _, attr := range sortedAttributes(body) {
		if attr.Name != "workspace" {
			diags = diags.Append(problem(attr.NameRange, "Unknown argument",
				"%q is not known here. A template has variable, ready and job blocks, and may set workspace.", attr.Name))
			continue
		}
		f.workspace = attr
	}
	for _, block := range body.Blocks {
		labels := 0
		var place **hclsyntax.Block
		switch block.Type {
		case "variable":
			labels = 1
			f.variables = append(f.variables, block)
		case "ready":
			place = &f.ready
		case "job":
			place = &f.job
		default:
			diags = diags.Append(problem(block.TypeRange, "Unknown block",
				"%q is not known here. A template has variable, ready and job blocks.", block.Type))
			continue
		}
		diags = diags.Extend(wantLabels(block, labels))
		if place != nil && *place != nil {
			diags = diags.Append(problem(block.TypeRange, "Duplicate block", "There is already a %s block.", block.Type))
		}
		if place != nil {
			*place = block
		}
	}
	for name, block := range map[string]*hclsyntax.Block{"ready": f.ready, "job": f.job} {
		if block == nil {
			diags = diags.Append(problem(body.EndRange, "Missing block", "A template needs a %s block.", name))
		}
	}
	return f, diags
}

func wantLabels(block *hclsyntax.Block, n int) hcl.Diagnostics {
	if len(block.Labels) == n {
		return nil
	}
	if n == 0 {
		return hcl.Diagnostics{problem(block.LabelRanges[0], "Unwanted label", "A %s block has no label.", block.Type)}
	}
	return hcl.Diagnostics{problem(block.TypeRange, "Wrong number of labels", "A %s block has exactly one label, its name.", block.Type)}
}

func problem(at hcl.Range, summary, format string, args ...any) *hcl.Diagnostic {
	return &hcl.Diagnostic{
		Severity: hcl.DiagError,
		Summary:  summary,
		Detail:   fmt.Sprintf(format, args...),
		Subject:  &at,
	}
}
