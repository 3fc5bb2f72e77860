// Package nodeapi is how a runtime driver calls the node helper: the orders as JSON, and
// a client.
//
// The helper, "bivouac node", runs on each node that has sandboxes. [New] returns a
// [Client]. Bind and Look send one [Order] each, and Bound reads those that were carried
// out.
//
// The package does not find helpers, and does not retry.
package nodeapi

import (
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/bivouac/bivouac/runtime"
)

// The names of the helper in Nomad and in certificates.
const (
	// Service is the name of the helper's service in Nomad.
	Service = "bivouac-node"
	// ServerName is the DNS name that the certificate of a helper must have. It is the same
	// on all nodes, because their addresses change.
	ServerName = "node.bivouac"
	// ClientName is the DNS name that the client certificate of a Bivouac server must have
	// unless the helper is configured with another one.
	ClientName = "server.bivouac"
)

// Where a claimed sandbox finds its session.
const (
	// SessionDir is the folder that has the file in a sandbox of docker and exec.
	SessionDir = "/run/bivouac"
	// SandboxesDir has a folder for each claimed sandbox of raw_exec on the node, named by
	// the session ID. It contains the file, and the symbolic link "workspace".
	SandboxesDir = "/run/bivouac/sandboxes"
	// SessionFile is the name of the file, which contains a [runtime.SessionFile] as JSON.
	SessionFile = "session.json"
	// Workspace is the name of the symbolic link to the volume of a sandbox of raw_exec.
	Workspace = "workspace"
)

// The task drivers that the helper knows.
const (
	Docker  = "docker"
	Exec    = "exec"
	RawExec = "raw_exec"
)

// The paths of the helper's API. Orders are sent with POST, and the others are read with
// GET. PathBound has the query parameter "known", with a Version.
const (
	PathBind  = "/v1/bind"
	PathLook  = "/v1/look"
	PathBound = "/v1/bound"
	PathLive  = "/v1/live"
)

const (
	// MaxBody is the maximum size of an order and of the answer to it, in bytes. The largest
	// valid order is smaller, even with every byte escaped.
	MaxBody = 256 << 10
	// MaxBound is the maximum size of a [Bound] as JSON, in bytes. Usually an order in it has
	// less than 1 KB.
	MaxBound = 32 << 20
	// BoundWait is how long a helper holds back a Bound that would tell nothing new.
	BoundWait = 30 * time.Second
)

const (
	maxTask = 256      // bytes
	maxNote = 64 << 10 // bytes
)

// Order names a sandbox that runs on the helper's node, and for a bind also what to bind
// to it. [Order.ValidateLook] and [Order.ValidateBind] check it.
type Order struct {
	SessionID      string `json:"session_id"`                 // UUID
	ChatID         string `json:"chat_id,omitempty"`          // UUID; for a bind
	AgentID        string `json:"agent_id,omitempty"`         // as in a runtime.Spec; for a bind
	VolumeHostPath string `json:"volume_host_path,omitempty"` // as in a runtime.Spec; for a bind
	AllocID        string `json:"alloc_id"`                   // UUID of Nomad's allocation
	Task           string `json:"task"`                       // the task of the allocation that gets the volume
	TaskDriver     string `json:"task_driver"`                // Docker, Exec or RawExec
	// Target is where the volume appears in the sandbox, absolute and clean. For raw_exec
	// it is the symbolic link in SandboxesDir.
	Target string `json:"target"`
	// Note is what the caller wants to read again in a [Bound], at most 64 KiB. It does not
	// matter to the helper. For a bind.
	Note string `json:"note,omitempty"`
}

// Bound is what a helper has bound on its node.
type Bound struct {
	Version string  `json:"version"` // another one if the orders have changed, or if the helper was restarted
	Orders  []Order `json:"orders"`  // those whose sandboxes may still run, in no order; none if the version is the known one
}

// Error is the answer to an order that was not carried out.
type Error struct {
	Message string `json:"error"`
}

// ValidateBind returns what is wrong with an order to bind.
func (o Order) ValidateBind() error {
	spec := runtime.Spec{SessionID: o.SessionID, ChatID: o.ChatID, AgentID: o.AgentID, VolumeHostPath: o.VolumeHostPath}
	var err error
	if len(o.Note) > maxNote {
		err = fmt.Errorf("note has %d bytes, at most %d are allowed", len(o.Note), maxNote)
	}
	return errors.Join(spec.Validate(), err, o.validateSandbox())
}

// ValidateLook returns what is wrong with an order to look. Its chat, AI agent, volume and
// note do not matter.
func (o Order) ValidateLook() error {
	spec := runtime.Spec{SessionID: o.SessionID, Pool: "any"}
	return errors.Join(spec.Validate(), o.validateSandbox())
}

func (o Order) validateSandbox() error {
	// An allocation has a UUID as a session does.
	if (runtime.Spec{SessionID: o.AllocID, Pool: "any"}).Validate() != nil {
		return fmt.Errorf("allocation ID %q is not a UUID in lower case", o.AllocID)
	}
	if o.Task == "" || len(o.Task) > maxTask || strings.ContainsAny(o.Task, "/\x00\n") {
		return fmt.Errorf("task %q must have 1 to %d bytes, and no slash, NUL or line break", o.Task, maxTask)
	}
	// A target has the form of a volume's path.
	if err := runtime.ValidateVolumeHostPath(o.Target); err != nil {
		return fmt.Errorf("target %w", err)
	}
	switch o.TaskDriver {
	case Docker, Exec:
		if o.Target == "/" || contains(o.Target, SessionDir) || contains(SessionDir, o.Target) {
			return fmt.Errorf("target %q must be neither /, nor %s, nor above or below it", o.Target, SessionDir)
		}
	case RawExec:
		if want := path.Join(SandboxesDir, o.SessionID, Workspace); o.Target != want {
			return fmt.Errorf("target %q must be %s", o.Target, want)
		}
	default:
		return fmt.Errorf("unknown task driver %q (available: %s, %s, %s)", o.TaskDriver, Docker, Exec, RawExec)
	}
	return nil
}

// contains reports whether p is folder or below it. Both are clean.
func contains(folder, p string) bool { return p == folder || strings.HasPrefix(p, folder+"/") }
