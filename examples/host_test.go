package examples_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/runtime"
)

// process is a plugin that runs in a host of its own.
type process struct {
	plugin   pluginhost.Plugin
	instance string
	host     *pluginhost.Host
	driver   runtime.Driver
	end      func() // the host, and with it the plugin; not its sandboxes
}

// start runs a plugin until the test ends, or until it is ended.
func start(t *testing.T, plugin pluginhost.Plugin, instance string) *process {
	t.Helper()
	p := &process{plugin: plugin, instance: instance}
	must.NoError(t, p.start(t.Context(), hclog.New(&hclog.LoggerOptions{Output: t.Output(), Level: hclog.Info})))
	t.Cleanup(func() { p.end() }) // the one that runs then
	return p
}

func (p *process) start(ctx context.Context, logger hclog.Logger) error {
	host, err := pluginhost.New(pluginhost.Config{Plugins: []pluginhost.Plugin{p.plugin}, Instance: p.instance, Logger: logger})
	if err != nil {
		return err
	}
	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		host.Run(running)
	}()
	p.host, p.driver = host, host.Drivers()[p.plugin.Name]
	p.end = func() {
		cancel()
		<-done
	}
	return host.AwaitStart(ctx)
}

func (p *process) kill() error {
	pid := p.host.Status()[0].PID
	if pid == 0 {
		return errors.New("the plugin is not up")
	}
	return syscall.Kill(pid, syscall.SIGKILL)
}

// crash kills the plugin and starts it in a host anew, which does not pause
// before that as the old one would.
func (p *process) crash(ctx context.Context, _ runtime.Driver) (runtime.Driver, error) {
	if err := p.kill(); err != nil {
		return nil, err
	}
	p.end()
	err := p.start(ctx, hclog.NewNullLogger())
	return p.driver, err
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
