package examples_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/pluginhost"
)

// start runs a plugin until the test ends, or until it is ended.
func start(t *testing.T, plugin pluginhost.Plugin, instance string) *pluginhost.Running {
	t.Helper()
	logger := hclog.New(&hclog.LoggerOptions{Output: t.Output(), Level: hclog.Info})
	p, err := pluginhost.Start(t.Context(), pluginhost.Config{Instance: instance, Logger: logger}, plugin)
	must.NoError(t, err)
	t.Cleanup(p.End)
	return p
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
