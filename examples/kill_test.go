package examples_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/internal/stack"
	"github.com/bivouac/bivouac/runtime"
)

// killedCreates is how often a plugin is killed in a create. The variable
// KILLED_CREATES of the environment asks for more.
const killedCreates = 20

// Given a plugin that is killed at some moment of each create, when the next
// process of it is asked to delete the session, then nothing runs of it.
func TestPluginBubblewrap_killed_in_creates(t *testing.T) {
	times := killedCreates
	if more := os.Getenv("KILLED_CREATES"); more != "" {
		var err error
		times, err = strconv.Atoi(more)
		must.NoError(t, err)
	}
	bivouac := filepath.Join(t.TempDir(), "bivouac")
	must.NoError(t, stack.BuildBivouac(t.Context(), bivouac))
	plugin := pluginhost.Plugin{Name: "bubblewrap", Path: build(t, "plugin-bubblewrap")}
	config := map[string]any{
		"command": []string{bivouac, "demo-sandbox"}, "ready_path": "/healthz",
		"read_only": []string{bivouac}, "state_dir": t.TempDir(),
	}
	volume := t.TempDir()
	for i := range times {
		now := time.Now()
		spec := runtime.Spec{
			SessionID: uuid.NewString(), ChatID: uuid.NewString(), AgentID: "agent-1",
			VolumeHostPath: volume, CreatedAt: now, ExpiresAt: now.Add(time.Hour),
		}
		t.Run("create "+strconv.Itoa(i), func(t *testing.T) {
			h, driver := host(t, plugin, config)
			killDuring(t, h, time.Duration(i)*5*time.Millisecond, func() {
				_, _ = driver.Create(t.Context(), spec, func(runtime.Stage) {}) // it may have been quicker
			})
		})
		t.Run("delete "+strconv.Itoa(i), func(t *testing.T) { // a host anew starts the plugin without a pause
			_, driver := host(t, plugin, config)
			must.NoError(t, driver.Delete(t.Context(), spec.SessionID))
			for sandbox, err := range driver.List(t.Context()) {
				must.NoError(t, err)
				must.NotEq(t, spec.SessionID, sandbox.SessionID)
			}
			must.SliceEmpty(t, processesOf(t, spec.SessionID))
		})
	}
}

// killDuring kills the plugin's process some time after call has begun.
func killDuring(t *testing.T, h *pluginhost.Host, after time.Duration, call func()) {
	pid := h.Status()[0].PID
	var killing sync.WaitGroup
	killing.Go(func() {
		ctx, cancel := context.WithTimeout(t.Context(), after%(150*time.Millisecond))
		defer cancel()
		<-ctx.Done()
		_ = syscall.Kill(pid, syscall.SIGKILL)
	})
	call()
	killing.Wait()
}

// processesOf finds the processes that bear a session ID in their environment.
// TODO: bwrap bears it in its arguments and is not counted yet. It is left
// behind where the plugin is killed before it has recorded its process.
func processesOf(t *testing.T, sessionID string) []string {
	environs, err := filepath.Glob("/proc/[0-9]*/environ")
	must.NoError(t, err)
	var found []string
	for _, path := range environs {
		environ, err := os.ReadFile(path)
		if err == nil && bytes.Contains(environ, []byte(sessionID)) {
			found = append(found, path)
		}
	}
	return found
}
