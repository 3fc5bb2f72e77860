package scheduler

import (
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

// Session is the record of a chat's one sandbox.
type Session struct {
	SessionID      uuid.UUID
	ChatID         uuid.UUID
	AgentID        string
	VolumeHostPath string
	Runtime        string // name of the driver that runs it
	ContainerID    string // the driver's name of the sandbox; empty while creating
	Endpoint       runtime.Endpoint
	CreatedAt      time.Time
	ExpiresAt      time.Time
	State          State
	Reason         string // why it is, or was before its stop, dead or lost, or what its stop waits for; else empty

	Owner  string            // name of the caller that created it
	Labels map[string]string // as the create gave them; never changed in place; may be nil
}

// State says how far a session is.
type State string

const (
	// StateCreating is an intent: a sandbox may exist or not. It becomes a
	// session once its sandbox is ready, and disappears if that fails.
	StateCreating State = "creating"
	// StateRunning is a session whose sandbox was ready and, as far as is
	// known, still runs.
	StateRunning State = "running"
	// StateStopping is a session whose sandbox is being stopped, after which
	// the record goes, or makes way for the next session.
	StateStopping State = "stopping"
	// StateDead is a session whose sandbox ended by itself or by another's
	// hand; Reason says how.
	StateDead State = "dead"
	// StateLost is a session whose sandbox is out of reach: it may run or not.
	StateLost State = "lost"
)

// Settled says whether the session was handed out and nobody is at work on it:
// neither an intent nor being stopped.
func (s Session) Settled() bool {
	return s.State != StateCreating && s.State != StateStopping
}

// Expired says whether the session has ended by time: at its expiry, not after.
func (s Session) Expired(now time.Time) bool { return !s.ExpiresAt.After(now) }

func (s Session) spec() runtime.Spec {
	return runtime.Spec{
		SessionID:      s.SessionID.String(),
		ChatID:         s.ChatID.String(),
		AgentID:        s.AgentID,
		VolumeHostPath: s.VolumeHostPath,
		CreatedAt:      s.CreatedAt,
		ExpiresAt:      s.ExpiresAt,
		Owner:          s.Owner,
		Labels:         s.Labels,
	}
}
