package main

// rules says which arrows a module may have. Paths are relative to the module,
// those of other modules are whole. A pattern that ends in "/..." also matches
// what lies beneath, as with the go command.
type rules struct {
	// layers go from the outside in; an arrow may only point further in. The
	// layer without packages is the home of all that no other layer names.
	layers []layer

	// beside lists the arrows that are allowed within a layer, from a
	// package and what lies beneath it to a pattern.
	beside map[string][]string

	// only lists, for a package, all that it may import beyond the standard
	// library.
	only map[string][]string

	// support exists for tests and measurements. The product does not import
	// it, and it may import everything.
	support []string

	// testing are libraries that the product does not import.
	testing []string

	// banned are modules that nothing here may depend on, not even a test.
	banned []string
}

type layer struct {
	name     string
	packages []string
}

// bivouac returns the rules of this module.
func bivouac() rules {
	return rules{
		layers: []layer{
			{"cmd", []string{"cmd/..."}},
			{"internal/command", []string{"internal/command/..."}},
			{"internal/agent", []string{"internal/agent/..."}},
			{"adapters", nil},
			{"scheduler", []string{"scheduler"}},
			{"runtime", []string{"internal/version", "runtime", "runtime/ready"}},
		},
		beside: map[string][]string{
			"internal/apiclient":  {"internal/httpapi/wire"},
			"internal/consul":     {"internal/chatmutex"},
			"internal/memory":     {"internal/chatmutex"},
			"internal/pluginhost": {"runtime/plugin/..."},
			"runtime/nomad":       {"jobs"},
			"runtime/ready":       {"runtime"},
		},
		only: map[string][]string{
			"internal/version": {},
			"runtime":          {},
			"runtime/ready":    {"runtime"},
			"scheduler": {
				"runtime",
				"github.com/google/uuid",
				"github.com/hashicorp/go-hclog",
				"golang.org/x/sync/...",
				// OpenTelemetry's API; its SDK is the agent's to choose.
				"go.opentelemetry.io/otel",
				"go.opentelemetry.io/otel/attribute",
				"go.opentelemetry.io/otel/codes",
				"go.opentelemetry.io/otel/metric/...",
				"go.opentelemetry.io/otel/trace/...",
			},
		},
		support: []string{
			"internal/arch",
			"internal/bench/...",
			"internal/chaos/...",
			"internal/e2e/...",
			"internal/fakeruntime",
			"internal/httpapi/apitest",
			"internal/simulate/...",
			"internal/stack/...",
			"internal/storetest",
		},
		testing: []string{
			"testing/...",
			"net/http/httptest",
			"github.com/anishathalye/porcupine/...",
			"github.com/google/go-cmp/...",
			"github.com/rogpeppe/go-internal/...",
			"github.com/shoenig/test/...",
			"go.uber.org/goleak/...",
			"pgregory.net/rapid/...",
		},
		// Under the BUSL. Their clients are modules of their own under the MPL.
		banned: []string{
			"github.com/hashicorp/consul",
			"github.com/hashicorp/nomad",
			"github.com/hashicorp/vault",
		},
	}
}
