package processplugin_test

import (
	"context"
	"encoding/json"
	"os"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/demosandbox"
	"github.com/bivouac/bivouac/internal/test/processplugin"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/conformance"
)

// TestMain runs the tests or, as a sandbox, the demo sandbox: the test binary
// is both.
func TestMain(m *testing.M) {
	if os.Getenv("BIVOUAC_SESSION_ID") == "" {
		os.Exit(m.Run())
	}
	os.Exit(demosandbox.Main(os.Args[1:], func() error {
		return demosandbox.Run(context.Background(), demosandbox.FromEnv(os.Getenv))
	}))
}

func TestConformance(t *testing.T) {
	if _, err := os.Stat("/proc/self/environ"); err != nil {
		t.Skip("this system does not show the environment of a process")
	}
	config, err := json.Marshal(map[string]any{"dir": t.TempDir(), "command": []string{os.Args[0]}})
	must.NoError(t, err)
	open := func(instance string) func(context.Context) (runtime.Driver, error) {
		return func(ctx context.Context) (runtime.Driver, error) {
			p := new(processplugin.Plugin)
			err := p.Configure(ctx, runtime.Config{Instance: instance, JSON: config})
			return p, err
		}
	}
	conformance.Run(t, conformance.Harness{
		Open:    open("own"),
		Reopen:  func(ctx context.Context, _ runtime.Driver) (runtime.Driver, error) { return open("own")(ctx) },
		Foreign: open("other"),
		Demo:    true,
	})
}
