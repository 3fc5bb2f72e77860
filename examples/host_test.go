package examples_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/runtime"
)

// host runs a plugin until the test ends, and returns its driver.
func host(t *testing.T, plugin pluginhost.Plugin, instance string) (*pluginhost.Host, runtime.Driver) {
	t.Helper()
	logger := hclog.New(&hclog.LoggerOptions{Output: t.Output(), Level: hclog.Info})
	h, err := pluginhost.New(pluginhost.Config{Plugins: []pluginhost.Plugin{plugin}, Instance: instance, Logger: logger})
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

// processesOf describes the processes that bear a session ID in their arguments
// or their environment: those that run a program, or all for "".
func processesOf(sessionID, program string) []string {
	all, err := os.ReadDir("/proc")
	if err != nil {
		return []string{err.Error()}
	}
	var found []string
	for _, entry := range all {
		folder := filepath.Join("/proc", entry.Name())
		// A process may end at any moment, and those of other users do not show
		// their environment: what cannot be read is none of ours.
		cmdline, _ := os.ReadFile(filepath.Join(folder, "cmdline"))
		environ, _ := os.ReadFile(filepath.Join(folder, "environ"))
		words := strings.Split(string(cmdline), "\x00")
		if program != "" && words[0] != program {
			continue
		}
		if strings.Contains(string(cmdline)+string(environ), sessionID) {
			found = append(found, entry.Name()+": "+strings.Join(slices.DeleteFunc(words, func(w string) bool { return w == "" }), " "))
		}
	}
	return found
}
