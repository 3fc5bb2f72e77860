package nomad

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

const (
	// maxExecs bounds the commands that run at a time. Each has two connections to Nomad.
	// With maxRequests, maxLooks, the event stream and the helpers a driver has at most 74 connections,
	// and those of followed logs. Nomad accepts 100 from one address.
	maxExecs = 16
	// killLimit is how long Exec waits for the confirmation that a command was killed. The
	// guard continues without it.
	killLimit = 800 * time.Millisecond
	// doneLimit is how long Exec waits until the guard knows that the command has ended.
	doneLimit = 5 * time.Second
	// endLimit is how long Exec waits, after it has lost a command, for the report that the
	// sandbox has ended. Nomad's clients report every 200 ms.
	endLimit = 2 * time.Second
	// keepAlive is how often a connection gets a message, as Nomad's own client does it.
	keepAlive = 10 * time.Second
)

// markName is a variable in the environment of a command and its children. Its value is
// different for each command.
const markName = "BIVOUAC_EXEC"

// wrapper runs the command. Its arguments are the PID of the guard, the folder or "", the
// size of the terminal for stty or "", what begins its lines, the PATH of the command or "" for
// that of the sandbox, the program, and the arguments for env: the variables of the command and
// the command. Its own environment is that of the sandbox, so that it finds its tools, with the
// mark, so that the guard finds it too.
//
// On stderr it writes a line with its PID, or why the command cannot run. The command
// begins when the guard sends it SIGUSR1. When the command has ended it writes a line with
// the exit code to each output. Then it stays until the guard kills it. Nomad tells the end
// of a process itself, but its docker driver drops output that it has not read by then, and
// its other drivers wait for the end of the input.
const wrapper = `unset bivouac_line bivouac_env bivouac_wait bivouac_go bivouac_code
bivouac_line=$4
bivouac_tell() { echo "$bivouac_line$*" >&9; }
exec 9>&2 2>/dev/null
kill -0 "$1" || { bivouac_tell ` + wordLost + `; exit 126; }
[ -z "$2" ] || cd "$2" || { bivouac_tell ` + wordNoFolder + `; exit 126; }
[ -z "$3" ] || stty $3
bivouac_env=$(command -v env)
(PATH=${5:-$PATH}; command -v "$6" >/dev/null) || { bivouac_tell ` + wordNoProgram + `; exit 127; }
shift 6
trap : HUP INT QUIT TERM
sleep 10 & bivouac_wait=$!
trap 'bivouac_go=1; kill $bivouac_wait' USR1
bivouac_tell ` + wordBegin + ` $$
wait $bivouac_wait
[ "$bivouac_go" ] || exit 126
(exec "$bivouac_env" "$@") 2>&9 9>&-
bivouac_code=$?
bivouac_tell ` + wordEnd + ` $bivouac_code
bivouac_tell ` + wordEnd + ` $bivouac_code 9>&1
exec sleep 600`

// What the wrapper tells.
const (
	wordLost      = "lost" // the guard has ended
	wordNoFolder  = "nofolder"
	wordNoProgram = "noprogram"
	wordBegin     = "begin" // and its PID
	wordEnd       = "end"   // and the exit code

	// maxTold bounds what follows the beginning of a line of the wrapper, in bytes.
	maxTold = 64
)

// Exec implements [runtime.Execer]. It needs sh, env, grep and sleep in the sandbox, and stty
// if its sh has no "read -t". User is not supported: Nomad runs commands as the user of
// the task. Nomad's client logs commands with their arguments and Env.
//
// Nomad does not end a command when its caller goes, so each command has a guard in the
// sandbox; see [guardScript]. If the driver's process or the connection dies, the guard
// kills the command within about five seconds. The guard does not find processes that
// cleared their environment, or that run as another user.
func (d *Driver) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	if err := command.Validate(); err != nil {
		return 0, fmt.Errorf("nomad: exec: %w: %w", runtime.ErrInvalid, err)
	}
	if command.User != "" {
		return 0, fmt.Errorf("nomad: exec: %w: a command runs as the user of its task, so a user cannot be chosen", runtime.ErrInvalid)
	}
	select {
	case d.execs <- struct{}{}:
		defer func() { <-d.execs }()
	default:
		return 0, fmt.Errorf("nomad: exec: %w: %d commands", runtime.ErrBusy, maxExecs)
	}
	task, err := d.execTask(ctx, sessionID, command.Task)
	if err != nil {
		return 0, fmt.Errorf("nomad: exec: %w", err)
	}
	whileRunning, done := d.whileRunning(ctx, sessionID)
	defer done()
	code, err := d.exec(whileRunning, task, command, streams)
	switch {
	case err == nil:
		return code, nil
	case ctx.Err() != nil:
		return 0, fmt.Errorf("nomad: exec: %w", ctx.Err())
	case whileRunning.Err() != nil:
		return 0, fmt.Errorf("nomad: exec: %w", context.Cause(whileRunning))
	case errors.Is(err, runtime.ErrInvalid):
		return 0, fmt.Errorf("nomad: exec: %w", err)
	case isDenied(err):
		return 0, failed(ctx, "exec", err)
	}
	// The connections break before Nomad reports the end of the sandbox.
	reported, stop := context.WithTimeout(whileRunning, endLimit)
	defer stop()
	<-reported.Done()
	if whileRunning.Err() != nil && ctx.Err() == nil {
		return 0, fmt.Errorf("nomad: exec: %w", context.Cause(whileRunning))
	}
	return 0, failed(ctx, "exec", err)
}

// whileRunning returns a context that ends with ctx, or as soon as the sandbox is no longer
// seen to run, with ErrNotFound as its cause. The commands must be killed before their
// sandbox: a runtime without isolation kills the guards with the sandbox, but not
// always the commands.
func (d *Driver) whileRunning(ctx context.Context, sessionID string) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	w, done := d.cache.await(jobs.ID(sessionID))
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for {
			select {
			case <-ctx.Done():
				return
			case <-w.C:
			}
			if s, current := d.cache.get(jobs.ID(sessionID)); current {
				if err := d.mustRun(s); err != nil {
					cancel(err)
					return
				}
			}
		}
	}()
	return ctx, func() {
		cancel(nil)
		<-watched
		done()
	}
}

// mustRun returns ErrNotFound unless the sandbox runs. One that another replica has started is
// known to be ready only once Nomad reports it, up to a second later.
func (d *Driver) mustRun(s state) error {
	sandbox, ok := d.sandbox(s)
	isStarting := sandbox.State == runtime.StateStarting && sandbox.ContainerID != ""
	switch {
	case !ok:
		return runtime.ErrNotFound
	case sandbox.State != runtime.StateRunning && !isStarting:
		return fmt.Errorf("%w: it is %s: %s", runtime.ErrNotFound, sandbox.State, sandbox.Reason)
	}
	return nil
}

// task is a task of a running allocation.
type task struct {
	alloc, name, namespace string
}

// execTask returns the task of a sandbox that runs, or ErrNotFound. name is empty for its
// main task.
func (d *Driver) execTask(ctx context.Context, sessionID, name string) (task, error) {
	s, err := d.look(ctx, jobs.ID(sessionID))
	if err != nil {
		return task{}, err
	}
	if err := d.mustRun(s); err != nil {
		return task{}, err
	}
	alloc := s.sandboxAlloc()
	if name == "" {
		names := mainTasks(s.job, alloc)
		if len(names) == 0 { // Nomad has not reported the states of the tasks yet
			names = jobs.MainTasks(s.job.Meta)
		}
		if len(names) == 0 {
			return task{}, fmt.Errorf("%w: the job does not tell its main task, so name one", runtime.ErrInvalid)
		}
		name = names[0]
	} else if _, ok := alloc.TaskStates[name]; !ok && len(alloc.TaskStates) > 0 {
		return task{}, fmt.Errorf("%w: unknown task %q (available: %s)", runtime.ErrInvalid,
			name, strings.Join(slices.Sorted(maps.Keys(alloc.TaskStates)), ", "))
	}
	return task{alloc.ID, name, alloc.Namespace}, nil
}

// exec runs a command beside its guard. It tries again for some seconds while Nomad does not
// know that the task runs, or says that the guard or the command ended before it said a word.
func (d *Driver) exec(ctx context.Context, task task, command runtime.Command, streams runtime.Streams) (int, error) {
	pause := backoff.Backoff{Min: 20 * time.Millisecond, Max: maxPause}
	for began := time.Now(); ; {
		code, err := d.tryExec(ctx, task, command, streams)
		if !errors.Is(err, errNotStarted) || time.Since(began) > askLimit {
			return code, err
		}
		if ended := backoff.Sleep(ctx, pause.Next()); ended != nil {
			return 0, fmt.Errorf("%w, after: %w", ended, err)
		}
	}
}

// tryExec is exec without the repetition. If it returns errNotStarted, the command has not
// begun and never will.
func (d *Driver) tryExec(ctx context.Context, task task, command runtime.Command, streams runtime.Streams) (code int, err error) {
	guard, err := d.openGuard(ctx, task)
	if err != nil {
		return 0, err
	}
	defer func() { //nolint:contextcheck // the guard is ended even if ctx has ended
		word, limit := wordDone, doneLimit
		if err != nil {
			word, limit = wordKill, killLimit
		}
		guard.finish(word, limit)
	}()
	// The mark is known to the command, and may be in its output. A control character is
	// rarely at the end of an output, which would be held back as the beginning of a line.
	line := "\x01" + rand.Text() + " "
	conn, err := d.openExec(ctx, task, wrapped(command, guard, line), command.TTY)
	if err != nil {
		return 0, err
	}
	defer conn.close()
	return converse(ctx, conn, guard, line, command, streams)
}

// wrapped returns the arguments that run a command under its guard. line begins each line of
// the wrapper.
func wrapped(command runtime.Command, guard *execGuard, line string) []string {
	size := ""
	if command.TTY && command.Size != (runtime.WindowSize{}) {
		size = fmt.Sprintf("rows %d cols %d", command.Size.Rows, command.Size.Columns)
	}
	args := []string{
		"env", guard.mark, "sh", "-c", wrapper, "sh",
		guard.pid, command.Dir, size, line, command.Env["PATH"], command.Args[0],
	}
	for _, name := range slices.Sorted(maps.Keys(command.Env)) {
		args = append(args, name+"="+command.Env[name])
	}
	args = append(args, guard.mark)             // the last one counts
	if strings.Contains(command.Args[0], "=") { // env takes it for a variable
		args = append(args, "sh", "-c", `exec "$@"`, "sh")
	}
	return append(args, command.Args...)
}

// converse passes the streams between a command and its caller until the command ends.
func converse(ctx context.Context, conn *execConn, guard *execGuard, line string, command runtime.Command, streams runtime.Streams) (int, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	begun, hasBegun := make(chan struct{}), false
	attended := make(chan struct{})
	go func() {
		defer close(attended)
		if err := attend(ctx, conn, guard, begun, streams.Resize); err != nil {
			cancel(err)
		}
	}()
	defer func() {
		cancel(nil)
		<-attended
	}()
	told := telling{line: []byte(line), command: command}
	stdout, stderr := newFilter(&told, streams.Stdout), newFilter(&told, streams.Stderr)
	outputs := 2
	if command.TTY {
		outputs = 1
	}
	for {
		out, err := conn.receive(ctx)
		if err == nil {
			err = stdout.write(dataOf(out.Stdout))
		}
		if err == nil {
			err = stderr.write(dataOf(out.Stderr))
		}
		switch {
		case err != nil && context.Cause(ctx) != nil:
			return 0, context.Cause(ctx)
		case err != nil:
			return 0, err
		case told.ends == outputs:
			return told.code, nil
		case out.Exited && told.pid == "":
			return 0, fmt.Errorf("%w: it ended before it said a word", errNotStarted)
		case out.Exited:
			return 0, errors.New("the command was ended from outside")
		case told.pid != "" && !hasBegun:
			guard.wrapper = told.pid
			if err := guard.say(ctx, wordGo+" "+told.pid); err != nil {
				return 0, errGuardLost
			}
			close(begun)
			hasBegun = true
			// By the contract of Exec nothing waits for this: its Read may.
			go sendInput(ctx, conn, streams.Stdin)
		}
	}
}

func dataOf(op *api.ExecStreamingIOOperation) []byte {
	if op == nil {
		return nil
	}
	return op.Data
}

// attend resizes the terminal, keeps the connection alive, and watches the guard, until
// ctx ends. It returns why the command cannot go on.
func attend(ctx context.Context, conn *execConn, guard *execGuard, begun <-chan struct{}, resize <-chan runtime.WindowSize) error {
	alive := time.NewTicker(keepAlive)
	defer alive.Stop()
	begin := time.NewTimer(askLimit)
	defer begin.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-guard.gone:
			return errGuardLost
		case <-begin.C:
			return errNotBegun
		case <-begun:
			begun = nil
			begin.Stop()
		case size, ok := <-resize:
			if !ok {
				resize = nil
				continue
			}
			err = conn.resize(ctx, size)
		case <-alive.C:
			err = conn.send(ctx, api.ExecStreamingInput{})
		}
		if errors.Is(err, errInputWaits) {
			err = nil
		}
		if err != nil {
			return err
		}
	}
}

var errNotBegun = fmt.Errorf("the command did not begin within %s", askLimit)

// inputChunk is how many bytes of input a message has at most.
const inputChunk = 16 << 10

// sendInput sends the input until its end, or until ctx ends. A failure shows in what the
// connection receives.
func sendInput(ctx context.Context, conn *execConn, stdin io.Reader) {
	chunk := make([]byte, inputChunk)
	for stdin != nil {
		n, err := stdin.Read(chunk)
		if n > 0 && conn.input(ctx, api.ExecStreamingIOOperation{Data: chunk[:n]}) != nil {
			return
		}
		if err != nil {
			break
		}
	}
	_ = conn.input(ctx, api.ExecStreamingIOOperation{Close: true})
}

// telling is what the wrapper has told.
type telling struct {
	line    []byte // begins each of its lines
	command runtime.Command
	pid     string // of the wrapper; empty until the command begins
	code    int    // of the command
	ends    int    // on how many outputs it told the end
}

// hear reads a line of the wrapper. It returns an error if the command cannot run.
func (t *telling) hear(line string) error {
	word, rest, _ := strings.Cut(strings.TrimRight(line, "\r"), " ")
	switch word {
	case wordLost:
		return errGuardLost
	case wordNoFolder:
		return fmt.Errorf("%w: there is no folder %q", runtime.ErrInvalid, t.command.Dir)
	case wordNoProgram:
		return fmt.Errorf("%w: there is no program %q", runtime.ErrInvalid, t.command.Args[0])
	case wordBegin:
		t.pid = rest
	case wordEnd:
		code, err := strconv.Atoi(rest)
		if err != nil {
			return fmt.Errorf("the exit code of the command: %w", err)
		}
		t.code = code
		t.ends++
	}
	return nil
}

// filter passes an output of the command on, without the lines of the wrapper and without
// what comes after the end.
type filter struct {
	told  *telling
	to    io.Writer
	held  []byte // what may be part of a line of the wrapper
	ended bool
}

func newFilter(told *telling, to io.Writer) *filter {
	if to == nil {
		to = io.Discard
	}
	return &filter{told: told, to: to}
}

func (f *filter) write(data []byte) error {
	f.held = append(f.held, data...)
	for len(f.held) > 0 && !f.ended {
		free, line, whole := f.split()
		if len(free) > 0 {
			if _, err := f.to.Write(free); err != nil {
				return fmt.Errorf("write the command's output: %w", err)
			}
		}
		if !whole {
			return nil
		}
		ends := f.told.ends
		if err := f.told.hear(line); err != nil {
			return err
		}
		f.ended = f.told.ends > ends
	}
	return nil
}

// split takes what is before the next line of the wrapper, and that line, if it is whole.
func (f *filter) split() (free []byte, line string, whole bool) {
	begin := f.told.line
	i := bytes.Index(f.held, begin)
	if i < 0 {
		i = len(f.held) - overlap(f.held, begin)
		free, f.held = f.held[:i], bytes.Clone(f.held[i:])
		return free, "", false
	}
	text := f.held[i+len(begin):]
	end := bytes.IndexByte(text, '\n')
	switch {
	case end > maxTold, end < 0 && len(text) > maxTold: // the command wrote it
		free, whole = f.held[:i+len(begin)], true // an empty line tells nothing
		f.held = bytes.Clone(text)
	case end < 0:
		free, f.held = f.held[:i], bytes.Clone(f.held[i:])
	default:
		free, line, whole = f.held[:i], string(text[:end]), true
		f.held = bytes.Clone(text[end+1:])
	}
	return free, line, whole
}

// overlap returns how many bytes at the end of text are the beginning of line.
func overlap(text, line []byte) int {
	for n := min(len(text), len(line)-1); n > 0; n-- {
		if bytes.HasSuffix(text, line[:n]) {
			return n
		}
	}
	return 0
}
