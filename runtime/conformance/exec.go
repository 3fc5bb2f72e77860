package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

func requirementsOfExec() []requirement {
	return []requirement{
		{"runs a command", "Exec returns the exit code, or 128 plus the signal, and keeps output and errors apart", needsDemoToRun, runsACommand},
		{"passes input to a command", "Exec passes all of the input and then its end, and an empty one if there is none", needsDemoToRun, passesInput},
		{"runs a command in its environment", "Env is added to the sandbox's environment, and Dir is the working directory", needsDemoToRun, runsInEnvironment},
		{"runs a command on a terminal", "with TTY the terminal has the size given, and then the sizes from Resize, and all output is on Stdout", needsDemoToRun, runsOnATerminal},
		{"runs many commands at a time", "concurrent Execs do not wait for each other or mix up their output", needsDemoToRun, runsManyCommands},
		{"refuses a command that cannot run", "Exec returns ErrInvalid if there is no such file, and ErrNotFound if no such sandbox runs", needsDemoToRun, refusesCommands},
		{"kills a command whose caller is gone", "Exec returns within a second after its context ended, and the command and its children are killed", needsDemoToRun, killsTheAbandoned},
		{"kills a command when it dies", "kill -9 of the driver kills the command and its children", needsDemoAndCrash, killsWhenItDies},
		{"leaves what a command left behind", "what a command left in the background continues after it", needsDemoToRun, leavesTheBackground},
		{"ends what a command left behind with the sandbox", "a Stop ends what commands left in the background", needsConfinement, endsTheBackground},
	}
}

const errNoExec = notApplicableError("the driver has no Exec, which it need not have")

// guest is a running demo sandbox in which commands are run.
type guest struct {
	*fixture
	spec    runtime.Spec
	sandbox runtime.Sandbox
	program []string // runs the demo in the sandbox
}

// guest creates a sandbox. The check does not apply if the driver can run nothing in it,
// for example because it needs a shell.
func (f *fixture) guest() guest {
	f.needsExec()
	spec := f.spec()
	return f.guestIn(spec, f.create(spec))
}

func (f *fixture) needsExec() {
	if _, ok := f.driver.(runtime.Execer); !ok {
		f.fail(errNoExec)
	}
}

// guestIn returns a running sandbox as a guest.
func (f *fixture) guestIn(spec runtime.Spec, sandbox runtime.Sandbox) guest {
	g := guest{fixture: f, spec: spec, sandbox: sandbox}
	var told struct {
		Command []string `json:"command"`
	}
	f.noError(json.Unmarshal(f.ask(spec, g.sandbox, "/"), &told), "what the sandbox tells of itself")
	f.require(len(told.Command) > 0, "the sandbox does not tell with which command its program can be run in it")
	g.program = told.Command
	_, err := g.exec(f.patience(), g.command("exit=0"), runtime.Streams{Stdout: io.Discard, Stderr: io.Discard})
	if errors.Is(err, runtime.ErrInvalid) {
		f.fail(notApplicableError("the driver runs no commands in these sandboxes, which it need not do: " + err.Error()))
	}
	f.noError(err, "Exec")
	return g
}

// command returns a command that does something; see the package comment.
func (g guest) command(actions string) runtime.Command {
	return runtime.Command{Args: append(slices.Clip(g.program), "-do="+actions)}
}

// exec calls Exec.
func (g guest) exec(ctx context.Context, command runtime.Command, streams runtime.Streams) (int, error) {
	return g.execOn(ctx, g.driver, command, streams)
}

// execOn calls Exec of a driver. It may be called from any goroutine, while the check
// replaces its driver.
func (g guest) execOn(ctx context.Context, driver runtime.Driver, command runtime.Command, streams runtime.Streams) (int, error) {
	code, err := driver.(runtime.Execer).Exec(ctx, g.spec.SessionID, command, streams)
	if errors.Is(err, errors.ErrUnsupported) {
		return 0, errNoExec
	}
	return code, err
}

// result is what came of a command.
type result struct {
	code           int
	stdout, stderr string
}

// run runs a command to its end.
func (g guest) run(command runtime.Command, stdin io.Reader) result {
	var stdout, stderr bytes.Buffer
	code, err := g.exec(g.patience(), command, runtime.Streams{Stdin: stdin, Stdout: &stdout, Stderr: &stderr})
	g.noError(err, "Exec")
	return result{code, stdout.String(), stderr.String()}
}

// file makes a file of the volume that a command can lock. Its lock shows that it runs.
func (g guest) file(name string) string {
	path := filepath.Join(g.spec.VolumeHostPath, name)
	g.noError(os.WriteFile(path, nil, 0o644), "make a file to lock")
	return path
}

// isKilled waits until a file is no longer locked.
func (g guest) isKilled(what, path string) {
	g.eventually(g.soon(), what+" to be killed: it has "+path+" locked", func() bool { return !g.isLocked(path) })
}

func runsACommand(f *fixture) {
	g := f.guest()
	for actions, want := range map[string]result{
		"out=a err=b out=c exit=3": {3, "a\nc\n", "b\n"},
		"exit=0":                   {0, "", ""},
		"exit=255":                 {255, "", ""},
		"out=killed kill":          {137, "killed\n", ""},
	} {
		same(f, want, g.run(g.command(actions), nil), "what came of a command that does "+actions)
	}
	f.runs(g.spec, g.sandbox)
}

func passesInput(f *fixture) {
	g := f.guest()
	same(f, result{stdout: "end\n"}, g.run(g.command("copy out=end"), nil), "what a command made of no input")
	same(f, result{stdout: "end\n"}, g.run(g.command("copy out=end"), strings.NewReader("")), "what a command made of an empty input")
	input := strings.Repeat("0123456789abcde\n", 64<<10) // 1 MiB
	copied := g.run(g.command("copy"), strings.NewReader(input))
	f.require(copied == result{stdout: input}, "a command that copies %d bytes copied %d, and ended with the exit code %d: %s",
		len(input), len(copied.stdout), copied.code, copied.stderr)
}

func runsInEnvironment(f *fixture) {
	g := f.guest()
	command := g.command("env=CONFORMANCE env=BIVOUAC_SESSION_ID")
	command.Env = map[string]string{"CONFORMANCE": `two words, $HOME and "quotes"`}
	same(f, result{stdout: command.Env["CONFORMANCE"] + "\n" + g.spec.SessionID + "\n"}, g.run(command, nil), "the environment of a command")
	command = g.command("dir")
	command.Dir = "/"
	same(f, result{stdout: "/\n"}, g.run(command, nil), "the working directory of a command")
}

// runsOnATerminal does not apply to drivers that refuse TTY.
func runsOnATerminal(f *fixture) {
	g := f.guest()
	command := g.command("size=40x120 out=small err=errors size=50x200 out=large copy exit=4")
	command.TTY, command.Size = true, runtime.WindowSize{Rows: 40, Columns: 120}
	resize := make(chan runtime.WindowSize, 1)
	output := &watched{word: "small", seen: func() { resize <- runtime.WindowSize{Rows: 50, Columns: 200} }}
	const endOfInput = "\x04" // as a person types it
	open, hangUp := io.Pipe()
	defer hangUp.Close()
	code, err := g.exec(f.patience(), command, runtime.Streams{
		Stdin: io.MultiReader(strings.NewReader("typed\n"+endOfInput), open), Stdout: output, Stderr: io.Discard, Resize: resize,
	})
	if errors.Is(err, runtime.ErrInvalid) {
		f.fail(notApplicableError("the driver has no terminals, which it need not have: " + err.Error()))
	}
	f.noError(err, "Exec on a terminal")
	same(f, 4, code, "the exit code of a command on a terminal")
	for _, word := range []string{"small", "errors", "large", "typed"} {
		f.require(strings.Contains(output.text.String(), word), "a terminal shows %q, and not %q", output.text.String(), word)
	}
}

// watched is a writer that calls seen when it has got a word.
type watched struct {
	text bytes.Buffer
	word string
	seen func()
}

func (w *watched) Write(data []byte) (int, error) {
	had := strings.Contains(w.text.String(), w.word)
	w.text.Write(data)
	if !had && strings.Contains(w.text.String(), w.word) {
		w.seen()
	}
	return len(data), nil
}

// runsManyCommands ends the input of a command only when all have begun.
func runsManyCommands(f *fixture) {
	const many = 8
	g := f.guest()
	ctx := f.patience()
	var all, begun sync.WaitGroup
	results, errs := make([]result, many), make([]error, many)
	begun.Add(many)
	for i := range many {
		all.Go(func() {
			stdin, end := io.Pipe()
			defer stdin.Close()
			word := fmt.Sprintf("command-%d", i)
			begin := sync.OnceFunc(begun.Done)
			defer begin()
			stdout := &watched{word: word, seen: func() {
				go func() {
					begin()
					begun.Wait()
					_ = end.Close() // it never fails
				}()
			}}
			results[i].code, errs[i] = g.exec(ctx, g.command(fmt.Sprintf("out=%s copy exit=%d", word, i)), runtime.Streams{
				Stdin: stdin, Stdout: stdout, Stderr: io.Discard,
			})
			results[i].stdout = stdout.text.String()
		})
	}
	all.Wait()
	for i := range many {
		f.noError(errs[i], "Exec beside others")
		same(f, result{code: i, stdout: fmt.Sprintf("command-%d\n", i)}, results[i], "what came of a command beside others")
	}
}

func refusesCommands(f *fixture) {
	g := f.guest()
	none := runtime.Streams{Stdout: io.Discard, Stderr: io.Discard}
	_, err := g.exec(f.patience(), runtime.Command{Args: []string{"/no/such/program"}}, none)
	f.isError(err, runtime.ErrInvalid, "Exec of a file that does not exist")

	known := g.spec.SessionID
	for _, unknown := range []string{uuid.NewString(), neighbour(known)} {
		g.spec.SessionID = unknown
		_, err = g.exec(f.patience(), g.command("exit=0"), none)
		f.isError(err, runtime.ErrNotFound, "Exec in an unknown sandbox")
	}
	g.spec.SessionID = known
	f.stop(g.spec)
	_, err = g.exec(f.patience(), g.command("exit=0"), none)
	f.isError(err, runtime.ErrNotFound, "Exec in a stopped sandbox")
}

// running is a command that runs until it is killed, and that has a child.
type running struct {
	command, child string // the files that they have locked
	ended          chan error
}

// begin starts a command that ignores everything but SIGKILL, and returns once it runs.
func (g guest) begin(ctx context.Context) running {
	r := running{g.file("command.lock"), g.file("child.lock"), make(chan error, 1)}
	command := g.command("stubborn leave=" + filepath.Base(r.child) + " lock=" + filepath.Base(r.command) + " wait")
	driver := g.driver
	go func() {
		_, err := g.execOn(ctx, driver, command, runtime.Streams{Stdout: io.Discard, Stderr: io.Discard})
		r.ended <- err
	}()
	g.eventually(g.limit(), "a command to run", func() bool {
		if len(r.ended) > 0 {
			g.noError(<-r.ended, "Exec")
			g.require(false, "Exec returned while its command was to run")
		}
		return g.isLocked(r.command) && g.isLocked(r.child)
	})
	return r
}

// areKilled waits until Exec has returned and command and child have ended.
func (g guest) areKilled(r running) error {
	late := time.NewTimer(g.soon())
	defer late.Stop()
	var err error
	select {
	case err = <-r.ended:
	case <-late.C:
		g.require(false, "Exec has not returned %s after its end", g.soon())
	}
	g.isKilled("a command", r.command)
	g.isKilled("the child of a command", r.child)
	return err
}

func killsTheAbandoned(f *fixture) {
	f.sub("when it was cancelled", func(sub *fixture) {
		g := sub.guest()
		ctx, cancel := context.WithCancel(sub.patience())
		defer cancel()
		r := g.begin(ctx)
		cancel()
		sub.isError(g.areKilled(r), context.Canceled, "Exec whose context ended")
		sub.runs(g.spec, g.sandbox)
	})
	f.sub("when it was late", func(sub *fixture) {
		g := sub.guest()
		ctx, cancel := context.WithTimeout(sub.ctx, sub.limit()/20)
		defer cancel()
		r := running{g.file("command.lock"), g.file("child.lock"), make(chan error, 1)}
		_, err := g.exec(ctx, g.command("leave=child.lock lock=command.lock wait"), runtime.Streams{Stdout: io.Discard, Stderr: io.Discard})
		r.ended <- err
		sub.isError(g.areKilled(r), context.DeadlineExceeded, "Exec whose deadline passed")
		deadline, _ := ctx.Deadline()
		late := time.Since(deadline)
		sub.require(late < sub.soon(), "Exec returned %s after its deadline", late.Round(time.Millisecond))
	})
}

func killsWhenItDies(f *fixture) {
	g := f.guest()
	ctx, cancel := context.WithCancel(f.patience())
	defer cancel()
	r := g.begin(ctx)
	driver, err := f.harness.Crash(f.ctx, f.driver)
	f.noError(err, "kill the driver")
	f.driver = driver
	f.require(g.areKilled(r) != nil, "Exec succeeded although the driver was killed")
	f.runs(g.spec, g.sandbox)
}

func leavesTheBackground(f *fixture) {
	g := f.guest()
	child := g.file("child.lock")
	same(f, result{stdout: "done\n"}, g.run(g.command("leave=child.lock out=done"), nil), "what came of a command with a child")
	f.require(f.isLocked(child), "what a command left in the background was killed")
	same(f, result{}, g.run(g.command("exit=0"), nil), "what came of another command")
	f.require(f.isLocked(child), "what a command left in the background was killed after it")
}

func endsTheBackground(f *fixture) {
	g := f.guest()
	child := g.file("child.lock")
	g.run(g.command("leave=child.lock"), nil)
	f.stop(g.spec)
	// A process that is forked meanwhile has the lock, too, until it runs its program.
	g.eventually(time.Second, "what a command left in the background to have ended with a Stop", func() bool { return !f.isLocked(child) })
}
