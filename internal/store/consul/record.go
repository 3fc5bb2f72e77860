package consul

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// recordVersion is raised with any change of the fields below, so that a
// replica never rewrites a record that it does not fully understand.
const recordVersion = 1

// record is a session as it stands in Consul.
type record struct {
	Version        int              `json:"v"`
	Write          string           `json:"write"` // of the write that made it, so that no two values are equal
	SessionID      uuid.UUID        `json:"session_id"`
	ChatID         uuid.UUID        `json:"chat_id"`
	AgentID        string           `json:"agent_id"`
	VolumeHostPath string           `json:"volume_host_path"`
	Runtime        string           `json:"runtime"`
	ContainerID    string           `json:"container_id"`
	Endpoint       runtime.Endpoint `json:"endpoint"`
	CreatedAt      time.Time        `json:"created_at"`
	ExpiresAt      time.Time        `json:"expires_at"`
	State          scheduler.State  `json:"state"`
	Reason         string           `json:"reason"`
}

// encodeRecord returns the value of a session's record, and the session as it
// will be read from it. Errors wrap [scheduler.ErrInvalid].
func encodeRecord(s scheduler.Session, writeID string) ([]byte, *scheduler.Session, error) {
	s.CreatedAt = s.CreatedAt.Round(0).UTC()
	s.ExpiresAt = s.ExpiresAt.Round(0).UTC()
	s.Reason = strings.ToValidUTF8(s.Reason, "\uFFFD") // it may quote what a sandbox printed
	if err := checkSession(s); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", scheduler.ErrInvalid, err)
	}
	value, err := json.Marshal(record{
		Version:        recordVersion,
		Write:          writeID,
		SessionID:      s.SessionID,
		ChatID:         s.ChatID,
		AgentID:        s.AgentID,
		VolumeHostPath: s.VolumeHostPath,
		Runtime:        s.Runtime,
		ContainerID:    s.ContainerID,
		Endpoint:       s.Endpoint,
		CreatedAt:      s.CreatedAt,
		ExpiresAt:      s.ExpiresAt,
		State:          s.State,
		Reason:         s.Reason,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", scheduler.ErrInvalid, err)
	}
	return value, &s, nil
}

// decodeRecord reads the record at key, which is the chat's, and the ID of the
// write that made it. Errors wrap [scheduler.ErrDamaged] and name the key.
func decodeRecord(key string, chatID uuid.UUID, value []byte) (*scheduler.Session, string, error) {
	r, err := parseRecord(value)
	if err == nil && r.ChatID != chatID {
		err = fmt.Errorf("holds chat %s", r.ChatID)
	}
	if err != nil {
		return nil, "", fmt.Errorf("%w: %s: %w", scheduler.ErrDamaged, key, err)
	}
	return &scheduler.Session{
		SessionID:      r.SessionID,
		ChatID:         r.ChatID,
		AgentID:        r.AgentID,
		VolumeHostPath: r.VolumeHostPath,
		Runtime:        r.Runtime,
		ContainerID:    r.ContainerID,
		Endpoint:       r.Endpoint,
		CreatedAt:      r.CreatedAt.UTC(),
		ExpiresAt:      r.ExpiresAt.UTC(),
		State:          r.State,
		Reason:         r.Reason,
	}, r.Write, nil
}

func parseRecord(value []byte) (record, error) {
	// The version says how to read the rest, so it comes first.
	var version struct {
		V int `json:"v"`
	}
	if err := json.Unmarshal(value, &version); err != nil {
		return record{}, err
	}
	if version.V != recordVersion {
		return record{}, fmt.Errorf("schema version %d, this replica knows %d", version.V, recordVersion)
	}

	var r record
	decoder := json.NewDecoder(bytes.NewReader(value))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&r); err != nil {
		return record{}, err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return record{}, errors.New("more than one JSON value")
	}
	return r, checkSession(scheduler.Session{
		SessionID: r.SessionID, ChatID: r.ChatID, AgentID: r.AgentID,
		CreatedAt: r.CreatedAt, ExpiresAt: r.ExpiresAt, State: r.State,
	})
}

// checkSession refuses what could not be found or cleaned up again.
func checkSession(s scheduler.Session) error {
	switch {
	case s.ChatID == uuid.Nil:
		return errors.New("chat_id missing")
	case s.SessionID == uuid.Nil:
		return errors.New("session_id missing")
	case s.AgentID == "":
		return errors.New("agent_id missing")
	case s.CreatedAt.IsZero():
		return errors.New("created_at missing")
	case s.ExpiresAt.IsZero():
		return errors.New("expires_at missing")
	case s.ExpiresAt.UTC().Year() > 9999:
		return errors.New("expires_at after the year 9999")
	case !utf8.ValidString(s.AgentID), !utf8.ValidString(s.VolumeHostPath):
		return errors.New("agent_id or volume_host_path is not UTF-8") // and would come back as another
	}
	switch s.State {
	case scheduler.StateCreating, scheduler.StateRunning, scheduler.StateStopping, scheduler.StateDead, scheduler.StateLost:
		return nil
	default:
		return fmt.Errorf("unknown state %q", s.State)
	}
}
