package command

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/bivouac/bivouac/internal/test/processplugin"
	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/runtime/plugin"
)

// The test binary is also the program that the scripts run.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"bivouac": func() { os.Exit(Main()) },
		// Plugins as somebody else would write them.
		"mine":   servePlugin,
		"other":  servePlugin,
		"sloppy": func() { plugin.Serve(sloppy{new(processplugin.Plugin)}) },
	})
}

func servePlugin() { plugin.Serve(new(processplugin.Plugin)) }

// sloppy does not stop what it is asked to stop.
type sloppy struct{ *processplugin.Plugin }

func (sloppy) Stop(context.Context, string) error { return nil }

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			port, err := stack.FreePort(0)
			if err != nil {
				return err
			}
			addr := fmt.Sprintf("127.0.0.1:%d", port)
			env.Setenv("HOME", env.WorkDir)
			env.Setenv("XDG_CACHE_HOME", env.WorkDir+"/cache")
			env.Setenv("ADDR", addr)
			env.Setenv("BIVOUAC_ADDR", "http://"+addr)
			env.Setenv("GORACE", "atexit_sleep_ms=0") // else each command takes a second to end under -race
			if path, err := exec.LookPath("bivouac"); err == nil {
				env.Setenv("BIVOUAC", path)
			}
			if path, err := exec.LookPath("mine"); err == nil { // beside bivouac, where testscript puts both
				env.Setenv("PLUGINS", filepath.Dir(path))
			}
			env.Setenv("CHAT", uuid.NewString())
			env.Setenv("CHAT2", uuid.NewString())
			return os.Mkdir(env.WorkDir+"/volume", 0o700)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":   exits,
			"healthy": healthy,
			"await":   await,
			"silent":  silent,
		},
	})
}

// patience is how long a script waits for something that has to happen.
const patience = 30 * time.Second

// until tries again until it succeeds.
func until(ts *testscript.TestScript, try func(context.Context) error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		err := try(ctx)
		if err == nil {
			return
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			ts.Fatalf("%v", err)
		}
	}
}

// silent FILE waits until nobody listens any more at the address in the file.
func silent(ts *testscript.TestScript, _ bool, args []string) {
	addr := strings.TrimSpace(ts.ReadFile(args[0]))
	until(ts, func(ctx context.Context) error {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
		if err != nil {
			return nil //nolint:nilerr // that nobody answers is what is waited for
		}
		return errors.Join(fmt.Errorf("%s still answers", addr), conn.Close())
	})
}

// exits CODE COMMAND… runs a command that has to exit with the code.
func exits(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok {
			ts.Fatalf("%v", err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exited with %d, not %d", got, want)
	}
}

// healthy waits until the agent says that it can serve.
func healthy(ts *testscript.TestScript, _ bool, _ []string) {
	until(ts, func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, ts.Getenv("BIVOUAC_ADDR")+"/v1/agent/health", nil)
		if err != nil {
			return err
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			return err
		}
		if response.StatusCode != http.StatusOK {
			err = errors.New(response.Status)
		}
		return errors.Join(err, response.Body.Close())
	})
}

// await FILE REGEXP waits until the file has a match.
func await(ts *testscript.TestScript, _ bool, args []string) {
	want := regexp.MustCompile(`(?m)` + args[1])
	until(ts, func(context.Context) error {
		text, err := os.ReadFile(ts.MkAbs(args[0]))
		if err == nil && !want.Match(text) {
			err = fmt.Errorf("%s has no match of %s:\n%s", args[0], args[1], text)
		}
		return err
	})
}
