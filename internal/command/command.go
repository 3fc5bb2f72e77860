// Package command implements the command line: it parses what the user types and prints
// the results.
//
// [Main] runs the program. Session commands use only the Control API, as any other
// client does.
//
// The package does not know how a server does its work.
package command

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/hashicorp/cli"

	"github.com/bivouac/bivouac/internal/agent"
	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/version"
)

// The program's exit codes; exitCodes explains them.
const (
	exitDone = iota
	exitError
	exitNotPlaced
	exitNotFound
	exitConflict
	exitUnreachable
)

// exitCodes is part of the help of every command that calls the API.
const exitCodes = `
Exit codes:

  0  success
  1  any other error
  2  no room for the sandbox
  3  the chat has no session
  4  conflict: the session has other parameters, has expired, or its sandbox
     does not run
  5  no server answers at the address
`

// completionHelp is printed after the list of commands.
const completionHelp = `
Run bivouac -autocomplete-install once to set up completion in bash, zsh and
fish.`

// exitCodeOf returns the exit code for an error.
func exitCodeOf(err error) int {
	if errors.Is(err, apiclient.ErrUnreachable) {
		return exitUnreachable
	}
	e, ok := errors.AsType[*apiclient.Error](err)
	if !ok {
		return exitError
	}
	switch e.Code {
	case wire.CodeNotPlaced:
		return exitNotPlaced
	case wire.CodeNotFound:
		return exitNotFound
	case wire.CodeConflict, wire.CodeExpired, wire.CodeNotRunning:
		return exitConflict
	default:
		return exitError
	}
}

// Main runs the program with the arguments of this process and returns the exit code.
func Main() int {
	t := terminal{program: os.Args[0], in: os.Stdin, out: os.Stdout, err: os.Stderr, getenv: os.Getenv}
	c := cli.CLI{
		Name:     "bivouac",
		Version:  version.Get().String(),
		Args:     os.Args[1:],
		Commands: commands(t),

		// Only programs call these.
		HiddenCommands: []string{agent.DevCleanup},

		Autocomplete: true,

		HelpFunc: func(all map[string]cli.CommandFactory) string {
			return cli.BasicHelpFunc("bivouac")(all) + completionHelp
		},
		HelpWriter:  t.out,
		ErrorWriter: t.err,
	}
	code, err := c.Run()
	if err != nil {
		t.tell("Error: %v", err)
		return exitError
	}
	if code >= commandCodes {
		return code - commandCodes
	}
	if code > exitUnreachable {
		return exitError // a code of package cli, for example for an unknown command
	}
	return code
}

// terminal is the environment of a command: its input, its outputs and its variables.
type terminal struct {
	program  string // as the user called it
	in       io.Reader
	out, err io.Writer
	getenv   func(string) string
}

// tell writes a line to stderr, apart from the command's output. It ignores an error,
// which it could not report anywhere.
func (t terminal) tell(format string, args ...any) {
	_, _ = fmt.Fprintln(t.err, printable(fmt.Sprintf(format, args...)))
}

func commands(t terminal) map[string]cli.CommandFactory {
	all := map[string]cli.CommandFactory{}
	for _, c := range []*command{
		agentCommand(t), nodeCommand(t),
		configCommand(t), configValidateCommand(t),
		sessionCommand(t), sessionCreateCommand(t), sessionGetCommand(t), sessionListCommand(t),
		sessionRenewCommand(t), sessionDeleteCommand(t), sessionWatchCommand(t), sessionWhyCommand(t), sessionLogsCommand(t), sessionExecCommand(t),
		cleanupCommand(t), eventsCommand(t),
		poolCommand(t), poolListCommand(t),
		operatorCommand(t), operatorAdoptCommand(t), operatorForgetCommand(t), operatorRepairCommand(t),
		pluginCommand(t), pluginListCommand(t), pluginInspectCommand(t), pluginRunCommand(t), pluginVerifyCommand(t),
		tokenCommand(t), tokenNewCommand(t),
		versionCommand(t),
		demoSandboxCommand(t),
		devCleanupCommand(t),
	} {
		all[c.name] = func() (cli.Command, error) { return c, nil }
	}
	return all
}

// command is one command as a cli.Command.
type command struct {
	terminal
	name      string // as typed, such as "session get"
	args      string // the arguments in its usage, each a word in capitals
	takesRest bool   // the last argument is all that comes after the others, such as a command
	synopsis  string
	about     string // what it does, in a few sentences
	example   string
	flags     *flag.FlagSet
	asJSON    bool                                           // print JSON, also for errors; set by jsonFlag's flag
	calls     bool                                           // it calls the API; its help lists the exit codes
	run       func(ctx context.Context, args []string) error // nil for a group of commands
}

func newCommand(t terminal, name string) *command {
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.Usage = func() {}
	return &command{terminal: t, name: name, flags: flags}
}

// Synopsis returns the command's description in one line.
func (c *command) Synopsis() string { return c.synopsis }

// Help returns the command's complete help.
func (c *command) Help() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: %s\n\n%s", c.usage(), indented(c.about))
	if c.example != "" {
		fmt.Fprintf(&b, "\nExample:\n\n%s", indented(c.example))
	}
	if c.hasFlags() {
		b.WriteString("\nOptions:\n\n")
		c.flags.SetOutput(&b)
		c.flags.PrintDefaults()
		c.flags.SetOutput(io.Discard)
	}
	if c.calls {
		b.WriteString(exitCodes)
	}
	return strings.TrimRight(b.String(), "\n")
}

func indented(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if strings.TrimSpace(line) != "" {
			b.WriteString("  ")
		}
		b.WriteString(line)
	}
	return b.String() + "\n"
}

func (c *command) usage() string {
	usage := "bivouac " + c.name
	if c.run == nil {
		return usage + " SUBCOMMAND"
	}
	if c.hasFlags() {
		usage += " [options]"
	}
	if c.takesRest {
		return usage + " " + strings.Replace(c.args, " COMMAND", " -- COMMAND...", 1)
	}
	return strings.TrimRight(usage+" "+c.args, " ")
}

func (c *command) hasFlags() bool {
	has := false
	c.flags.VisitAll(func(*flag.Flag) { has = true })
	return has
}

// Run runs the command and returns the exit code.
func (c *command) Run(typed []string) int {
	if c.run == nil {
		return cli.RunResultHelp
	}
	args, err := c.parse(typed)
	if errors.Is(err, flag.ErrHelp) {
		if _, err := fmt.Fprintln(c.out, c.Help()); err != nil {
			return exitError
		}
		return exitDone
	}
	usageError := exitError
	if c.takesRest { // smaller codes are those of the command that it runs
		usageError = commandCodes + exitNoCode
	}
	if err != nil && (c.asJSON || slices.ContainsFunc(typed, asksForJSON)) {
		c.tellJSON(err)
		return usageError
	}
	if err != nil {
		c.tell("Error: %v\nUsage: %s\nSee bivouac %s -help", err, c.usage(), c.name)
		return usageError
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// After the first signal, the second one has its usual effect: it ends the process
	// at once.
	defer context.AfterFunc(ctx, stop)()
	defer stop()
	err = c.run(ctx, args)
	if ended, ok := errors.AsType[*execError](err); ok {
		if ended.err != nil {
			_ = c.fail(ended.err) // which only tells it
		}
		return commandCodes + ended.code
	}
	if err != nil {
		return c.fail(err)
	}
	return exitDone
}

// parse accepts options before, between and after the arguments.
func (c *command) parse(typed []string) ([]string, error) {
	var args []string
	for {
		if err := c.flags.Parse(typed); err != nil {
			return nil, err
		}
		if c.flags.NArg() == 0 {
			break
		}
		if c.takesRest && len(args) == len(strings.Fields(c.args))-1 {
			return append(args, c.flags.Args()...), nil
		}
		args = append(args, c.flags.Arg(0))
		typed = c.flags.Args()[1:]
	}
	words := strings.Fields(c.args)
	least := len(slices.DeleteFunc(slices.Clone(words), func(w string) bool { return strings.HasPrefix(w, "[") }))
	switch {
	case len(args) > len(words):
		return nil, fmt.Errorf("too many arguments: %q", args[len(words)])
	case len(args) < least:
		return nil, fmt.Errorf("%s is missing", words[len(args)])
	}
	return args, nil
}

// asksForJSON reports whether arg is the JSON flag. It is for arguments that could not
// be parsed.
func asksForJSON(arg string) bool { return arg == "-json" || arg == "--json" }

// fail reports an error and returns the exit code.
func (c *command) fail(err error) int {
	switch e, ok := errors.AsType[*apiclient.Error](err); {
	case c.asJSON:
		c.tellJSON(err)
	case ok:
		c.tellAnswer(e)
	default:
		c.tell("Error: %v", err)
	}
	if text := hint(err); text != "" && !c.asJSON {
		c.tell("%s", text)
	}
	return exitCodeOf(err)
}

// tellAnswer reports an error that the server returned.
func (c *command) tellAnswer(e *apiclient.Error) {
	c.tell("Error: %v", e)
	if e.Session != nil {
		c.tell("\nThe existing session:")
		_ = showTable(c.err, sessionLines(*e.Session)) // as with tell
	}
	if e.RetryAfter > 0 {
		c.tell("It may work in %s.", e.RetryAfter)
	}
	if e.RequestID != "" {
		c.tell("Request %s", e.RequestID)
	}
}

// The codes of errors that did not come from a server.
const (
	codeUnreachable wire.Code = "unreachable"
	codeFailed      wire.Code = "failed"
)

// errorAnswer is an error as JSON: the API's own form and the value of Retry-After.
type errorAnswer struct {
	wire.ErrorAnswer
	RetryAfter int `json:"retry_after,omitempty"` // seconds
}

// tellJSON reports an error as one line of JSON.
func (c *command) tellJSON(err error) {
	answer := errorAnswer{}
	answer.Error = wire.Error{Code: codeFailed, Message: err.Error()}
	if errors.Is(err, apiclient.ErrUnreachable) {
		answer.Error.Code = codeUnreachable
	}
	if e, ok := errors.AsType[*apiclient.Error](err); ok {
		answer.Error.Code = cmp.Or(e.Code, codeFailed)
		answer.Error.Reason, answer.Error.RequestID = e.Reason, e.RequestID
		answer.Session, answer.RetryAfter = e.Session, int(e.RetryAfter.Seconds())
	}
	e := json.NewEncoder(c.err)
	e.SetEscapeHTML(false)
	_ = e.Encode(answer) // as with tell
}
