package consul

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// storedSpare is a spare as it is stored in Consul. Its version is the ModifyIndex of its
// key.
type storedSpare struct {
	SessionID   uuid.UUID            `json:"session_id"`
	Pool        string               `json:"pool"`
	Runtime     string               `json:"runtime"`
	Variant     string               `json:"variant"`
	State       scheduler.SpareState `json:"state"`
	ContainerID string               `json:"container_id"`
	AccessToken string               `json:"access_token"`
	CreatedAt   time.Time            `json:"created_at"`
}

func encodeSpare(s scheduler.Spare) ([]byte, error) {
	return json.Marshal(storedSpare{
		s.SessionID, s.Pool, s.Runtime, s.Variant, s.State, s.ContainerID, string(s.AccessToken), s.CreatedAt.Round(0).UTC(),
	})
}

func (s *Store) decodeSpare(pair *api.KVPair) (scheduler.Spare, error) {
	var stored storedSpare
	err := json.Unmarshal(pair.Value, &stored)
	if err == nil && s.keys.spare(stored.SessionID) != pair.Key {
		err = fmt.Errorf("holds session %s", stored.SessionID)
	}
	if err != nil {
		return scheduler.Spare{}, fmt.Errorf("%w: %s: %w", scheduler.ErrDamaged, pair.Key, err)
	}
	return scheduler.Spare{
		SessionID: stored.SessionID, Pool: stored.Pool, Runtime: stored.Runtime, Variant: stored.Variant, State: stored.State,
		ContainerID: stored.ContainerID, AccessToken: runtime.Secret(stored.AccessToken), CreatedAt: stored.CreatedAt.UTC(),
		Version: pair.ModifyIndex,
	}, nil
}

// Spares implements [scheduler.Store]. It logs and leaves out a spare that cannot be read.
func (s *Store) Spares(ctx context.Context, block scheduler.Block) ([]scheduler.Spare, uint64, error) {
	spares, index, err := s.listSpares(ctx, block)
	if err != nil {
		return nil, 0, fmt.Errorf("consul: list spares: %w", err)
	}
	return spares, index, nil
}

func (s *Store) listSpares(ctx context.Context, block scheduler.Block) ([]scheduler.Spare, uint64, error) {
	if err := s.identity.stands(ctx); err != nil {
		return nil, 0, err
	}
	pairs, index, err := blockingRead(ctx, block, func(opts *api.QueryOptions) (api.KVPairs, *api.QueryMeta, error) {
		return s.client.KV().List(s.keys.spares(), opts)
	})
	if err != nil {
		return nil, 0, err
	}
	var spares []scheduler.Spare
	for _, pair := range pairs {
		spare, err := s.decodeSpare(pair)
		if err != nil {
			s.log.Warn("spare_skipped", "error", err)
			continue
		}
		spares = append(spares, spare)
	}
	return spares, index, nil
}

// FindSpare implements [scheduler.Store] with one transaction.
func (s *Store) FindSpare(ctx context.Context, sessionID uuid.UUID) (*scheduler.Spare, uuid.UUID, error) {
	spare, chatID, err := s.findSpare(ctx, sessionID)
	if err != nil {
		return nil, uuid.Nil, fmt.Errorf("consul: find spare %s: %w", sessionID, err)
	}
	return spare, chatID, nil
}

func (s *Store) findSpare(ctx context.Context, sessionID uuid.UUID) (*scheduler.Spare, uuid.UUID, error) {
	if err := s.identity.stands(ctx); err != nil {
		return nil, uuid.Nil, err
	}
	key, warm := s.keys.spare(sessionID), s.keys.warmSession(sessionID)
	pairs, err := s.retryTxn(ctx,
		&api.KVTxnOp{Verb: api.KVGetOrEmpty, Key: key},
		&api.KVTxnOp{Verb: api.KVGetTree, Key: warm})
	if err != nil {
		return nil, uuid.Nil, err
	}
	pair, err := pick(pairs, key)
	if err != nil {
		return nil, uuid.Nil, err
	}
	if pair.ModifyIndex != 0 {
		spare, err := s.decodeSpare(pair)
		return &spare, uuid.Nil, err
	}
	for _, pair := range pairs {
		if strings.HasPrefix(pair.Key, warm) {
			chatID, err := chatOf(pair.Key)
			return nil, chatID, err
		}
	}
	return nil, uuid.Nil, nil
}

// PutSpare implements [scheduler.Store].
func (s *Store) PutSpare(ctx context.Context, spare scheduler.Spare) (scheduler.Spare, error) {
	version, err := s.putSpare(ctx, spare)
	if err != nil {
		return scheduler.Spare{}, fmt.Errorf("consul: write spare %s: %w", spare.SessionID, err)
	}
	spare.Version, spare.CreatedAt = version, spare.CreatedAt.Round(0).UTC()
	return spare, nil
}

func (s *Store) putSpare(ctx context.Context, spare scheduler.Spare) (uint64, error) {
	key := s.keys.spare(spare.SessionID)
	value, err := encodeSpare(spare)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", scheduler.ErrInvalid, err)
	}
	pairs, err := s.writeSpare(ctx, &api.KVTxnOp{Verb: api.KVCAS, Key: key, Index: spare.Version, Value: value})
	if err == nil {
		pair, err := pick(pairs, key)
		if err != nil {
			return 0, err
		}
		return pair.ModifyIndex, nil
	}
	if !errors.Is(err, scheduler.ErrSpareTaken) {
		return 0, err
	}
	// It may be taken by a try of this write whose answer was lost.
	pair, _, readErr := s.get(ctx, key, scheduler.Block{})
	switch {
	case readErr != nil:
		return 0, readErr
	case pair != nil && bytes.Equal(pair.Value, value):
		return pair.ModifyIndex, nil
	}
	return 0, err
}

// RemoveSpare implements [scheduler.Store].
func (s *Store) RemoveSpare(ctx context.Context, spare scheduler.Spare) error {
	key := s.keys.spare(spare.SessionID)
	_, err := s.writeSpare(ctx, &api.KVTxnOp{Verb: api.KVDeleteCAS, Key: key, Index: spare.Version})
	if errors.Is(err, scheduler.ErrSpareTaken) {
		pair, _, readErr := s.get(ctx, key, scheduler.Block{})
		if readErr != nil {
			err = readErr
		} else if pair == nil {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("consul: remove spare %s: %w", spare.SessionID, err)
	}
	return nil
}

// writeSpare makes a transaction with one operation. It may be repeated, because the
// operation compares.
func (s *Store) writeSpare(ctx context.Context, op *api.KVTxnOp) ([]*api.KVPair, error) {
	if err := s.identity.stands(ctx); err != nil {
		return nil, err
	}
	return s.followTxn(ctx, func() []*api.KVTxnOp { return []*api.KVTxnOp{s.identity.unmoved(), op} })
}
