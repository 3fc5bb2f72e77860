package runtime

import (
	"context"
	"encoding/json"
	"io"
	"iter"
	"slices"
)

// Ability is the name of something that a driver can do beyond [Driver]. In Go an
// ability is a small interface that the driver implements. A driver that is
// reached over a network declares the name instead.
type Ability string

// The abilities, each with the interface that it stands for.
const (
	AbilityConfigure Ability = "configure" // Configurer
	AbilityExec      Ability = "exec"      // Execer
	AbilityHealth    Ability = "health"    // HealthChecker
	AbilityLogs      Ability = "logs"      // LogReader
	AbilityWatch     Ability = "watch"     // Watcher
)

// Abilities returns the abilities of a driver, sorted: those that its Info
// declares, or else those whose interface it implements.
//
// A driver that forwards to another one, such as the driver of a plugin, has the
// methods of every ability and declares those that work. The others return an
// error that wraps [errors.ErrUnsupported], with two exceptions: Watch reports
// nothing until its context ends, and Health reports on the driver alone.
func Abilities(d Driver, info Info) []Ability {
	if info.Abilities != nil {
		return slices.Sorted(slices.Values(info.Abilities))
	}
	var abilities []Ability
	if _, ok := d.(Configurer); ok {
		abilities = append(abilities, AbilityConfigure)
	}
	if _, ok := d.(Execer); ok {
		abilities = append(abilities, AbilityExec)
	}
	if _, ok := d.(HealthChecker); ok {
		abilities = append(abilities, AbilityHealth)
	}
	if _, ok := d.(LogReader); ok {
		abilities = append(abilities, AbilityLogs)
	}
	if _, ok := d.(Watcher); ok {
		abilities = append(abilities, AbilityWatch)
	}
	return abilities
}

// Watcher is implemented by drivers that notice when a sandbox changes, so that
// the host learns of it before its next check.
type Watcher interface {
	// Watch calls changed, one call at a time, for each sandbox whose state
	// changes, until ctx ends. A change may be reported twice, and one may be
	// missed. It returns ctx's error.
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
	// Configure is called once, after Info and before any other method. It takes
	// ten seconds at most. If the configuration is wrong, it returns ErrInvalid
	// with the reason. What the driver depends on need not be reachable yet.
	Configure(ctx context.Context, config Config) error
}

// Config is the configuration of a driver.
type Config struct {
	// Instance is the ID of the Bivouac instance, 1 to 64 bytes of a-z, 0-9 and
	// '-'. Several instances may share a machine or a container engine. So the
	// driver marks what it makes with the ID, and lists only what has that mark.
	Instance string
	// JSON is an object that matches the driver's ConfigSchema, at least "{}".
	JSON json.RawMessage
	// DropMarks is true if no earlier call of this instance is still running. The
	// driver may then remove all marks of used session IDs, which it otherwise
	// removes an hour after the Delete. "bivouac plugin verify" sets it at its end,
	// so that it leaves nothing behind.
	DropMarks bool
}

// LogReader is implemented by drivers that keep the output of their sandboxes.
type LogReader interface {
	// Logs yields the kept output of the sandbox in order. With follow it also
	// yields new output, until the sandbox or ctx ends. The output of a stopped
	// sandbox may be read until it is deleted. Logs ends after the first error,
	// which is ErrNotFound if there is no such sandbox.
	Logs(ctx context.Context, sessionID string, follow bool) iter.Seq2[LogChunk, error]
}

// LogChunk is a piece of a sandbox's output. It may begin and end in the middle of
// a line.
type LogChunk struct {
	Stream LogStream
	Data   []byte // valid until the next chunk
}

// LogStream is the name of an output stream.
type LogStream string

// The streams. A driver that cannot tell them apart uses Stdout.
const (
	Stdout LogStream = "stdout"
	Stderr LogStream = "stderr"
)

// Execer is implemented by drivers that can run a command inside a sandbox.
type Execer interface {
	// Exec runs a command in a running sandbox, without a shell, and returns its
	// exit code once it has ended. The exit code is 128 plus the signal number if
	// a signal ended the command. When ctx ends, Exec kills the command. It returns
	// ErrNotFound if there is no such sandbox, ErrNotReady if the sandbox does not
	// run, and ErrInvalid if there is no such command.
	Exec(ctx context.Context, sessionID string, command []string, stdio Stdio) (int, error)
}

// Stdio is a command's input and output. A nil reader is empty, and a nil writer
// discards. Exec does not wait for the end of Stdin after the command has ended.
// It may return while a Read is still blocked, and the data of that Read is lost.
type Stdio struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
}
