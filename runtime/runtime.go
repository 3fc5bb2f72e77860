// Package runtime is the contract between Bivouac and what runs sandboxes: a
// [Driver] creates, stops, deletes, inspects and lists them.
//
// The package imports the standard library alone and must never know of the
// scheduler, of Nomad or of Consul, so that a driver's author builds against
// nothing but this.
//
// # Identity
//
// A sandbox is named by the ID of the session that it serves. The host makes a
// fresh session ID for each sandbox and never uses one twice, so a call that
// arrives late can only ever concern the sandbox that it was meant for.
//
// # What the host promises
//
// For one session ID the host makes one call at a time, except for Inspect,
// except after a call whose context ended, which may still be on its way out of
// the driver when the next one comes, and except after a crash: then a Stop or
// Delete from another replica may overtake a Create that is still under way. After a Create that failed, in
// whatever way, the host calls Delete with the same ID, and repeats it until it
// succeeds; a driver need not undo by itself what it began.
//
// A session ID that Stop or Delete was called for is used up. A driver refuses a
// Create with it for as long as such a call may be under way. The host's limit
// for a call is some minutes, so an hour after the Delete is enough; then what
// marks the ID as used may go.
//
// # Interruptions
//
// A sandbox lives on its own: it outlasts its driver's process and the host's.
// After a restart of either, Inspect and List find it again, and Stop and
// Delete end it. Where the driver dies in the middle of a Create, a later Delete
// with the same ID must leave nothing of it, and a repeat of the Create must
// not make a second sandbox. So a driver finds its sandboxes by a mark that they
// bear from their first moment, not by a memory of its own.
//
// When ctx ends, a method returns soon, within a second. What it began it may
// leave as it is, for the Delete that follows.
//
// # Time
//
// Info and Inspect answer within 10 seconds, Configure and Health too, and
// between one sandbox of List and the next lies no more. A host may give up on
// a driver that takes longer. Create, Stop and Delete take what they need: their
// context carries the host's limit, of some minutes.
//
// # Compatibility
//
// Within a major version of Bivouac methods are not added to Driver and fields
// are not removed from its structs. New abilities come as new small interfaces
// that a driver may implement, found by type assertion, as [Watcher] is; see
// [Ability]. Fields may be added to structs, and values to [State], [Stage] and
// [Ability]: a driver passes over those that it does not know.
package runtime

import (
	"context"
	"encoding/json"
	"iter"
	"net/netip"
	"time"
)

// Driver runs sandboxes. Its methods are called concurrently for different
// sessions. Errors wrap one of the package's Err values; an error that wraps
// none of them is taken for [ErrUnavailable].
type Driver interface {
	// Info says who the driver is. It answers from memory.
	Info(ctx context.Context) (Info, error)

	// Create starts the sandbox that spec describes and returns once it is
	// ready: its endpoint answers, and it is this sandbox that answers.
	// progress is told each [Stage] as it is reached; it is never nil and
	// returns at once.
	//
	// Repeated with the same spec it returns the sandbox that stands. For a
	// session ID that was created with another spec, or that Stop or Delete
	// was called for, it returns ErrConflict. It returns ErrNotPlaced where
	// there is no room, ErrNotReady where the sandbox failed or did not
	// answer in time, ErrInvalid where the spec can never work, and the
	// context's error where ctx ended.
	Create(ctx context.Context, spec Spec, progress func(Stage)) (Sandbox, error)

	// Stop ends the sandbox and returns once nothing of it runs, seen and not
	// assumed. It succeeds for a sandbox that is stopped already and for a
	// session ID that it has never seen; in each case a Create with this ID
	// that arrives later must fail with ErrConflict. A stopped sandbox may
	// still be inspected, for its reason. If the sandbox is seen to run on
	// until ctx ends, Stop returns ErrNotStopped with what it waits for, and
	// if it cannot be known whether something runs, ErrUnavailable. Either way
	// the host calls again later.
	Stop(ctx context.Context, sessionID string) error

	// Delete does as Stop does, and then removes what is left.
	Delete(ctx context.Context, sessionID string) error

	// Inspect tells how the sandbox stands, ErrNotFound where there is none.
	// Callers wait on it at each reuse, so it should take a millisecond at most.
	Inspect(ctx context.Context, sessionID string) (Sandbox, error)

	// List yields the sandboxes of this driver and this Bivouac, stopped ones
	// that are not yet deleted included, in no order. It ends after the first
	// error. Sandboxes that somebody else made are not listed.
	List(ctx context.Context) iter.Seq2[Sandbox, error]
}

// Info describes a driver.
type Info struct {
	Name    string // as in a session's runtime: see [ValidName]
	Version string // at most 64 bytes

	// Abilities is what a plugin has declared, for people. A driver leaves it
	// nil: its methods show what it can do.
	Abilities []Ability

	// ConfigSchema is a JSON Schema of the configuration that Configure takes.
	// It is optional and for people: "bivouac plugin inspect" shows it.
	ConfigSchema json.RawMessage
}

// Spec is what a sandbox is made from. [Spec.Validate] holds what the comments say.
type Spec struct {
	SessionID      string // UUID, fresh for each sandbox
	ChatID         string // UUID
	AgentID        string // 1 to 256 bytes of UTF-8, no control characters, no "${" and "%{"
	VolumeHostPath string // absolute and clean, at most 4096 bytes of UTF-8, else as AgentID
	CreatedAt      time.Time
	ExpiresAt      time.Time // as planned at creation: the host may extend it and is the one who ends it
}

// Stage is a step on the way to a ready sandbox.
type Stage string

// The stages, in their order. A driver may skip one that it cannot see.
const (
	StagePlaced  Stage = "placed"  // it is decided where the sandbox runs
	StageStarted Stage = "started" // its process runs
	StageReady   Stage = "ready"   // its endpoint answers
)

// State says how a sandbox stands.
type State string

// The states. A driver that cannot tell whether a sandbox runs says lost.
const (
	StateStarting State = "starting" // on its way, not ready yet
	StateRunning  State = "running"  // it runs; whether it was ever ready, its Create has said
	StateDead     State = "dead"     // nothing of it runs: seen, not assumed
	StateLost     State = "lost"     // out of reach: it may run or not
)

// Sandbox is one sandbox as its driver sees it.
type Sandbox struct {
	SessionID   string
	ChatID      string
	ContainerID string   // the driver's own name of it; on Nomad the allocation ID
	Endpoint    Endpoint // zero until it is known
	State       State
	Reason      string // why it is dead or lost, in words for a person

	// What the sandbox was created for, as its Spec said. A driver that does not
	// keep this leaves it zero; then the host cannot make a record of a sandbox
	// that has none.
	AgentID        string
	VolumeHostPath string
	CreatedAt      time.Time
	ExpiresAt      time.Time // as planned at creation

	// RegisteredAt is when the runtime took the sandbox on, by the runtime's own
	// clock. It is zero if the driver does not know. A sandbox that was taken on
	// long after CreatedAt was started by a request that came late.
	RegisteredAt time.Time
}

// Endpoint is where a sandbox's port can be reached.
type Endpoint struct {
	IP   netip.Addr `json:"ip"`
	Port uint16     `json:"port"`
}

// IsValid says whether there is both an address and a port.
func (e Endpoint) IsValid() bool { return e.IP.IsValid() && e.Port != 0 }

// AddrPort returns e as the net packages write it.
func (e Endpoint) AddrPort() netip.AddrPort { return netip.AddrPortFrom(e.IP, e.Port) }
