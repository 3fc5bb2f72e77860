// Package examples_test holds each example plugin to the contract, as it is
// built from its own folder and run by a host.
package examples_test

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/conformance"
	"github.com/bivouac/bivouac/runtime/plugin"
)

func TestMain(m *testing.M) { os.Exit(stack.Main(m)) }

// example is a plugin, and what a test can see and do behind its back.
type example struct {
	plugin pluginhost.Plugin
	kill   func(context.Context, runtime.Sandbox) error
	// left names all that there is of a session, but for marks that it was
	// ended, and runs what of that is a sandbox of its own.
	left func(ctx context.Context, sessionID string) ([]string, error)
	runs func(ctx context.Context, sessionID string) ([]string, error)
	// marks names the marks of used session IDs.
	marks func(t *testing.T, bivouac string) []string
}

// The Bivouacs that the tests are.
const instance, otherInstance = "examples", "examples-other"

func TestPluginDocker(t *testing.T) {
	t.Parallel()
	e := docker(t)
	t.Run("conforms", e.conforms)
	t.Run("claims spares", e.claimsSpares)
	t.Run("refuses volumes", e.refusesVolumes)
	t.Run("is killed in claims", e.isKilledInClaims)
	t.Run("makes no spares that it cannot bind", e.makesNoSparesThatItCannotBind)
	t.Run("is killed in creates", e.isKilledInCreates)
	t.Run("is hung in a create", e.isHungInACreate)
	t.Run("drops its marks", e.dropsItsMarks)
}

func TestPluginPython(t *testing.T) {
	t.Parallel()
	needs(t, "/usr/bin/python3", "-c", "import grpc, cryptography")
	program, err := filepath.Abs("plugin-python/plugin.py")
	must.NoError(t, err)
	bivouac := buildBivouac(t)
	config := map[string]any{"command": []string{bivouac, "demo-sandbox"}}
	e := ofProcesses(t, pluginhost.Plugin{Name: "python", Path: program}, bivouac, config)
	t.Run("conforms", e.conforms)
	t.Run("is killed in creates", e.isKilledInCreates)
	t.Run("is hung in a create", e.isHungInACreate)
	t.Run("drops its marks", e.dropsItsMarks)
	t.Run("refuses an open folder", e.refusesAnOpenFolder)
}

// dropsItsMarks: given marks of used session IDs, they stay while a plugin runs
// that is told nothing, and none is left once one was told to drop them.
func (e example) dropsItsMarks(t *testing.T) {
	for _, bivouac := range []string{instance, otherInstance} {
		p := start(t, e.plugin, bivouac)
		must.NoError(t, p.Driver.Delete(t.Context(), newSpec("").SessionID))
		listAll(t, p.Driver)
		must.SliceNotEmpty(t, e.marks(t, bivouac))
		p.End()

		told := e.plugin
		told.Env = map[string]string{plugin.DropMarksKey: "1"}
		listAll(t, start(t, told, bivouac).Driver)
		must.SliceEmpty(t, e.marks(t, bivouac))
	}
}

func listAll(t *testing.T, driver runtime.Driver) {
	t.Helper()
	for _, err := range driver.List(t.Context()) {
		must.NoError(t, err)
	}
}

// refusesAnOpenFolder: records that anybody can write are not relied on.
func (e example) refusesAnOpenFolder(t *testing.T) {
	var config map[string]any
	must.NoError(t, json.Unmarshal(e.plugin.Config, &config))
	open := t.TempDir()
	must.NoError(t, os.Chmod(open, 0o777))
	config["state_dir"] = open
	e.plugin.Config = object(t, config)
	_, err := pluginhost.Start(t.Context(), pluginhost.Config{Instance: instance, Logger: hclog.NewNullLogger()}, e.plugin)
	must.ErrorContains(t, err, "must be a directory that only this user can write to")
}

// needs skips a test if a command fails that shows what the plugin needs. In CI
// all of it has to be there. In short mode the test is skipped.
func needs(t *testing.T, name string, args ...string) {
	t.Helper()
	stack.NeedServers(t)
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil && os.Getenv("CI") == "" {
		t.Skipf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

func (e example) conforms(t *testing.T) {
	own, foreign := start(t, e.plugin, instance), start(t, e.plugin, otherInstance)
	restart := func(ctx context.Context, _ runtime.Driver) (runtime.Driver, error) {
		err := own.Restart(ctx)
		return own.Driver, err
	}
	conformance.Run(t, conformance.Harness{
		Open:      func(context.Context) (runtime.Driver, error) { return own.Driver, nil },
		Foreign:   func(context.Context) (runtime.Driver, error) { return foreign.Driver, nil },
		Reopen:    restart,
		Crash:     restart,
		Kill:      e.kill,
		Leftovers: e.left,
		Demo:      true,
	})
}

// docker is the example whose sandboxes are containers.
func docker(t *testing.T) example {
	image := stack.DockerForTest(t)
	containers := func(ctx context.Context, sessionID string) ([]string, error) {
		out, err := exec.CommandContext(ctx, "docker", "ps", "--all", "--quiet", "--filter=label=bivouac.session_id="+sessionID).Output()
		return strings.Fields(string(out)), err
	}
	return example{
		plugin: pluginhost.Plugin{
			Name: "docker", Path: build(t, "plugin-docker"),
			Config: object(t, map[string]any{"image": image, "ready_path": "/healthz", "memory_mib": 64}),
		},
		kill: func(ctx context.Context, sandbox runtime.Sandbox) error {
			return exec.CommandContext(ctx, "docker", "kill", sandbox.ContainerID).Run()
		},
		left: containers,
		runs: containers,
		marks: func(t *testing.T, bivouac string) []string {
			t.Helper()
			return strings.Fields(output(t, "docker", "volume", "ls", "--quiet", "--filter=label=bivouac.instance="+bivouac))
		},
	}
}

// ofProcesses is an example whose sandboxes are processes of this machine, which
// run a program.
func ofProcesses(t *testing.T, plugin pluginhost.Plugin, program string, config map[string]any) example {
	state := t.TempDir()
	config["ready_path"], config["state_dir"] = "/healthz", state
	plugin.Config = object(t, config)
	return example{
		plugin: plugin,
		kill: func(_ context.Context, sandbox runtime.Sandbox) error {
			digits, _, _ := strings.Cut(sandbox.ContainerID, "-")
			pid, err := strconv.Atoi(digits)
			if err != nil {
				return err
			}
			return syscall.Kill(pid, syscall.SIGKILL)
		},
		left: func(_ context.Context, sessionID string) ([]string, error) {
			left := processesOf(sessionID, "")
			files, err := filepath.Glob(filepath.Join(state, "*", sessionID+".*"))
			for _, file := range files {
				if mark := filepath.Ext(file); mark != ".json" && mark != ".lock" {
					left = append(left, file)
				}
			}
			return left, err
		},
		runs: func(_ context.Context, sessionID string) ([]string, error) {
			return processesOf(sessionID, program), nil
		},
		marks: func(t *testing.T, bivouac string) []string {
			t.Helper()
			files, err := filepath.Glob(filepath.Join(state, bivouac, "*"))
			must.NoError(t, err)
			return files
		},
	}
}

func buildBivouac(t *testing.T) string {
	t.Helper()
	bivouac := filepath.Join(t.TempDir(), "bivouac")
	must.NoError(t, stack.BuildBivouac(t.Context(), bivouac))
	return bivouac
}

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

func object(t *testing.T, value any) json.RawMessage {
	t.Helper()
	text, err := json.Marshal(value)
	must.NoError(t, err)
	return text
}
