package runtime

import (
	"context"
	"encoding/json"
	"iter"
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
	AbilityConfigure Ability = "configure" // Configurer
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
	// Configure is called once, after Info and before any other method. It takes
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
