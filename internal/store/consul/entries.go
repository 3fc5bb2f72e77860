package consul

import (
	"crypto/rand"
	"maps"
	"slices"

	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/scheduler"
)

// Entries returns the keys and values that a write of a session's record leaves below a
// prefix: the record and its index entries. It is for tools that fill a store before any
// replica uses it, because a write of these keys takes no lock and compares nothing.
// Errors wrap [scheduler.ErrInvalid] if the session cannot be stored.
func Entries(prefix string, session scheduler.Session) (api.KVPairs, error) {
	keys, err := newKeyspace(prefix)
	if err != nil {
		return nil, err
	}
	writeID := rand.Text()
	value, _, err := encodeRecord(session, writeID, nil)
	if err != nil {
		return nil, err
	}
	pairs := api.KVPairs{{Key: keys.record(session.ChatID), Value: value}}
	index := keys.index(&session, writeID)
	for _, key := range slices.Sorted(maps.Keys(index)) {
		pairs = append(pairs, &api.KVPair{Key: key, Value: []byte(index[key])})
	}
	return pairs, nil
}
