package command

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"golang.org/x/term"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/runtime"
)

// The exit codes of "session exec" that are not its command's.
const (
	exitTimeout = 124 // the command was killed, because its time was over
	exitNoCode  = 125 // any error of Bivouac
)

// commandCodes is added to the exit code that "session exec" returns from Run, so that Main
// can tell it from other exit codes.
const commandCodes = 1000

// execError ends "session exec" with an exit code.
type execError struct {
	code int
	err  error // nil: the code is that of the command
}

func (e *execError) Error() string { return fmt.Sprintf("exit code %d: %v", e.code, e.err) }

func sessionExecCommand(t terminal) *command {
	c := newCommand(t, "session exec")
	c.args = "CHAT_ID COMMAND"
	c.takesRest = true
	c.synopsis = "Run a command in a chat's sandbox"
	c.about = `Runs a command in the sandbox and exits with its exit code, which is 128 plus the
signal if a signal ended it. The command is killed if this program ends first.

Without -t, Ctrl-C and SIGTERM end the command. With -it they are passed to it.

Its own exit codes are 124 if -timeout is over, and 125 for any other error.`
	c.example = `$ bivouac session exec -it 8a1f6c2e-5c0f-4f0e-9d6b-0c6f6f0f8f11 -- sh
$ tar c . | bivouac session exec -i 8a1f6c2e-5c0f-4f0e-9d6b-0c6f6f0f8f11 -- tar x`
	var in apiclient.ExecInput
	var interactive, both bool
	c.flags.BoolVar(&interactive, "i", false, "Pass the standard input to the command.")
	c.flags.BoolVar(&in.TTY, "t", false, "Run the command on a terminal.")
	c.flags.BoolVar(&both, "it", false, "Both -i and -t.")
	var timeout time.Duration
	c.flags.Func("timeout", "`DURATION` after which the command is killed, such as 90s. (default none)", positive(&timeout))
	c.flags.StringVar(&in.Dir, "dir", "", "Absolute `PATH` of the folder to run it in. (default the sandbox's)")
	c.flags.StringVar(&in.User, "user", "", "`USER` to run it as, if the runtime supports that.")
	c.flags.StringVar(&in.Task, "task", "", "`TASK` to run it in. (default the main task)")
	c.flags.Func("renew", "First extend the session to this `DURATION` from now.", positive(&in.Renew))
	c.flags.Func("env", "`KEY=VALUE` to add to the environment. Repeat it for more.", func(text string) error {
		key, value, ok := strings.Cut(text, "=")
		if !ok {
			return fmt.Errorf("%q is not of the form KEY=VALUE", text)
		}
		if in.Env == nil {
			in.Env = make(map[string]string)
		}
		in.Env[key] = value
		return nil
	})
	client := clientFlags(c)
	c.run = func(ctx context.Context, args []string) error {
		in.Args = args[1:]
		interactive, in.TTY = interactive || both, in.TTY || both
		chat, err := parseChatID(args[0])
		if err != nil {
			return &execError{exitNoCode, err}
		}
		api, err := client()
		if err != nil {
			return &execError{exitNoCode, err}
		}
		ctx = context.WithoutCancel(ctx) // exec has its own signals
		if timeout > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, timeout)
			defer cancel()
		}
		return t.exec(ctx, api, chat, in, interactive)
	}
	return c
}

// positive returns a function that sets a flag's duration.
func positive(to *time.Duration) func(string) error {
	return func(text string) (err error) {
		if *to, err = time.ParseDuration(text); err != nil || *to <= 0 {
			return errors.New("it must be a duration greater than 0, such as 90s")
		}
		return nil
	}
}

// exec runs a command with the streams of the terminal. It always returns an *execError.
func (t terminal) exec(ctx context.Context, api *apiclient.Client, chat uuid.UUID, in apiclient.ExecInput, interactive bool) error {
	// The terminal must be restored whatever signal comes, and however often.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)
	received := make(chan os.Signal, 1)
	go func() {
		select {
		case sig := <-signals:
			received <- sig
			cancel()
		case <-ctx.Done():
		}
	}()

	streams := runtime.Streams{Stdout: t.out, Stderr: t.err}
	if interactive {
		streams.Stdin = t.in
	}
	if in.TTY {
		sizes, restore, err := t.prepare(ctx, &in.Command, interactive)
		if err != nil {
			return &execError{exitNoCode, err}
		}
		defer restore()
		streams.Resize = sizes
	}
	code, err := api.Exec(ctx, chat, in, streams)
	switch {
	case err == nil:
		return &execError{code: code}
	case errors.Is(context.Cause(ctx), context.DeadlineExceeded):
		return &execError{exitTimeout, errors.New("the command was killed, because its time was over")}
	case ctx.Err() != nil:
		return &execError{code: signalled(received)}
	}
	return &execError{exitNoCode, err}
}

// signalled returns the exit code of a command that was ended by a signal to this program.
func signalled(received <-chan os.Signal) int {
	select {
	case sig := <-received:
		if number, ok := sig.(syscall.Signal); ok {
			return 128 + int(number)
		}
	default:
	}
	return 128 + int(syscall.SIGINT)
}

// prepare sets the size of a command's terminal to that of this one, and returns the sizes
// that this one will have. If the terminal is interactive, it passes each key to the command
// until restore is called.
func (t terminal) prepare(ctx context.Context, command *runtime.Command, interactive bool) (sizes <-chan runtime.WindowSize, restore func(), err error) {
	restore = func() {}
	screen := terminalOf(t.in, t.out)
	if screen < 0 {
		if interactive {
			return nil, nil, errors.New("-it needs a terminal; without one use -i")
		}
		return nil, restore, nil
	}
	command.Size = sizeOf(screen)
	if kind := t.getenv("TERM"); kind != "" {
		env := map[string]string{"TERM": kind}
		maps.Copy(env, command.Env)
		command.Env = env
	}
	keys := terminalOf(t.in)
	if interactive {
		if keys < 0 {
			return nil, nil, errors.New("-it needs a terminal as input; without one use -i")
		}
		before, err := term.MakeRaw(keys)
		if err != nil {
			return nil, nil, fmt.Errorf("prepare the terminal: %w", err)
		}
		restore = func() { _ = term.Restore(keys, before) } // the terminal may be gone
	}
	return watchSize(ctx, screen), restore, nil
}

// terminalOf returns the descriptor of the first stream that is a terminal, or -1.
func terminalOf(streams ...any) int {
	for _, stream := range streams {
		if file, ok := stream.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
			return int(file.Fd())
		}
	}
	return -1
}

func sizeOf(screen int) runtime.WindowSize {
	width, height, err := term.GetSize(screen)
	if err != nil || width <= 0 || height <= 0 {
		return runtime.WindowSize{} // the default
	}
	return runtime.WindowSize{Rows: uint16(min(height, 65535)), Columns: uint16(min(width, 65535))}
}

// watchSize returns the sizes of a terminal as they change, until ctx ends.
func watchSize(ctx context.Context, screen int) <-chan runtime.WindowSize {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	sizes := make(chan runtime.WindowSize)
	go func() {
		defer signal.Stop(changed)
		for {
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
			select {
			case <-ctx.Done():
				return
			case sizes <- sizeOf(screen):
			}
		}
	}()
	return sizes
}
