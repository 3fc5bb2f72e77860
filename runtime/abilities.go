package runtime

import (
	"context"
	"encoding/json"
	"io"
	"iter"
	"slices"
)

// Ability names something that a driver may do beyond [Driver]. In Go an
// ability is a small interface that the driver implements; where a driver is
// reached over a wire, it is a name that the driver declares.
type Ability string

// The abilities, each with its interface.
const (
	AbilityConfigure Ability = "configure" // Configurer
	AbilityExec      Ability = "exec"      // Execer
	AbilityHealth    Ability = "health"    // HealthChecker
	AbilityLogs      Ability = "logs"      // LogReader
	AbilityWatch     Ability = "watch"     // Watcher
)

// Abilities returns what a driver can do beyond Driver, sorted: what its Info
// declares, or else what the driver's methods show.
//
// A driver that stands for another one, as that of a plugin does, has the
// methods of every ability and declares those that work. The others return an
// error that wraps [errors.ErrUnsupported], except for two that have a truthful
// answer without it: Watch reports nothing until its context ends, and Health
// tells of the driver alone.
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

// Watcher is implemented by drivers that notice by themselves when a sandbox
// changes, so that the host need not wait for its next look at it.
type Watcher interface {
	// Watch calls changed, one call at a time, for each sandbox whose state
	// changes, until ctx ends. A change may be reported twice, and one may be
	// missed. It returns ctx's error.
	Watch(ctx context.Context, changed func(Sandbox)) error
}

// HealthChecker is implemented by drivers that depend on something which can
// be out of reach.
type HealthChecker interface {
	// Health returns nil where a Create could be tried, and else what is
	// missing.
	Health(ctx context.Context) error
}

// ChatFinder is implemented by drivers that can name the sandboxes of one chat
// at once, without listing all. With it a create finds a sandbox whose record was
// lost, and starts no second one. For other drivers a create relies on the record.
// It is for drivers in Go that are part of the host: a plugin's is not asked.
type ChatFinder interface {
	// FindChat returns the sandboxes of a chat that are not dead, apart from that
	// of the session except, which may be empty. Callers wait on it at each create,
	// so it should take a millisecond at most where there is none. Of one that
	// there is it says what is so now, and not what was seen before: the host may
	// hand that sandbox out.
	FindChat(ctx context.Context, chatID, except string) ([]Sandbox, error)
}

// Prober is implemented by drivers that can ask a sandbox itself whether it
// still serves.
type Prober interface {
	// Answers says whether the session's sandbox answers at endpoint now. It is
	// asked about a sandbox that the driver no longer knows, and takes a few
	// seconds at most. An error means that nobody can tell.
	Answers(ctx context.Context, sessionID string, endpoint Endpoint) (bool, error)
}

// Configurer is implemented by drivers that are configured while they run, as
// plugins are. It is the only way by which a plugin learns the instance.
type Configurer interface {
	// Configure is called once, after Info and before any other method. It
	// returns ErrInvalid if the configuration is wrong, saying what, and takes
	// ten seconds at most. The host checks nothing before, so Configure also
	// refuses keys that it does not know. What the driver depends on need not be
	// in reach yet.
	//
	// "bivouac config validate" calls it too, with the instance
	// "config-validate", and ends the plugin after that.
	Configure(ctx context.Context, config Config) error
}

// Config is what a driver is told at its start.
type Config struct {
	// Instance is the name of this Bivouac; see [ValidName].
	// Where several share a machine or an engine, the driver marks what it
	// makes with the name, and lists only what bears it.
	Instance string
	// JSON is an object, "{}" at least.
	JSON json.RawMessage
	// DropMarks says that no earlier call of this instance is under way any
	// more. The driver may then remove all that marks session IDs as used, as it
	// otherwise does an hour after the Delete. "bivouac plugin verify" says so
	// when it is done, so that nothing is left of it.
	DropMarks bool
}

// LogReader is implemented by drivers that keep what a sandbox prints.
type LogReader interface {
	// Logs yields what the sandbox has printed, as far as it is kept, in
	// order; with follow also what it prints from then on, until it ends or
	// ctx does. A stopped sandbox that is not deleted may still be read. It
	// ends after the first error, ErrNotFound where there is no such sandbox.
	Logs(ctx context.Context, sessionID string, follow bool) iter.Seq2[LogChunk, error]
}

// LogChunk is a piece of what a sandbox printed. It may begin and end anywhere
// in a line.
type LogChunk struct {
	Stream LogStream
	Data   []byte // valid until the next chunk
}

// LogStream is where something was printed to.
type LogStream string

// The streams. A driver that cannot tell them apart uses Stdout.
const (
	Stdout LogStream = "stdout"
	Stderr LogStream = "stderr"
)

// Execer is implemented by drivers that can run a command inside a sandbox.
type Execer interface {
	// Exec runs a command, given as its arguments and without a shell, in a
	// running sandbox, and returns its exit code once it has ended: 128 plus
	// the signal's number where a signal ended it. When ctx ends the command
	// is killed. It returns ErrNotFound where there is no such sandbox,
	// ErrNotReady where it does not run, and ErrInvalid where there is no such
	// command.
	Exec(ctx context.Context, sessionID string, command []string, stdio Stdio) (int, error)
}

// Stdio is a command's input and output. A nil reader is empty, a nil writer
// discards. Exec does not wait for the end of Stdin once the command has ended:
// it may return while a Read is still blocked, and what that one reads is lost.
type Stdio struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
}
