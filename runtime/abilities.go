package runtime

import (
	"context"
	"encoding/json"
	"io"
	"iter"
	"time"
)

// Ability is the name of something that a driver can do beyond [Driver]. In Go an
// ability is a small interface that the driver implements, and callers find it by
// type assertion. A plugin declares the names.
//
// A driver that forwards to another one, such as the driver of a plugin, has the
// methods of every ability. Those that do not work return an error that wraps
// [errors.ErrUnsupported], with two exceptions: Watch reports nothing until its
// context ends, and Health reports on the driver alone.
type Ability string

// The abilities, each with its interface.
const (
	AbilityClaim     Ability = "claim"     // Claimer
	AbilityConfigure Ability = "configure" // Configurer
	AbilityExec      Ability = "exec"      // Execer
	AbilityExplain   Ability = "explain"   // Explainer
	AbilityHealth    Ability = "health"    // HealthChecker
	AbilityLogs      Ability = "logs"      // LogReader
	AbilityWatch     Ability = "watch"     // Watcher
)

// Watcher is implemented by drivers that notice when a sandbox changes, so that
// the host learns of it before its next check.
type Watcher interface {
	// Watch calls changed, one call at a time, for each sandbox whose state
	// changes, until ctx ends. A change may be reported twice, and one may be
	// missed. It returns ctx's error, or at once one that wraps
	// [errors.ErrUnsupported].
	Watch(ctx context.Context, changed func(Sandbox)) error
}

// HealthChecker is implemented by drivers that depend on something that can be
// unreachable.
type HealthChecker interface {
	// Health returns nil if the driver could try a Create, and otherwise an error
	// that says what is missing.
	Health(ctx context.Context) error
}

// ChatFinder is implemented by drivers that can find the sandboxes of one chat
// without listing all. It lets a create find a sandbox whose record was lost
// instead of starting a second one. With other drivers a create relies on the
// record. It is for drivers that are part of the host; a plugin's is not called.
type ChatFinder interface {
	// FindChat returns the sandboxes of a chat that are not dead, without the one
	// of the session except, which may be empty. A caller waits for it at each
	// create, so it should take at most a millisecond if there is none. A sandbox
	// that it returns must be described as it is now, not as it was seen before,
	// because the host may return that sandbox to the caller.
	FindChat(ctx context.Context, chatID, except string) ([]Sandbox, error)
}

// Prober is implemented by drivers that can check whether a sandbox itself still
// answers.
type Prober interface {
	// Answers reports whether the session's sandbox answers at endpoint now. The
	// host calls it for a sandbox that the driver no longer knows. It takes a few
	// seconds at most. An error means that it cannot be known.
	Answers(ctx context.Context, sessionID string, endpoint Endpoint) (bool, error)
}

// Configurer is implemented by drivers that are configured after they start, such
// as plugins. A plugin has no other way to learn the instance.
type Configurer interface {
	// Configure is called once, after Info and before any other method. A [Claimer] is
	// asked for its Info again after that, because of the Variant. Configure takes
	// ten seconds at most. If the configuration is wrong, it returns ErrInvalid
	// with the reason. The host checks nothing before, so Configure also refuses
	// unknown keys. What the driver depends on need not be reachable yet.
	//
	// "bivouac config validate" calls it too, with the instance
	// "config-validate", and stops the plugin after that.
	Configure(ctx context.Context, config Config) error
}

// Config is the configuration of a driver.
type Config struct {
	// Instance is the ID of the Bivouac instance; see [ValidName]. Several
	// instances may share a machine or a container engine. So the driver marks
	// what it makes with the ID, and lists only what has that mark.
	Instance string
	// JSON is an object, at least "{}".
	JSON json.RawMessage
	// DropMarks is true if no earlier call of this instance is still running. The
	// driver may then remove all marks of used session IDs, which it otherwise
	// removes an hour after the Delete. "bivouac plugin verify" sets it at its end,
	// so that it leaves nothing behind.
	DropMarks bool
}

// LogReader is implemented by drivers that keep the output of their sandboxes.
type LogReader interface {
	// Logs yields the kept output of one stream in order. With query.Follow it also
	// yields new output, until the sandbox or ctx ends. The output of a stopped
	// sandbox may be read until it is deleted. Logs ends after the first error. The
	// error is ErrNotFound if there is no such sandbox, ErrLogsDisabled if its output
	// is not kept, and ErrInvalid if it has no such task.
	Logs(ctx context.Context, sessionID string, query LogQuery) iter.Seq2[LogChunk, error]
}

// LogQuery selects output.
type LogQuery struct {
	Stream LogStream // Stdout or Stderr
	Task   string    // if a sandbox has several tasks; empty: its main one
	// Offset is where to begin, in bytes from the oldest kept byte. A negative offset
	// counts from the end of what is kept. An offset out of range means its nearest end.
	Offset int64
	Follow bool // continue with new output
}

// LogChunk is a piece of a sandbox's output. It may begin and end in the middle of
// a line.
type LogChunk struct {
	Stream LogStream
	Offset int64  // of the first byte of Data, counted as in LogQuery
	Data   []byte // valid until the next chunk
}

// LogStream is the name of an output stream.
type LogStream string

// The streams. A driver that cannot tell them apart uses Stdout, and then nothing was
// written to Stderr.
const (
	Stdout LogStream = "stdout"
	Stderr LogStream = "stderr"
)

// Execer is implemented by drivers that run commands in their sandboxes.
type Execer interface {
	// Exec runs a command in a running sandbox and returns its exit code, which is
	// 128 plus the signal's number if a signal ended it.
	//
	// When ctx ends, Exec kills the command and those of its children that it can
	// find, and returns ctx's error within a second. They are also killed if the
	// driver's own process dies. Children that the command leaves behind when it ends
	// by itself continue.
	//
	// Exec returns ErrNotFound if no such sandbox runs or it ends meanwhile, ErrBusy if too
	// many commands run, and ErrInvalid if the command
	// cannot be run: there is no such file, or the runtime does not support one of its
	// fields.
	Exec(ctx context.Context, sessionID string, command Command, streams Streams) (exitCode int, err error)
}

// Command is a command to run in a sandbox. [Command.Validate] checks it.
type Command struct {
	Args []string          // the program and its arguments, at least one
	Env  map[string]string // added to the sandbox's environment
	Dir  string            // absolute; empty: the sandbox's
	User string            // empty: the sandbox's
	Task string            // as in LogQuery
	TTY  bool              // run the command on a terminal
	Size WindowSize        // of the terminal at the start; zero: the runtime's default
}

// WindowSize is the size of a terminal in characters.
type WindowSize struct{ Rows, Columns uint16 }

// Streams are the standard streams of a command.
type Streams struct {
	// Stdin is the command's input; nil means that it is empty. A Read may still be
	// waiting when Exec returns. The caller must end it.
	Stdin io.Reader
	// Stdout and Stderr get the output; on a terminal Stdout gets all of it. Exec waits for
	// a Write, so the caller must end it when ctx ends.
	Stdout io.Writer
	Stderr io.Writer
	Resize <-chan WindowSize // new sizes of the terminal; may be nil
}

// Explainer is implemented by drivers that can tell what became of a sandbox.
type Explainer interface {
	// Explain returns what happened to the sandbox, oldest first, and at most the
	// newest 100. It returns ErrNotFound if nothing is known of the sandbox. It may
	// take seconds, because a person waits for it.
	Explain(ctx context.Context, sessionID string) ([]Happening, error)
}

// Happening is one thing that happened to a sandbox.
type Happening struct {
	Time time.Time // zero if it is not known
	Text string    // for a person to read, in the runtime's own words; at most 4096 bytes
}

// Claimer is implemented by drivers that can start a sandbox before a chat needs it.
// Such a sandbox is a spare. Its spec has a pool, and no chat, AI agent or volume. All
// methods of [Driver] treat it like any other sandbox. Info returns the Variant that
// Create makes spares of.
//
// A claimed sandbox must behave like one that was created for its chat, with two
// differences. Its environment has no BIVOUAC_CHAT_ID and BIVOUAC_AGENT_ID. It finds
// them in the file that BIVOUAC_SESSION_FILE names: a [SessionFile] as JSON. There is
// no such file before the claim. And a program that was started in the workspace, or
// has opened it, still sees the empty one of before the claim, until it changes to
// BIVOUAC_WORKSPACE or opens it once more. The commands of an [Execer] have the
// environment of the sandbox, and see the volume.
type Claimer interface {
	// Claim gives a spare to a chat: it makes the volume of spec the sandbox's
	// workspace, and returns once the sandbox answers. spec has the session ID and the
	// access token of the spare, and no pool. The ChatID of the returned sandbox is
	// that of spec.
	//
	// A repeated Claim with the same spec returns the same sandbox. Claim returns
	// ErrConflict if the spare was claimed with another spec, or stopped, or is not a
	// spare, ErrNotFound if there is no such sandbox, ErrNotReady if it does not
	// answer, and ErrInvalid if the spec can never work. After any error the host starts
	// another sandbox for the chat, and before that calls Delete, unless Inspect shows
	// another chat. It waits a few seconds at most, because a caller waits for it.
	Claim(ctx context.Context, spec Spec) (Sandbox, error)
}

// SessionFile is what a claimed sandbox finds in its session file, as JSON.
type SessionFile struct {
	SessionID string `json:"session_id"`
	ChatID    string `json:"chat_id"`
	AgentID   string `json:"agent_id"`
}

// SessionFile returns the content of the session file of a spare that is claimed with s.
func (s Spec) SessionFile() SessionFile {
	return SessionFile{SessionID: s.SessionID, ChatID: s.ChatID, AgentID: s.AgentID}
}
