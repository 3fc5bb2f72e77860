package runtime

import (
	"context"
	"encoding/json"
	"iter"
)

// Ability names something that a driver may do beyond [Driver], as a plugin
// declares it. In Go an ability is a small interface that the driver implements:
// a caller finds it by type assertion. A driver that stands for another one, as
// that of a plugin does, has all of these methods. Those that do not work return
// an error that wraps [errors.ErrUnsupported], but Health, which then tells of
// the driver alone.
type Ability string

// The abilities, each with its interface.
const (
	AbilityConfigure Ability = "configure" // Configurer
	AbilityHealth    Ability = "health"    // HealthChecker
	AbilityLogs      Ability = "logs"      // LogReader
	AbilityWatch     Ability = "watch"     // Watcher
)

// Watcher is implemented by drivers that notice by themselves when a sandbox
// changes, so that the host need not wait for its next look at it.
type Watcher interface {
	// Watch calls changed, one call at a time, for each sandbox whose state
	// changes, until ctx ends. A change may be reported twice, and one may be
	// missed. It returns ctx's error, or at once one that wraps
	// [errors.ErrUnsupported].
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
