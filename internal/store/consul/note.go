package consul

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/scheduler"
)

// maxChanges bounds the changes of one transaction.
const maxChanges = 8

// note is the changes of one transaction, on their way to Consul.
type note struct {
	id    string   // of the write
	value []byte   // nil: there are no changes
	tried []string // keys that a try may have written
}

// storedChange is a change as it is stored in Consul. Its index is that of its key.
type storedChange struct {
	Type      scheduler.ChangeType `json:"type"`
	Time      time.Time            `json:"time"`
	Pool      string               `json:"pool,omitempty"`
	ChatID    uuid.UUID            `json:"chat_id"`
	SessionID uuid.UUID            `json:"session_id"`
	AgentID   string               `json:"agent_id"`
	Runtime   string               `json:"runtime"`
	Reason    string               `json:"reason,omitempty"`
	Caller    string               `json:"caller,omitempty"`
	RequestID string               `json:"request_id,omitempty"`
}

func newNote(id string, changes []scheduler.Change) (note, error) {
	if len(changes) == 0 {
		return note{}, nil
	}
	if len(changes) > maxChanges {
		return note{}, fmt.Errorf("%w: %d changes in one write; the limit is %d", scheduler.ErrInvalid, len(changes), maxChanges)
	}
	stored := make([]storedChange, len(changes))
	for i, c := range changes {
		c = c.Plain()
		stored[i] = storedChange{c.Type, c.Time, c.Pool, c.ChatID, c.SessionID, c.AgentID, c.Runtime, c.Reason, c.Caller, c.RequestID}
	}
	value, err := json.Marshal(stored)
	if err != nil {
		return note{}, fmt.Errorf("%w: %w", scheduler.ErrInvalid, err)
	}
	return note{id: id, value: value}, nil
}

// isIn reports whether one of the keys that were tried exists.
func (n *note) isIn(pairs []*api.KVPair) bool {
	return slices.ContainsFunc(pairs, func(pair *api.KVPair) bool {
		return pair.ModifyIndex != 0 && slices.Contains(n.tried, pair.Key)
	})
}

// changesIn returns the changes that a key holds.
func changesIn(pair *api.KVPair) ([]scheduler.Change, error) {
	var stored []storedChange
	if err := json.Unmarshal(pair.Value, &stored); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", scheduler.ErrDamaged, pair.Key, err)
	}
	changes := make([]scheduler.Change, len(stored))
	for i, c := range stored {
		changes[i] = scheduler.Change{
			Index: pair.ModifyIndex, Type: c.Type, Time: c.Time.UTC(), Pool: c.Pool, ChatID: c.ChatID, SessionID: c.SessionID,
			AgentID: c.AgentID, Runtime: c.Runtime, Reason: c.Reason, Caller: c.Caller, RequestID: c.RequestID,
		}
	}
	return changes, nil
}
