package main

import (
	"go/parser"
	"go/token"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/shoenig/test/must"
)

// TestMutantsFitTheSource shows that each safeguard is marked in the source and
// that valid Go code remains without it. It also shows that no mark names an
// unknown safeguard.
func TestMutantsFitTheSource(t *testing.T) {
	files, err := sources("../../..")
	must.NoError(t, err)
	texts, marked := map[string]string{}, map[string]bool{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		must.NoError(t, err)
		for line := range strings.Lines(string(text)) {
			if _, name, ok := strings.Cut(strings.TrimSpace(line), marker); ok {
				texts[file], marked[name] = string(text), true
			}
		}
	}
	var names []string
	for _, m := range mutants() {
		names = append(names, m.without)
		for file, text := range texts {
			changed, _, err := m.change(text)
			must.NoError(t, err, must.Sprintf("without the %s: %s", m.without, file))
			_, err = parser.ParseFile(token.NewFileSet(), file, changed, 0)
			must.NoError(t, err, must.Sprintf("without the %s", m.without))
		}
	}
	must.SliceContainsAll(t, slices.Collect(maps.Keys(marked)), names)
}

func TestLineChanges(t *testing.T) {
	for _, test := range []struct {
		how      func(string) string
		from, to string
	}{
		{never, `case a || b:`, `case false && (a || b):`},
		{never, `return a == "x"`, `return false && (a == "x")`},
		{never, `if why := f(a); why != "" {`, `if why := f(a); false && (why != "") {`},
		{always, `if len(a) == 0 {`, `if true || (len(a) == 0) {`},
		{instead(`return nil`), `return f(a)`, `return nil`},
		{words("a", "b", "c", "d"), `f(a, c)`, `f(b, d)`},
	} {
		must.Eq(t, test.to, test.how(test.from))
	}
}
