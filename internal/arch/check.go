package main

import (
	"fmt"
	"slices"
	"strings"
)

// importer is a package as `go list -json` describes it.
type importer struct {
	ImportPath string
	Standard   bool
	Module     *module // nil for the standard library and for test binaries
	Doc        string
	GoFiles    []string // without tests
	Imports    []string // those of GoFiles
}

type module struct {
	Path string
	Main bool
}

// check returns a line for each way in which packages break r, sorted.
func check(r rules, packages []importer) []string {
	t := tree{rules: r, packages: map[string]importer{}}
	for _, p := range packages {
		t.packages[p.ImportPath] = p
	}
	var found []string
	for _, p := range packages {
		found = append(found, t.bannedBy(p)...)
		if !isProduct(p) {
			continue
		}
		if p.Doc == "" {
			found = append(found, t.short(p.ImportPath)+": has no package comment")
		}
		for _, to := range p.Imports {
			if why := t.refuse(p.ImportPath, to); why != "" {
				found = append(found, t.arrow(p.ImportPath, to, why))
			}
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// isProduct says whether p is a package of the module without its tests. The
// go command names a test's binary "path.test", and what it compiles for that
// test "path [path.test]".
func isProduct(p importer) bool {
	forTest := strings.HasSuffix(p.ImportPath, ".test") || strings.HasSuffix(p.ImportPath, "]")
	return p.Module != nil && p.Module.Main && len(p.GoFiles) > 0 && !forTest
}

type tree struct {
	rules
	packages map[string]importer
}

// bannedBy returns the arrows from p into banned modules. Those from within
// such a module say nothing new.
func (t tree) bannedBy(p importer) []string {
	if t.isBanned(p) {
		return nil
	}
	var found []string
	for _, to := range p.Imports {
		if t.isBanned(t.packages[to]) {
			from, _, _ := strings.Cut(p.ImportPath, " ")
			found = append(found, t.arrow(from, to, "nothing may depend on that module"))
		}
	}
	return found
}

func (t tree) isBanned(p importer) bool {
	return p.Module != nil && slices.Contains(t.banned, p.Module.Path)
}

// refuse says why the product must not import to in from, "" where it may.
func (t tree) refuse(from, to string) string {
	target, own := t.packages[to], t.isOwn(to)
	from, to = t.short(from), t.short(to)
	switch {
	case matchAny(t.support, from):
		return ""
	case own && matchAny(t.support, to), matchAny(t.testing, to):
		return "exists for tests"
	}
	if only, ok := t.only[from]; ok && !target.Standard && !matchAny(only, to) {
		return "not among the few that " + from + " may import"
	}
	if !own {
		return ""
	}
	outer, inner := t.layerOf(from), t.layerOf(to)
	switch {
	case outer < inner, unit(from) == unit(to) && outer == inner, t.isBeside(from, to):
		return ""
	case outer == inner:
		return "both are in the layer " + t.layers[outer].name
	default:
		return "points outward; inward is " + t.order()
	}
}

func (t tree) isOwn(path string) bool {
	m := t.packages[path].Module
	return m != nil && m.Main
}

// layerOf returns the index of the layer that holds path.
func (t tree) layerOf(path string) int {
	home := -1
	for i, l := range t.layers {
		if matchAny(l.packages, path) {
			return i
		}
		if len(l.packages) == 0 {
			home = i
		}
	}
	return home
}

func (t tree) isBeside(from, to string) bool {
	for root, allowed := range t.beside {
		if match(root+"/...", from) && matchAny(allowed, to) {
			return true
		}
	}
	return false
}

func (t tree) order() string {
	names := make([]string, len(t.layers))
	for i, l := range t.layers {
		names[i] = l.name
	}
	return strings.Join(names, " → ")
}

func (t tree) arrow(from, to, why string) string {
	return fmt.Sprintf("%s → %s: %s", t.short(from), t.short(to), why)
}

// short returns path relative to the module where it is the module's own.
func (t tree) short(path string) string {
	if m := t.packages[path].Module; m != nil && m.Main {
		return strings.TrimPrefix(path, m.Path+"/")
	}
	return path
}

// unit returns the path of the package that path belongs to: packages beneath
// internal/x, runtime/x or cmd/x are part of x.
func unit(path string) string {
	parts := strings.SplitN(path, "/", 3)
	return strings.Join(parts[:min(2, len(parts))], "/")
}

func matchAny(patterns []string, path string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return match(p, path) })
}

func match(pattern, path string) bool {
	root, beneath := strings.CutSuffix(pattern, "/...")
	return path == root || beneath && strings.HasPrefix(path, root+"/")
}
