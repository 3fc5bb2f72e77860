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
	"syscall"
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
		Open:   func(context.Context) (runtime.Driver, error) { return driver, nil },
		Reopen: restart(h),
		Crash:  restart(h),
		Kill: func(ctx context.Context, sandbox runtime.Sandbox) error {
			return exec.CommandContext(ctx, "docker", "kill", sandbox.ContainerID).Run()
		},
		Leftovers: func(ctx context.Context, sessionID string) ([]string, error) {
			out, err := exec.CommandContext(ctx, "docker", "ps", "--all", "--quiet", "--filter=label=bivouac.session_id="+sessionID).Output()
			return strings.Fields(string(out)), err
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
				Open:   func(context.Context) (runtime.Driver, error) { return driver, nil },
				Reopen: restart(h),
				Crash:  restart(h),
				Kill:   killProcess,
				Demo:   true,
			})
		})
	}
}

// restart kills the plugin's process and waits for the next one.
func restart(h *pluginhost.Host) func(context.Context, runtime.Driver) (runtime.Driver, error) {
	return func(ctx context.Context, driver runtime.Driver) (runtime.Driver, error) {
		again := time.NewTicker(10 * time.Millisecond)
		defer again.Stop()
		for killed := 0; ; {
			now := h.Status()[0]
			switch {
			case now.State != pluginhost.StateRunning || now.PID == killed:
			case killed != 0:
				return driver, nil
			default:
				killed = now.PID
				if err := syscall.Kill(killed, syscall.SIGKILL); err != nil {
					return nil, err
				}
			}
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-again.C:
			}
		}
	}
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
		Open:   func(context.Context) (runtime.Driver, error) { return driver, nil },
		Reopen: restart(h),
		Crash:  restart(h),
		Kill:   killProcess,
		Demo:   true,
	})
}

// killProcess kills what the examples name a sandbox by: its process.
func killProcess(_ context.Context, sandbox runtime.Sandbox) error {
	digits, _, _ := strings.Cut(sandbox.ContainerID, "-")
	pid, err := strconv.Atoi(digits)
	if err != nil {
		return err
	}
	return syscall.Kill(pid, syscall.SIGKILL)
}
