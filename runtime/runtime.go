// Package runtime is the contract between Bivouac and the drivers that run
// sandboxes. A [Driver] creates, stops, deletes, inspects and lists sandboxes.
//
// The package imports only the standard library, so the author of a driver needs
// nothing else. It does not know the scheduler, Nomad or Consul.
//
// # Identity
//
// A sandbox has the ID of the session that it serves. The host makes a fresh
// session ID for each sandbox and never uses one twice. So a call that arrives
// late can only affect the sandbox that it was meant for.
//
// # What the host promises
//
// The host makes one call at a time per session ID, with three exceptions: Inspect
// may run at any time; a call whose context ended may still be returning; and
// after a crash another replica's Stop or Delete may overtake a Create. After a
// failed Create, whatever the error, the host calls Delete with the same ID and
// repeats it until it succeeds. So a driver need not undo what it began.
//
// A session ID is used up once Stop or Delete was called for it. A driver must
// refuse a Create with that ID for as long as such a call may be running. The
// host's limit for a call is some minutes, so an hour after the Delete is enough;
// then the driver may remove its mark of the used ID.
//
// # Interruptions
//
// A sandbox outlives the process of its driver and of the host. After a restart of
// either, Inspect and List find it again, and Stop and Delete end it. If the driver
// dies during a Create, a later Delete with the same ID must leave nothing of it,
// and a repeated Create must not make a second sandbox. So a driver must find its
// sandboxes by a mark that they have from the start, not by its own memory.
//
// When ctx ends, a method returns within a second. It may leave what it began to
// the Delete that follows.
//
// # Time
//
// Info, Inspect, Configure and Health answer within 10 seconds, and List yields
// each sandbox within 10 seconds of the one before. The host may give up on a
// driver that takes longer. Create, Stop and Delete take as long as they need;
// their context has the host's limit of some minutes.
//
// # Compatibility
//
// Within a major version of Bivouac no methods are added to Driver, and no fields
// are removed from its structs. New abilities come as small interfaces that a
// driver may implement, such as [Watcher]; see [Ability]. Fields may be added to
// structs, and values to [State], [Stage] and [Ability]. A driver ignores those
// that it does not know.
package runtime

import (
	"context"
	"encoding/json"
	"iter"
	"net/netip"
	"time"
)

// Driver runs sandboxes. Its methods are called concurrently for different
// sessions. Errors wrap one of the package's Err values. The host treats an error
// that wraps none of them as [ErrUnavailable].
type Driver interface {
	// Info describes the driver. It answers from memory.
	Info(ctx context.Context) (Info, error)

	// Create starts the sandbox that spec describes. It returns once the sandbox is
	// ready: its endpoint answers, and it is this sandbox that answers. Create calls
	// progress with each [Stage] as it is reached. progress is never nil and returns
	// at once.
	//
	// A repeated Create with the same spec returns the existing sandbox. Create
	// returns ErrConflict if the session ID was created with another spec or if Stop
	// or Delete was called for it, ErrNotPlaced if there is no room, ErrNotReady if
	// the sandbox failed or did not answer in time, ErrInvalid if the spec can never
	// work, and the context's error if ctx ended.
	Create(ctx context.Context, spec Spec, progress func(Stage)) (Sandbox, error)

	// Stop ends the sandbox and returns once the driver has seen, not assumed, that
	// nothing of it runs. It also succeeds for a sandbox that is already stopped and
	// for an unknown session ID. In each case a later Create with this ID must fail
	// with ErrConflict. A stopped sandbox may still be inspected for its reason.
	//
	// If the sandbox is seen to run until ctx ends, Stop returns ErrNotStopped and
	// says what it waits for. If it cannot be known whether something runs, Stop
	// returns ErrUnavailable. In both cases the host calls Stop again later.
	Stop(ctx context.Context, sessionID string) error

	// Delete stops the sandbox as Stop does, and then removes what is left of it.
	Delete(ctx context.Context, sessionID string) error

	// Inspect returns the sandbox as it is now, or ErrNotFound if there is none. A
	// caller waits for it at each reuse, so it should take at most a millisecond.
	Inspect(ctx context.Context, sessionID string) (Sandbox, error)

	// List yields the sandboxes of this driver and this Bivouac instance in no
	// order, including stopped ones that are not yet deleted. It ends after the
	// first error. It does not yield sandboxes that somebody else made.
	List(ctx context.Context) iter.Seq2[Sandbox, error]
}

// Info describes a driver.
type Info struct {
	Name    string // the runtime of a session; see [ValidName]
	Version string // at most 64 bytes

	// Abilities is what a plugin declares, to be shown to people. A driver leaves
	// it nil: its methods show what it can do.
	Abilities []Ability

	// Variant names what a [Claimer] makes spares from, such as a hash of its
	// configuration: at most 64 bytes of printable ASCII. The host gives out only
	// spares of the current variant, and ends others. That of a [Configurer] is read
	// after Configure.
	Variant string

	// ConfigSchema is a JSON Schema of the configuration that Configure takes. It
	// is optional: "bivouac plugin inspect" shows it.
	ConfigSchema json.RawMessage
}

// Spec describes the sandbox to create. [Spec.Validate] checks its limits.
type Spec struct {
	SessionID      string // UUID, fresh for each sandbox
	ChatID         string // UUID
	AgentID        string // 1 to 256 bytes of UTF-8, no control characters, no "${" and "%{"
	VolumeHostPath string // absolute and clean, at most 4096 bytes of UTF-8, else as AgentID
	CreatedAt      time.Time
	ExpiresAt      time.Time // as planned at creation; the host may extend it, and the host ends the sandbox

	// Pool is set in the spec of a spare, which only a [Claimer] gets: a sandbox that
	// is started before a chat needs it. A spare has no chat, AI agent or volume.
	Pool string // see ValidName

	// Owner and Labels describe the session and do not change what runs. A driver
	// that keeps them returns them in its Sandbox.
	Owner  string            // name of the caller that created the session
	Labels map[string]string // never changed in place; may be nil

	// AccessToken is the secret of this sandbox: 64 hexadecimal digits, or empty if the
	// session has none. The sandbox must find it in its environment as
	// BIVOUAC_ACCESS_TOKEN, so that it can refuse requests without it. A driver must not
	// log it or store it where others can read it. JSON leaves it out; a repeated Create
	// brings it again.
	AccessToken Secret `json:"-"`
}

// Stage is a step on the way to a ready sandbox.
type Stage string

// The stages, in order. A driver may skip one that it cannot see.
const (
	StagePlaced  Stage = "placed"  // a place for the sandbox has been found
	StageStarted Stage = "started" // its process runs
	StageReady   Stage = "ready"   // its endpoint answers
)

// State is the state of a sandbox.
type State string

// The states. A driver that cannot know whether a sandbox runs uses StateLost.
const (
	StateStarting State = "starting" // starting, not ready yet
	StateRunning  State = "running"  // running; its Create has reported whether it was ever ready
	StateDead     State = "dead"     // nothing of it runs: seen, not assumed
	StateLost     State = "lost"     // unreachable: it may run or not
)

// Sandbox is one sandbox as its driver sees it.
type Sandbox struct {
	SessionID   string
	ChatID      string
	ContainerID string   // the driver's own name for it; on Nomad the allocation ID
	Endpoint    Endpoint // zero until it is known
	State       State
	// Reason is why it is dead or lost, for a person to read. For a spare that runs, it is why
	// no chat should get it any more, such as that its node is drained, if Inspect knows. The
	// host then ends the spare.
	Reason string

	// These fields repeat the sandbox's Spec. A driver that does not keep them
	// leaves them zero. Then the host cannot write a missing record again.
	AgentID        string
	VolumeHostPath string
	CreatedAt      time.Time
	ExpiresAt      time.Time // as planned at creation
	Owner          string
	Labels         map[string]string

	// Pool is the pool of a spare. It may stay when the spare is claimed. A driver that cannot
	// describe a sandbox anew keeps it then, and leaves ChatID and all from AgentID on empty.
	Pool string

	// RegisteredAt is when the runtime accepted the sandbox, by the runtime's own
	// clock. It is zero if the driver does not know it. If it is long after
	// CreatedAt, a delayed request started the sandbox.
	RegisteredAt time.Time
}

// Endpoint is the address at which a sandbox can be reached.
type Endpoint struct {
	IP   netip.Addr `json:"ip"`
	Port uint16     `json:"port"`
}

// IsValid reports whether e has an address and a port.
func (e Endpoint) IsValid() bool { return e.IP.IsValid() && e.Port != 0 }

// AddrPort returns e as a [netip.AddrPort].
func (e Endpoint) AddrPort() netip.AddrPort { return netip.AddrPortFrom(e.IP, e.Port) }
