package consul

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/internal/backoff"
)

const (
	// accessEvery is how long the result of a check of the token's rights is kept.
	accessEvery = 10 * time.Second
	// probeName is the name of the key that the check writes to every folder and
	// deletes in the same transaction.
	probeName = "probe"
)

// access is the result of the last check of the Consul token's rights.
type access struct {
	turn chan struct{} // contains a value while no check runs
	at   time.Time
	err  error
}

func newAccess() access {
	a := access{turn: make(chan struct{}, 1)}
	a.turn <- struct{}{}
	return a
}

// watchAccess checks the token's rights at once and then every minute, until ctx
// ends, and logs if they do not suffice.
func (s *Store) watchAccess(ctx context.Context) {
	for {
		if err := s.checkAccess(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("consul_access_failed", "error", err)
		}
		if backoff.Sleep(ctx, tellEvery) != nil {
			return
		}
	}
}

// checkAccess returns an error if the Consul token may not write, read and list
// keys. It asks Consul at most every 10 seconds.
func (s *Store) checkAccess(ctx context.Context) error {
	a := &s.access
	select {
	case <-a.turn:
		defer func() { a.turn <- struct{}{} }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if !a.at.IsZero() && time.Since(a.at) < accessEvery {
		return a.err
	}
	err := s.tryAccess(ctx)
	if ctx.Err() == nil {
		a.at, a.err = time.Now(), err
	}
	return err
}

// tryAccess writes a key to every folder, reads it back and deletes it, in one
// transaction. It must read the key back to prove the right to read, because Consul
// silently leaves out of an answer what a token may not read.
func (s *Store) tryAccess(ctx context.Context) error {
	var ops []*api.KVTxnOp
	for _, folder := range s.keys.folders() {
		key := folder + probeName
		ops = append(ops,
			&api.KVTxnOp{Verb: api.KVSet, Key: key, Value: []byte("written and deleted by health checks")},
			&api.KVTxnOp{Verb: api.KVGetTree, Key: key},
			&api.KVTxnOp{Verb: api.KVDelete, Key: key})
	}
	pairs, err := s.retryTxn(ctx, ops...)
	if err != nil {
		return fmt.Errorf("write, read and list keys below %s: %w", s.keys, err)
	}
	var read []string
	for _, pair := range pairs {
		if len(pair.Value) > 0 { // the answer to a write has no value
			read = append(read, pair.Key)
		}
	}
	if len(read) < len(s.keys.folders()) {
		return unavailable("", fmt.Errorf("%w: below %s it may read and list only %s",
			errFiltered, s.keys, strings.Join(read, ", ")))
	}
	return nil
}
