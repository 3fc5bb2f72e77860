package consul

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/consul/api"
)

// Replica describes a replica that runs.
type Replica struct {
	Name      string    `json:"name"` // of its machine
	Version   string    `json:"version"`
	Addresses []string  `json:"addresses"` // that its API listens on
	StartedAt time.Time `json:"started_at"`
}

// register writes this replica's key, unless it was written to the store with this identity
// before. It returns the index of the identity, or 0 if it failed. It tries once, because it
// is called after each renewal.
func (k *sessionKeeper) register(ctx context.Context, h *heldSession, before uint64) uint64 {
	check := k.store.identity.unmoved()
	if check.Index == before {
		return before
	}
	ctx, cancel := context.WithTimeout(ctx, renewTimeout/2) // the next renewal must not wait
	defer cancel()
	value, err := json.Marshal(k.self)
	if err == nil { // the key exists as long as the session
		_, err = k.store.txn(ctx, check, &api.KVTxnOp{Verb: api.KVLock, Key: k.store.keys.replicas() + h.session, Value: value, Session: h.session})
	}
	if err != nil {
		k.store.log.Debug("replica_not_registered", "session", h.session, "error", err)
		return 0
	}
	return check.Index
}

// Replicas returns the replicas that run, those that began first at the beginning. A
// replica that was killed or cut off is left out after 10 to 20 seconds.
func (s *Store) Replicas(ctx context.Context) ([]Replica, error) {
	if err := s.identity.stands(ctx); err != nil {
		return nil, fmt.Errorf("consul: list replicas: %w", err)
	}
	pairs, err := s.retryTxn(ctx, &api.KVTxnOp{Verb: api.KVGetTree, Key: s.keys.replicas()})
	if err != nil {
		return nil, fmt.Errorf("consul: list replicas: %w", err)
	}
	var replicas []Replica
	for _, pair := range pairs {
		var r Replica
		if pair.Session == "" || json.Unmarshal(pair.Value, &r) != nil {
			continue // written by hand
		}
		replicas = append(replicas, r)
	}
	slices.SortFunc(replicas, func(a, b Replica) int {
		return cmp.Or(a.StartedAt.Compare(b.StartedAt), cmp.Compare(a.Name, b.Name))
	})
	return replicas, nil
}
