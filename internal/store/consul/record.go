package consul

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// recordVersion is the version of the records that this replica writes.
//
// A version that adds a field raises it. Older replicas keep the fields that
// they do not know, at the top level and in nested objects, when they rewrite
// the record of the same session. They drop them when another session takes the
// record over.
//
// minReader is the lowest version that may read what this replica writes. Raise
// it to recordVersion if an older replica must not act on a new record: because
// a field changed its meaning, or because a new field would be wrong once
// another field has changed. Older replicas then leave the record alone.
//
// Version 1 had no min_reader, owner, labels and access_token. Replicas of that
// time read nothing but version 1. A record of version 1 becomes one of
// recordVersion with its next write.
//
// Version 2 had no warm. Replicas of that time would take the sandbox of a warm session
// for that of another chat.
const (
	recordVersion = 3
	minReader     = 2
	minWarmReader = 3
)

// record is a session as it is stored in Consul. Empty fields must not be omitted: a
// field that record does not write counts as unknown.
type record struct {
	Version        int               `json:"v"`
	MinReader      int               `json:"min_reader"`
	Write          string            `json:"write"` // ID of the write that made it; makes each value unique
	SessionID      uuid.UUID         `json:"session_id"`
	ChatID         uuid.UUID         `json:"chat_id"`
	AgentID        string            `json:"agent_id"`
	VolumeHostPath string            `json:"volume_host_path"`
	Runtime        string            `json:"runtime"`
	ContainerID    string            `json:"container_id"`
	Endpoint       runtime.Endpoint  `json:"endpoint"`
	CreatedAt      time.Time         `json:"created_at"`
	ExpiresAt      time.Time         `json:"expires_at"`
	State          scheduler.State   `json:"state"`
	Reason         string            `json:"reason"`
	Owner          string            `json:"owner"`
	Labels         map[string]string `json:"labels"`
	AccessToken    string            `json:"access_token"`
	Warm           bool              `json:"warm"`
}

// encodeRecord returns the value of a session's record, and the session as a reader
// will see it. The value includes newer, the fields that a newer version wrote. Errors
// wrap [scheduler.ErrInvalid].
func encodeRecord(s scheduler.Session, writeID string, newer *newerPart) ([]byte, *scheduler.Session, error) {
	s.CreatedAt = s.CreatedAt.Round(0).UTC()
	s.ExpiresAt = s.ExpiresAt.Round(0).UTC()
	s.Reason = strings.ToValidUTF8(s.Reason, "\uFFFD") // it may quote what a sandbox printed
	if err := checkSession(s); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", scheduler.ErrInvalid, err)
	}
	reader := minReader
	if s.Warm {
		reader = minWarmReader
	}
	value, err := newer.addTo(record{
		Version:        recordVersion,
		MinReader:      reader,
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
		Owner:          s.Owner,
		Labels:         s.Labels,
		AccessToken:    string(s.AccessToken),
		Warm:           s.Warm,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", scheduler.ErrInvalid, err)
	}
	return value, &s, nil
}

// decodeRecord returns the session in the record at key, and the ID of the write that
// made the record. The record must be of chatID. Errors wrap [scheduler.ErrDamaged] or
// [scheduler.ErrNewerRecord], and name the key.
func decodeRecord(key string, chatID uuid.UUID, value []byte) (*scheduler.Session, string, error) {
	r, err := parseRecord(value)
	if err == nil && r.ChatID != chatID {
		err = fmt.Errorf("%w: holds chat %s", scheduler.ErrDamaged, r.ChatID)
	}
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", key, err)
	}
	session := r.session()
	return &session, r.Write, nil
}

func (r record) session() scheduler.Session {
	s := scheduler.Session{
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
		Owner:          r.Owner,
		AccessToken:    runtime.Secret(r.AccessToken),
		Warm:           r.Warm,
	}
	if r.Version == 1 {
		s.Owner = scheduler.DefaultOwner
	}
	if len(r.Labels) > 0 {
		s.Labels = r.Labels
	}
	return s
}

func parseRecord(value []byte) (record, error) {
	// Read the versions first: they say whether the rest can be read.
	var version struct {
		V         int `json:"v"`
		MinReader int `json:"min_reader"`
	}
	if err := json.Unmarshal(value, &version); err != nil {
		return record{}, fmt.Errorf("%w: %w", scheduler.ErrDamaged, err)
	}
	switch {
	case version.V < 1:
		return record{}, fmt.Errorf("%w: record version %d", scheduler.ErrDamaged, version.V)
	case version.MinReader > recordVersion:
		return record{}, fmt.Errorf("%w: min_reader is %d, this replica reads up to version %d",
			scheduler.ErrNewerRecord, version.MinReader, recordVersion)
	case version.V > 1 && version.MinReader < 1:
		return record{}, fmt.Errorf("%w: min_reader missing", scheduler.ErrDamaged)
	}

	var r record
	err := json.Unmarshal(value, &r)
	if err == nil {
		err = checkSession(r.session())
	}
	if err != nil {
		return record{}, fmt.Errorf("%w: %w", scheduler.ErrDamaged, err)
	}
	return r, nil
}

// checkSession refuses a session that could not be found or cleaned up again.
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
		return errors.New("agent_id or volume_host_path is not UTF-8") // JSON would change it
	}
	switch s.State {
	case scheduler.StateCreating, scheduler.StateRunning, scheduler.StateStopping, scheduler.StateDead, scheduler.StateLost:
		return nil
	default:
		return fmt.Errorf("unknown state %q", s.State)
	}
}
