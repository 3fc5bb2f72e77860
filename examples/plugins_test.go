// Package examples_test holds each example plugin to the contract, as it is
// built from its own folder and run by a host.
package examples_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/internal/stack"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/conformance"
)

func TestMain(m *testing.M) { os.Exit(stack.Main(m)) }

// build builds the module in a folder and returns the program.
func build(t *testing.T, folder string) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), folder)
	output(t, "go", "build", "-C", folder, "-o", program, ".")
	return program
}

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	must.NoError(t, err, must.Sprintf("%s %s: %s", name, strings.Join(args, " "), out))
	return strings.TrimSpace(string(out))
}

// host runs a plugin until the test ends, and returns its driver.
func host(t *testing.T, plugin pluginhost.Plugin, config any) (*pluginhost.Host, runtime.Driver) {
	t.Helper()
	var err error
	plugin.Config, err = json.Marshal(config)
	must.NoError(t, err)
	logger := hclog.New(&hclog.LoggerOptions{Output: t.Output(), Level: hclog.Info})
	h, err := pluginhost.New(pluginhost.Config{Plugins: []pluginhost.Plugin{plugin}, Instance: "examples", Logger: logger})
	must.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	must.NoError(t, h.AwaitStart(t.Context()))
	return h, h.Drivers()[plugin.Name]
}

func TestPluginDocker(t *testing.T) {
	image := stack.DockerForTest(t)
	plugin := pluginhost.Plugin{Name: "docker", Path: build(t, "plugin-docker")}
	t.Cleanup(func() { // the marks that would go after an hour
		if marks := strings.Fields(output(t, "docker", "volume", "ls", "--quiet", "--filter=label=bivouac.instance=examples")); len(marks) > 0 {
			output(t, "docker", append([]string{"volume", "rm"}, marks...)...)
		}
	})
	h, driver := host(t, plugin, map[string]any{"image": image, "ready_path": "/healthz", "memory_mib": 64})
	conformance.Run(t, conformance.Harness{
		Open:   func(*testing.T) runtime.Driver { return driver },
		Reopen: func(t *testing.T, _ runtime.Driver) runtime.Driver { return restarted(t, h, driver) },
		Kill:   func(t *testing.T, sandbox runtime.Sandbox) { output(t, "docker", "kill", sandbox.ContainerID) },
		Leftovers: func(t *testing.T, sessionID string) []string {
			return strings.Fields(output(t, "docker", "ps", "--all", "--quiet", "--filter=label=bivouac.session_id="+sessionID))
		},
		Demo: true,
	})
}

func TestPluginBubblewrap(t *testing.T) {
	bivouac := filepath.Join(t.TempDir(), "bivouac")
	must.NoError(t, stack.BuildBivouac(t.Context(), bivouac))
	state := t.TempDir()
	plugin := pluginhost.Plugin{Name: "bubblewrap", Path: build(t, "plugin-bubblewrap")}
	for _, network := range []bool{false, true} {
		t.Run(fmt.Sprintf("network %v", network), func(t *testing.T) {
			h, driver := host(t, plugin, map[string]any{
				"command":    []string{bivouac, "demo-sandbox"},
				"ready_path": "/healthz",
				"read_only":  []string{bivouac},
				"network":    network,
				"state_dir":  state,
			})
			conformance.Run(t, conformance.Harness{
				Open:   func(*testing.T) runtime.Driver { return driver },
				Reopen: func(t *testing.T, _ runtime.Driver) runtime.Driver { return restarted(t, h, driver) },
				Kill:   func(t *testing.T, sandbox runtime.Sandbox) { output(t, "kill", "-KILL", pidOf(sandbox)) },
				Demo:   true,
			})
		})
	}
}

// restarted kills the plugin's process and waits for the next one.
func restarted(t *testing.T, h *pluginhost.Host, driver runtime.Driver) runtime.Driver {
	t.Helper()
	before := h.Status()[0].PID
	output(t, "kill", "-KILL", strconv.Itoa(before))
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for range again.C {
		if now := h.Status()[0]; now.State == pluginhost.StateRunning && now.PID != before {
			break
		}
	}
	return driver
}

func TestPluginPython(t *testing.T) {
	bivouac := filepath.Join(t.TempDir(), "bivouac")
	must.NoError(t, stack.BuildBivouac(t.Context(), bivouac))
	program, err := filepath.Abs("plugin-python/plugin.py")
	must.NoError(t, err)
	h, driver := host(t, pluginhost.Plugin{Name: "python", Path: program}, map[string]any{
		"command":    []string{bivouac, "demo-sandbox"},
		"ready_path": "/healthz",
		"state_dir":  t.TempDir(),
	})
	conformance.Run(t, conformance.Harness{
		Open:   func(*testing.T) runtime.Driver { return driver },
		Reopen: func(t *testing.T, _ runtime.Driver) runtime.Driver { return restarted(t, h, driver) },
		Kill:   func(t *testing.T, sandbox runtime.Sandbox) { output(t, "kill", "-KILL", pidOf(sandbox)) },
		Demo:   true,
	})
}

// pidOf is the process behind a sandbox of the examples that name it so.
func pidOf(sandbox runtime.Sandbox) string {
	pid, _, _ := strings.Cut(sandbox.ContainerID, "-")
	return pid
}
