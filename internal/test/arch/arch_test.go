// Package arch holds a test that compares the imports of the product with the
// picture in CONTRIBUTING.md.
package arch

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/shoenig/test/must"
)

const (
	module = "github.com/bivouac/bivouac"
	root   = "../../.."
)

// picture is the flowchart: which folders each box holds, and where its arrows go.
type picture struct {
	folders map[string][]string
	arrows  map[string][]string
}

var (
	box   = regexp.MustCompile(`(\w+)\["([^"]+)"\]`)
	arrow = regexp.MustCompile(`^(\w+) --> (.+)$`)
)

// readPicture reads the Mermaid flowchart of a document. A box names its folders,
// separated by commas.
func readPicture(document string) (picture, error) {
	p := picture{folders: make(map[string][]string), arrows: make(map[string][]string)}
	_, chart, _ := strings.Cut(document, "```mermaid\n")
	chart, _, found := strings.Cut(chart, "```")
	if !found {
		return p, errors.New("the document has no picture")
	}
	for line := range strings.Lines(chart) {
		line = strings.TrimSpace(line)
		if m := box.FindStringSubmatch(line); m != nil {
			p.folders[m[1]] = strings.Split(m[2], ", ")
		}
		if m := arrow.FindStringSubmatch(line); m != nil {
			p.arrows[m[1]] = append(p.arrows[m[1]], strings.Split(m[2], " & ")...)
		}
	}
	return p, nil
}

// boxOf returns the box that holds a folder or the closest folder above it.
func (p picture) boxOf(folder string) string {
	for ; folder != "."; folder = path.Dir(folder) {
		for name, folders := range p.folders {
			if slices.Contains(folders, folder) {
				return name
			}
		}
	}
	return ""
}

// leads reports whether arrows lead from one box to another.
func (p picture) leads(from, to string) bool {
	return slices.ContainsFunc(p.arrows[from], func(next string) bool { return next == to || p.leads(next, to) })
}

// refuse says why a package must not import another one, "" if it may.
func (p picture) refuse(from, to string) string {
	a, b := p.boxOf(from), p.boxOf(to)
	switch {
	case a == "":
		return from + " is in no box of the picture"
	case b == "":
		return fmt.Sprintf("%s imports %s, which is in no box of the picture", from, to)
	case a != b && !p.leads(a, b):
		return fmt.Sprintf("%s imports %s, and no arrows lead from %s to %s", from, to, a, b)
	default:
		return ""
	}
}

// goPackage is a package as `go list -json` describes it.
type goPackage struct {
	ImportPath, Doc string
	Module          *struct {
		Path string
		Main bool
	}
	GoFiles, Imports []string
}

func goList(t *testing.T, args ...string) []goPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list", "-json=ImportPath,Doc,Module,GoFiles,Imports"}, args...)...)
	cmd.Dir, cmd.Stderr = root, os.Stderr
	out, err := cmd.Output()
	must.NoError(t, err)
	var all []goPackage
	for decoder := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		err := decoder.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		must.NoError(t, err)
		all = append(all, p)
	}
}

func TestImportsFollowThePicture(t *testing.T) {
	document, err := os.ReadFile(root + "/CONTRIBUTING.md")
	must.NoError(t, err)
	p, err := readPicture(string(document))
	must.NoError(t, err)
	own := func(importPath string) (folder string, ok bool) { return strings.CutPrefix(importPath, module+"/") }
	for _, pkg := range goList(t, "./...") {
		folder, ok := own(pkg.ImportPath)
		if !ok || len(pkg.GoFiles) == 0 || strings.HasPrefix(folder, "internal/test/") {
			continue
		}
		if pkg.Doc == "" {
			t.Errorf("%s has no package comment", folder)
		}
		for _, to := range pkg.Imports {
			if to, ok := own(to); ok {
				if why := p.refuse(folder, to); why != "" {
					t.Error(why)
				}
			}
		}
	}
}

// The linter refuses direct imports of these modules. This refuses the others, too.
func TestNothingDependsOnModulesUnderTheBUSL(t *testing.T) {
	for _, pkg := range goList(t, "-deps", "-test", "./...") {
		if pkg.Module != nil && slices.Contains([]string{"github.com/hashicorp/consul", "github.com/hashicorp/nomad", "github.com/hashicorp/vault"}, pkg.Module.Path) {
			t.Errorf("%s is among the dependencies", pkg.ImportPath)
		}
	}
}

func TestPicture(t *testing.T) {
	p, err := readPicture("text\n```mermaid\nflowchart TD\n  cmd[\"cmd/x\"]\n  agent[\"internal/agent, internal/config\"]\n  api[\"internal/api\"]\n  domain[\"scheduler\"]\n" +
		"  agent --> domain\n  api --> domain\n  cmd --> agent & api\n```\n")
	must.NoError(t, err)
	for _, c := range []struct{ name, from, to, want string }{
		{"along an arrow", "cmd/x", "internal/agent", ""},
		{"along two arrows", "cmd/x", "scheduler", ""},
		{"into a folder below", "cmd/x", "internal/api/wire", ""},
		{"within a box", "internal/agent", "internal/config", ""},
		{"against an arrow", "scheduler", "internal/agent", "no arrows lead from domain to agent"},
		{"without an arrow", "internal/agent", "internal/api", "no arrows lead from agent to api"},
		{"into the test bench", "internal/agent", "internal/test/stack", "is in no box"},
		{"from nowhere", "internal/new", "scheduler", "internal/new is in no box"},
	} {
		t.Run(c.name, func(t *testing.T) {
			why := p.refuse(c.from, c.to)
			if c.want == "" {
				must.Eq(t, "", why)
			} else {
				must.StrContains(t, why, c.want)
			}
		})
	}
}
