package scheduler

import (
	"crypto/rand"
	"encoding/hex"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

// Session is the record of a chat's sandbox. A chat has at most one.
type Session struct {
	SessionID      uuid.UUID
	ChatID         uuid.UUID
	AgentID        string
	VolumeHostPath string
	Runtime        string // name of the driver that runs it
	ContainerID    string // the driver's name for the sandbox; empty while creating
	Endpoint       runtime.Endpoint
	CreatedAt      time.Time
	ExpiresAt      time.Time
	State          State
	Reason         string // why the sandbox is dead or lost (or was before its stop), or what its stop waits for

	Owner  string            // name of the caller that created it
	Labels map[string]string // set by the create, never changed in place; may be nil

	// Warm is true if the sandbox was a spare. Its driver may then report it without a chat.
	Warm bool

	// AccessToken is the secret of the sandbox, for callers that may write to the
	// session. It is empty if the session is older than access tokens or was adopted.
	AccessToken runtime.Secret
}

// newAccessToken returns 32 random bytes as hexadecimal digits. It uses crypto/rand,
// which a simulation can control.
func newAccessToken() runtime.Secret {
	var b [32]byte
	_, _ = rand.Read(b[:]) // it does not fail
	return runtime.Secret(hex.EncodeToString(b[:]))
}

// State is the state of a session.
type State string

const (
	// StateCreating is an intent: a sandbox may exist or not. It becomes a running
	// session once the sandbox is ready, and is removed if that fails.
	StateCreating State = "creating"
	// StateRunning is a session whose sandbox was ready and, as far as is known, still
	// runs.
	StateRunning State = "running"
	// StateStopping is a session whose sandbox is being stopped. Afterwards the record
	// is removed or replaced by the next session.
	StateStopping State = "stopping"
	// StateDead is a session whose sandbox ended by itself or was ended by somebody
	// else. Reason says how.
	StateDead State = "dead"
	// StateLost is a session whose sandbox cannot be reached. It may run or not.
	StateLost State = "lost"
)

// Settled reports whether the session was returned to a caller and no operation is in
// progress: it is neither an intent nor being stopped.
func (s Session) Settled() bool {
	return s.State != StateCreating && s.State != StateStopping
}

// Expired reports whether the session has expired at now. It has from ExpiresAt on.
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
		AccessToken:    s.AccessToken,
	}
}
