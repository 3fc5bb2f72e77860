// Package exectest is a suite of tests for drivers that run commands in sandboxes. [Run]
// runs it against real sandboxes. It looks at this machine's processes, so the sandboxes must
// run here.
//
// The package does not know which driver it tests.
package exectest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/runtime"
)

// Patience is how long the tests wait for what should happen soon.
const Patience = time.Minute

// Harness is a driver and a sandbox of it.
type Harness struct {
	Driver interface {
		runtime.Driver
		runtime.Execer
	}
	SessionID string
	HomeDir   string // the folder in which commands begin; empty: not known
	MostExecs int    // commands that the driver runs at a time; 0: any number
	Output    int    // how much output a command has whose reader is slow, in MiB
	// NewSandbox makes another sandbox and returns its session ID.
	NewSandbox func(t *testing.T) string
}

// Run tests that the driver keeps the promises of [runtime.Execer].
func Run(t *testing.T, h Harness) {
	t.Run("returns_the_exit_code_and_separate_outputs", h.outputs)
	t.Run("passes_a_megabyte_of_input_through", h.echo)
	t.Run("ends_although_its_input_is_open", h.openInput)
	t.Run("sets_the_environment_and_the_folder", h.surroundings)
	t.Run("runs_on_a_terminal_that_can_be_resized", h.terminal)
	t.Run("refuses_what_cannot_run", h.refusals)
	t.Run("kills_the_command_and_its_children_when_the_caller_goes", h.callerGoes)
	t.Run("leaves_background_children_of_a_command_that_ended", h.background)
	t.Run("holds_back_a_command_whose_output_is_not_read", h.slowReader)
	t.Run("limits_the_commands_that_run_at_a_time", h.limit)
	t.Run("ends_with_the_sandbox", h.sandboxEnds)
}

// Result is what a command did.
type Result struct {
	Code           int
	Stdout, Stderr string
	Err            error
}

func (h Harness) run(ctx context.Context, command runtime.Command, stdin io.Reader) Result {
	var stdout, stderr bytes.Buffer
	code, err := h.Driver.Exec(ctx, h.SessionID, command, runtime.Streams{Stdin: stdin, Stdout: &stdout, Stderr: &stderr})
	return Result{code, stdout.String(), stderr.String(), err}
}

func script(text string, args ...string) runtime.Command {
	return runtime.Command{Args: append([]string{"sh", "-c", text, "sh"}, args...)}
}

func patiently(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	t.Cleanup(cancel)
	return ctx
}

func (h Harness) outputs(t *testing.T) {
	for _, tc := range []struct {
		script string
		want   Result
	}{
		{"true", Result{}},
		{"echo out; echo err >&2; exit 3", Result{Code: 3, Stdout: "out\n", Stderr: "err\n"}},
		{"printf 'no newline'", Result{Stdout: "no newline"}},
		{`printf '\377\000'`, Result{Stdout: "\xff\x00"}},
		{"kill -9 $$", Result{Code: 137}},
		{"exit 127", Result{Code: 127}},
	} {
		t.Run(tc.script, func(t *testing.T) {
			must.Eq(t, tc.want, h.run(patiently(t), script(tc.script), nil))
		})
	}
}

func (h Harness) echo(t *testing.T) {
	sent := strings.Repeat(strings.Repeat("x", 99)+"\n", 10_486)
	got := h.run(patiently(t), runtime.Command{Args: []string{"cat"}}, strings.NewReader(sent))
	must.NoError(t, got.Err)
	must.Eq(t, len(sent), len(got.Stdout))
	must.True(t, sent == got.Stdout)
}

func (h Harness) openInput(t *testing.T) {
	stdin, w := io.Pipe()
	t.Cleanup(func() { must.NoError(t, w.Close()) })
	must.Eq(t, Result{Code: 4, Stdout: "hello\n"}, h.run(patiently(t), script("echo hello; exit 4"), stdin))
}

func (h Harness) surroundings(t *testing.T) {
	command := script(`echo "$A-$B-$BIVOUAC_SESSION_ID"; pwd`)
	command.Env = map[string]string{"A": "a b", "B": `"'$x`}
	command.Dir = "/proc"
	must.Eq(t, Result{Stdout: "a b-\"'$x-" + h.SessionID + "\n/proc\n"}, h.run(patiently(t), command, nil))

	// The variables are those of the command alone, and not of what starts it.
	command = runtime.Command{Args: []string{"/bin/sh", "-c", `echo "$PATH $go $wait"`}}
	command.Env = map[string]string{"PATH": "/nowhere", "go": "a", "wait": "b"}
	must.Eq(t, Result{Stdout: "/nowhere a b\n"}, h.run(patiently(t), command, nil))

	// A name with an equals sign is no variable.
	got := h.run(patiently(t), script(`f="$BIVOUAC_WORKSPACE/a=b"; printf '#!/bin/sh\necho "ran $1"\n' >"$f"; chmod +x "$f"; echo "$f"`), nil)
	must.NoError(t, got.Err)
	must.Eq(t, Result{Stdout: "ran x\n"}, h.run(patiently(t), runtime.Command{Args: []string{strings.TrimSpace(got.Stdout), "x"}}, nil))

	// Whatever a driver adds, the whole environment can be printed in one line.
	got = h.run(patiently(t), script(`echo $(env) end`), nil)
	must.NoError(t, got.Err)
	must.StrHasSuffix(t, " end\n", got.Stdout)
	must.StrContains(t, got.Stdout, "BIVOUAC_SESSION_ID="+h.SessionID)

	if h.HomeDir != "" {
		must.Eq(t, Result{Stdout: h.HomeDir + "\n"}, h.run(patiently(t), script("pwd"), nil))
	}
}

func (h Harness) terminal(t *testing.T) {
	command := script(`stty size; read -r go; until [ "$(stty size)" = "44 102" ]; do sleep 0.1; done; stty size; exit 5`)
	command.TTY, command.Size = true, runtime.WindowSize{Rows: 33, Columns: 101}
	stdin, w := io.Pipe()
	out := newOutput()
	resize := make(chan runtime.WindowSize)
	done := make(chan Result, 1)
	ctx := patiently(t)
	go func() {
		code, err := h.Driver.Exec(ctx, h.SessionID, command, runtime.Streams{Stdin: stdin, Stdout: out, Stderr: out, Resize: resize})
		done <- Result{Code: code, Err: err}
	}()
	out.await(t, "33 101\r\n")
	resize <- runtime.WindowSize{Rows: 44, Columns: 102}
	_, err := w.Write([]byte("go\n"))
	must.NoError(t, err)
	out.await(t, "44 102\r\n")
	must.Eq(t, Result{Code: 5}, <-done)
	must.NoError(t, w.Close())
}

func (h Harness) refusals(t *testing.T) {
	for name, tc := range map[string]struct {
		sessionID string
		command   runtime.Command
		want      error
	}{
		"no such program":             {h.SessionID, runtime.Command{Args: []string{"no-such-program"}}, runtime.ErrInvalid},
		"no such file":                {h.SessionID, runtime.Command{Args: []string{"/no/such/file"}}, runtime.ErrInvalid},
		"no such folder":              {h.SessionID, runtime.Command{Args: []string{"sh"}, Dir: "/no/such/folder"}, runtime.ErrInvalid},
		"relative folder":             {h.SessionID, runtime.Command{Args: []string{"sh"}, Dir: "tmp"}, runtime.ErrInvalid},
		"no such task":                {h.SessionID, runtime.Command{Args: []string{"sh"}, Task: "no-such-task"}, runtime.ErrInvalid},
		"a user":                      {h.SessionID, runtime.Command{Args: []string{"sh"}, User: "nobody"}, runtime.ErrInvalid},
		"a bad variable":              {h.SessionID, runtime.Command{Args: []string{"sh"}, Env: map[string]string{"A B": ""}}, runtime.ErrInvalid},
		"no command":                  {h.SessionID, runtime.Command{}, runtime.ErrInvalid},
		"a folder with a line break":  {h.SessionID, runtime.Command{Args: []string{"sh"}, Dir: "/no\nsuch\\cfolder"}, runtime.ErrInvalid},
		"a program with a line break": {h.SessionID, runtime.Command{Args: []string{"no\nsuch\\cprogram"}}, runtime.ErrInvalid},
		"no such sandbox":             {"7d3f2a54-5b0e-4a55-8d2c-3f1f9b6f2c01", runtime.Command{Args: []string{"sh"}}, runtime.ErrNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := h.Driver.Exec(patiently(t), tc.sessionID, tc.command, runtime.Streams{Stdout: io.Discard, Stderr: io.Discard})
			must.ErrorIs(t, err, tc.want)
			t.Log(err)
		})
	}
}

// Family is the script of a command with children of each kind. Its argument is what
// [AwaitRunning] and [AwaitGone] look for.
const Family = `trap "" TERM HUP INT
(trap "" TERM HUP INT; sleep "$1") &
sh -c 'sleep "$1"; true' sh "$1" &
echo started
sleep "$1"`

// NewMarker returns an argument for sleep that no other process has.
func NewMarker() string { return strconv.Itoa(1_000_000 + rand.N(1_000_000_000)) }

func (h Harness) callerGoes(t *testing.T) {
	ctx, cancel := context.WithCancel(patiently(t))
	marker := NewMarker()
	out := newOutput()
	done := make(chan Result, 1)
	command := script(Family, marker)
	command.Env = map[string]string{"BIVOUAC_EXEC": "a variable of this name marks what is to be killed"}
	go func() {
		code, err := h.Driver.Exec(ctx, h.SessionID, command, runtime.Streams{Stdout: out, Stderr: out})
		t.Log("exec: ", code, err)
		done <- Result{Code: code, Err: err}
	}()
	out.await(t, "started\n")
	AwaitRunning(t, marker, 3)
	began := time.Now()
	cancel()
	must.ErrorIs(t, (<-done).Err, context.Canceled)
	t.Logf("returned after %s", time.Since(began))
	AwaitGone(t, marker)
	t.Logf("killed after %s", time.Since(began))
}

func (h Harness) background(t *testing.T) {
	marker := NewMarker()
	got := h.run(patiently(t), script(`sleep "$1" </dev/null >/dev/null 2>&1 & exit 6`, marker), nil)
	must.Eq(t, Result{Code: 6}, got)
	AwaitRunning(t, marker, 1)

	// One that holds the output open does not keep Exec waiting.
	marker = NewMarker()
	long := strings.Repeat("x", 60_000)
	got = h.run(patiently(t), script(`sleep "$1" & echo "$2"; exit 6`, marker, long), nil)
	must.True(t, got == Result{Code: 6, Stdout: long + "\n"}, must.Sprint(got.Code, len(got.Stdout), got.Err))
	AwaitRunning(t, marker, 1)
}

// slowReader runs a command that writes much to a reader that stops after the first bytes,
// until the command waits.
func (h Harness) slowReader(t *testing.T) {
	lines, most := h.Output<<20/(64<<10), h.Output<<20/2
	marker := NewMarker()
	first, goOn := make(chan struct{}), make(chan struct{})
	total := 0
	reader := writerFunc(func(p []byte) (int, error) {
		if total == 0 {
			close(first)
			<-goOn
		}
		total += len(p)
		return len(p), nil
	})
	done := make(chan Result, 1)
	ctx := patiently(t)
	go func() {
		code, err := h.Driver.Exec(ctx, h.SessionID, script(`i=0; while [ $i -lt `+strconv.Itoa(lines)+` ]; do echo "$1$1$1$1$1$1$1$1"; i=$((i+1)); done`,
			strings.Repeat("x", 8<<10), marker), runtime.Streams{Stdout: reader, Stderr: io.Discard})
		done <- Result{Code: code, Err: err}
	}()
	<-first
	written, before := 0, -1
	must.Wait(t, wait.InitialSuccess(wait.Timeout(Patience), wait.Gap(200*time.Millisecond), wait.BoolFunc(func() bool {
		written, before = writtenBy(t, marker), written
		return written == before
	})))
	t.Logf("the command waits after %d bytes", written)
	must.Less(t, most, written)
	close(goOn)
	must.Eq(t, Result{}, <-done)
	must.Eq(t, lines*(64<<10+1), total)
}

// writtenBy returns how many bytes the shells with the marker have written.
func writtenBy(t *testing.T, marker string) int {
	t.Helper()
	sum := 0
	for _, pid := range withArgument("sh", marker) {
		text, err := os.ReadFile(filepath.Join("/proc", pid, "io"))
		must.NoError(t, err)
		_, rest, _ := strings.Cut(string(text), "wchar: ")
		number, _, _ := strings.Cut(rest, "\n")
		n, err := strconv.Atoi(number)
		must.NoError(t, err)
		sum += n
	}
	return sum
}

func (h Harness) limit(t *testing.T) {
	if h.MostExecs == 0 {
		return // this driver has no limit
	}
	ctx, cancel := context.WithCancel(patiently(t))
	var running sync.WaitGroup
	out := newOutput()
	// One after the other: on a busy machine a command has only so much time to begin.
	for range h.MostExecs {
		running.Go(func() {
			_, err := h.Driver.Exec(ctx, h.SessionID, script("echo started; cat"), runtime.Streams{Stdin: endless{ctx}, Stdout: out, Stderr: out})
			if ctx.Err() == nil {
				t.Errorf("exec: %v", err)
			}
		})
		out.await(t, "started\n")
	}
	must.ErrorIs(t, h.run(ctx, script("true"), nil).Err, runtime.ErrBusy)
	cancel()
	running.Wait()
	must.Eq(t, Result{Stdout: "again\n"}, h.run(patiently(t), script("echo again"), nil))
}

// endless is an input that ends with its context.
type endless struct{ context.Context }

func (e endless) Read([]byte) (int, error) {
	<-e.Done()
	return 0, io.EOF
}

func (h Harness) sandboxEnds(t *testing.T) {
	h.SessionID = h.NewSandbox(t)
	marker := NewMarker()
	out := newOutput()
	done := make(chan Result, 1)
	ctx := patiently(t)
	go func() {
		code, err := h.Driver.Exec(ctx, h.SessionID, script(Family, marker), runtime.Streams{Stdout: out, Stderr: out})
		t.Log("exec: ", code, err)
		done <- Result{Code: code, Err: err}
	}()
	out.await(t, "started\n")
	must.NoError(t, h.Driver.Delete(ctx, h.SessionID))
	got := <-done
	t.Logf("%+v", got)
	if got.Err != nil {
		must.ErrorIs(t, got.Err, runtime.ErrNotFound)
	} else {
		must.Eq(t, 137, got.Code)
	}
	AwaitGone(t, marker)
}

// writerFunc is an io.Writer.
type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// output is what a command has written.
type output struct {
	mu   sync.Mutex
	text string
}

func newOutput() *output { return &output{} }

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.text += string(p)
	return len(p), nil
}

// await waits for text, and takes it and all before it.
func (o *output) await(t *testing.T, text string) {
	t.Helper()
	must.Wait(t, wait.InitialSuccess(wait.Timeout(Patience), wait.Gap(5*time.Millisecond), wait.BoolFunc(func() bool {
		o.mu.Lock()
		defer o.mu.Unlock()
		_, rest, ok := strings.Cut(o.text, text)
		if ok {
			o.text = rest
		}
		return ok
	})), must.Func(func() string {
		o.mu.Lock()
		defer o.mu.Unlock()
		return fmt.Sprintf("there is no %q in %q", text, o.text)
	}))
}

// AwaitRunning waits until this many processes with the marker among their arguments run.
func AwaitRunning(t *testing.T, marker string, many int) {
	t.Helper()
	must.Wait(t, wait.InitialSuccess(wait.Timeout(Patience), wait.Gap(5*time.Millisecond), wait.BoolFunc(func() bool {
		return len(withArgument("sleep", marker)) == many
	})), must.Sprintf("%q", marker))
}

// AwaitGone waits until no process with the marker among its arguments runs.
func AwaitGone(t *testing.T, marker string) {
	t.Helper()
	must.Wait(t, wait.InitialSuccess(wait.Timeout(Patience), wait.Gap(5*time.Millisecond), wait.BoolFunc(func() bool {
		return len(withArgument("", marker)) == 0
	})), must.Sprintf("%q", marker))
}

// withArgument returns the PIDs of processes of a program, or of all programs if it is
// empty, that have an argument.
func withArgument(program, argument string) []string {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline") // the pattern is well-formed
	var found []string
	for _, file := range files {
		text, _ := os.ReadFile(file) // it may have ended
		args := strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
		if filepath.Base(args[0]) != program && program != "" {
			continue
		}
		for _, arg := range args[1:] {
			if arg == argument {
				found = append(found, filepath.Base(filepath.Dir(file)))
			}
		}
	}
	return found
}
