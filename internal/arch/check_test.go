package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/shoenig/test/must"
)

const root = "example.com/m"

// own is a package of the module under check, with a comment and the imports.
func own(path string, imports ...string) importer {
	return importer{
		ImportPath: root + "/" + path,
		Module:     &module{Path: root, Main: true},
		Doc:        "Package documented.",
		GoFiles:    []string{"x.go"},
		Imports:    imports,
	}
}

func standard(path string) importer { return importer{ImportPath: path, Standard: true} }

func foreign(modulePath, path string, imports ...string) importer {
	return importer{ImportPath: path, Module: &module{Path: modulePath}, GoFiles: []string{"x.go"}, Imports: imports}
}

func TestCheck_judges_each_arrow(t *testing.T) {
	others := []importer{
		standard("context"),
		standard("testing"),
		standard("testing/synctest"),
		standard("net/http/httptest"),
		foreign("github.com/google/uuid", "github.com/google/uuid"),
		foreign("github.com/hashicorp/nomad/api", "github.com/hashicorp/nomad/api"),
		foreign("go.opentelemetry.io/otel/trace", "go.opentelemetry.io/otel/trace"),
		foreign("go.opentelemetry.io/otel/sdk", "go.opentelemetry.io/otel/sdk/trace"),
		foreign("github.com/shoenig/test", "github.com/shoenig/test/must"),
		own("cmd/bivouac"), own("internal/command"), own("internal/command/table"), own("internal/agent"),
		own("internal/consul"), own("internal/memory"), own("internal/stack"),
		own("jobs"), own("runtime/nomad"), own("runtime/conformance"), own("runtime/plugin"), own("runtime/plugin/proto/v1"),
		own("scheduler"), own("runtime"), own("runtime/ready"),
	}
	tests := []struct{ name, from, to, want string }{
		{"inward by one layer", "cmd/bivouac", root + "/internal/command", ""},
		{"inward past layers", "cmd/bivouac", root + "/runtime", ""},
		{"into another module", "internal/consul", "github.com/google/uuid", ""},
		{"within one part", "internal/command", root + "/internal/command/table", ""},
		{"within one part, deeper", "runtime/plugin", root + "/runtime/plugin/proto/v1", ""},
		{"between adapters that may", "runtime/nomad", root + "/jobs", ""},
		{"to a part beneath one that may", "internal/pluginhost", root + "/runtime/plugin/proto/v1", ""},
		{"between adapters", "internal/memory", root + "/internal/consul", "both are in the layer adapters"},
		{"between adapters that may, but backwards", "jobs", root + "/runtime/nomad", "both are in the layer adapters"},
		{"outward", "internal/agent", root + "/internal/command", "points outward"},
		{"outward from an adapter", "internal/consul", root + "/internal/agent", "points outward"},
		{"outward from the contract", "runtime", root + "/scheduler", "not among the few"},

		{"the contract to the standard library", "runtime", "context", ""},
		{"the contract to another module", "runtime", "github.com/google/uuid", "not among the few"},
		{"the contract to what waits for it", "runtime", root + "/runtime/ready", "not among the few"},
		{"what waits to the contract", "runtime/ready", root + "/runtime", ""},
		{"the domain to the contract", "scheduler", root + "/runtime", ""},
		{"the domain to what waits", "scheduler", root + "/runtime/ready", "not among the few"},
		{"the domain to a chosen module", "scheduler", "github.com/google/uuid", ""},
		{"the domain to OpenTelemetry's API", "scheduler", "go.opentelemetry.io/otel/trace", ""},
		{"the domain to OpenTelemetry's SDK", "scheduler", "go.opentelemetry.io/otel/sdk/trace", "not among the few"},
		{"the domain to Nomad", "scheduler", "github.com/hashicorp/nomad/api", "not among the few"},

		{"product to testing", "internal/memory", "testing", "exists for tests"},
		{"product to a package beneath testing", "internal/memory", "testing/synctest", "exists for tests"},
		{"product to a test server", "internal/memory", "net/http/httptest", "exists for tests"},
		{"product to a testing library", "internal/memory", "github.com/shoenig/test/must", "exists for tests"},
		{"product to the stack", "internal/command", root + "/internal/stack", "exists for tests"},
		{"the conformance suite to the command that offers it", "internal/command", root + "/runtime/conformance", ""},
		{"test support to testing", "internal/stack", "testing", ""},
		{"test support to anything", "internal/stack", root + "/internal/agent", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			// given a tree in which one package has one import
			packages := slices.DeleteFunc(slices.Clone(others), func(p importer) bool {
				return p.ImportPath == root+"/"+test.from
			})
			packages = append(packages, own(test.from, test.to))

			found := check(bivouac(), packages)

			if test.want == "" {
				must.SliceEmpty(t, found)
				return
			}
			must.Len(t, 1, found)
			must.StrHasPrefix(t, test.from+" → "+strings.TrimPrefix(test.to, root+"/")+": "+test.want, found[0])
		})
	}
}

func TestCheck_wants_a_comment_on_each_package(t *testing.T) {
	silent := own("internal/memory")
	silent.Doc = ""

	must.Eq(t, []string{"internal/memory: has no package comment"}, check(bivouac(), []importer{silent}))
}

func TestCheck_asks_nothing_of_a_package_that_has_only_tests(t *testing.T) {
	tests := own("internal/memory")
	tests.Doc, tests.GoFiles = "", nil

	must.SliceEmpty(t, check(bivouac(), []importer{tests}))
}

func TestCheck_leaves_tests_free(t *testing.T) {
	binary := own("internal/memory.test", "testing", root+"/internal/agent")
	inside := own("internal/memory [example.com/m/internal/memory.test]", "testing", root+"/internal/agent")
	outside := own("internal/memory_test [example.com/m/internal/memory.test]", "testing", root+"/internal/agent")

	must.SliceEmpty(t, check(bivouac(), []importer{standard("testing"), own("internal/agent"), binary, inside, outside}))
}

func TestCheck_refuses_banned_modules_wherever_they_are_reached_from(t *testing.T) {
	busl := foreign("github.com/hashicorp/nomad", "github.com/hashicorp/nomad/client", "github.com/hashicorp/nomad/helper")
	helper := foreign("github.com/hashicorp/nomad", "github.com/hashicorp/nomad/helper")
	test := own("internal/memory", "github.com/hashicorp/nomad/client")
	test.ImportPath += " [" + test.ImportPath + ".test]"

	tests := []struct {
		name     string
		importer importer
		want     string
	}{
		{
			"the product", own("internal/memory", "github.com/hashicorp/nomad/client"),
			"internal/memory → github.com/hashicorp/nomad/client: nothing may depend on that module",
		},
		{
			"a test", test,
			"internal/memory → github.com/hashicorp/nomad/client: nothing may depend on that module",
		},
		{
			"a dependency", foreign("example.com/other", "example.com/other", "github.com/hashicorp/nomad/client"),
			"example.com/other → github.com/hashicorp/nomad/client: nothing may depend on that module",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			must.Eq(t, []string{tt.want}, check(bivouac(), []importer{own("internal/memory"), tt.importer, busl, helper}))
		})
	}
}

func TestDecode_reads_what_go_list_prints(t *testing.T) {
	const output = `{"ImportPath":"context","Standard":true}
{"ImportPath":"example.com/m/jobs","Module":{"Path":"example.com/m","Main":true},"Doc":"Package jobs.","GoFiles":["jobs.go"],"Imports":["context"]}
`
	packages, err := decode(strings.NewReader(output))

	must.NoError(t, err)
	must.Eq(t, []importer{
		{ImportPath: "context", Standard: true},
		{
			ImportPath: "example.com/m/jobs",
			Module:     &module{Path: "example.com/m", Main: true},
			Doc:        "Package jobs.",
			GoFiles:    []string{"jobs.go"},
			Imports:    []string{"context"},
		},
	}, packages)
}

func TestDecode_fails_on_output_that_is_cut_off(t *testing.T) {
	_, err := decode(strings.NewReader(`{"ImportPath":"con`))
	must.Error(t, err)
}
