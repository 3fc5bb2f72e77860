package consulmodel

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/internal/test/simulate/network"
)

type txnError struct {
	OpIndex int
	What    string
}

type txnResult struct{ KV *pair }

// serveTxn applies all operations of a transaction or none.
func (s *Server) serveTxn(body []byte) *http.Response {
	var ops []struct{ KV *api.KVTxnOp }
	if err := json.Unmarshal(body, &ops); err != nil {
		return network.Text(http.StatusBadRequest, err.Error())
	}
	if len(ops) > 128 {
		return network.Text(http.StatusRequestEntityTooLarge,
			fmt.Sprintf("Transaction contains too many operations (%d > 128)", len(ops)))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	writes := false
	for i, op := range ops {
		writes = writes || !isRead(op.KV.Verb)
		// The leader checks lock-delays before the transaction enters the log.
		if op.KV.Verb == api.KVLock && time.Now().Before(s.delays[op.KV.Key]) {
			what := fmt.Sprintf("failed to lock key %q due to lock delay", op.KV.Key)
			return rolledBack([]txnError{{i, what}})
		}
	}
	if writes {
		s.index++
	}

	// Pairs are replaced and never modified, so the old map undoes everything.
	before, beforeRemoved, beforeIndex := maps.Clone(s.kv), maps.Clone(s.removed), s.kvIndex
	watched := s.watched
	s.watched = nil // wake nobody for a change that may be undone
	var results []txnResult
	var errs []txnError
	for i, op := range ops {
		pairs, err := s.apply(op.KV)
		if err != nil {
			errs = append(errs, txnError{i, err.Error()})
			continue
		}
		for _, p := range pairs {
			if !sendsValue(op.KV.Verb) {
				p = &pair{
					Key: p.Key, CreateIndex: p.CreateIndex, ModifyIndex: p.ModifyIndex,
					LockIndex: p.LockIndex, Flags: p.Flags, Session: p.Session,
				}
			}
			results = append(results, txnResult{p})
		}
	}
	s.watched = watched
	if len(errs) > 0 {
		s.kv, s.removed, s.kvIndex = before, beforeRemoved, beforeIndex
		return rolledBack(errs)
	}
	for _, op := range ops {
		keys := []string{op.KV.Key}
		if op.KV.Verb == api.KVDeleteTree {
			keys = slices.Collect(maps.Keys(before))
		}
		for _, key := range keys {
			if s.kv[key] != before[key] {
				s.changedKey(key, s.index)
			}
		}
	}
	return answer(http.StatusOK, s.index, map[string]any{"Results": results, "Errors": nil})
}

func rolledBack(errs []txnError) *http.Response {
	return answer(http.StatusConflict, 0, map[string]any{"Results": nil, "Errors": errs})
}

func isRead(verb api.KVOp) bool {
	switch verb {
	case api.KVGet, api.KVGetOrEmpty, api.KVGetTree, api.KVCheckIndex, api.KVCheckSession, api.KVCheckNotExists:
		return true
	default:
		return false
	}
}

func sendsValue(verb api.KVOp) bool {
	return verb == api.KVGet || verb == api.KVGetOrEmpty || verb == api.KVGetTree
}

// apply carries out one operation and returns the pairs of its answer.
func (s *Server) apply(op *api.KVTxnOp) ([]*pair, error) {
	stands := s.kv[op.Key]
	next := &pair{Key: op.Key, Value: op.Value, Flags: op.Flags}
	switch op.Verb {
	case api.KVGetOrEmpty:
		if stands == nil {
			stands = &pair{Key: op.Key}
		}
		return []*pair{stands}, nil
	case api.KVGetTree:
		return s.below(op.Key), nil
	case api.KVCheckIndex:
		if stands == nil {
			return nil, fmt.Errorf("failed to check index, key %q doesn't exist", op.Key)
		}
		if stands.ModifyIndex != op.Index {
			return nil, fmt.Errorf("failed index check for key %q, current modify index %d != %d", op.Key, stands.ModifyIndex, op.Index)
		}
		return []*pair{stands}, nil
	case api.KVCheckNotExists:
		if stands != nil {
			return nil, fmt.Errorf("key %q exists", op.Key)
		}
		return nil, nil
	case api.KVSet:
		return []*pair{s.set(next, s.index, false)}, nil
	case api.KVCAS:
		if (op.Index == 0) != (stands == nil) || stands != nil && stands.ModifyIndex != op.Index {
			return nil, fmt.Errorf("failed to set key %q, index is stale", op.Key)
		}
		return []*pair{s.set(next, s.index, false)}, nil
	case api.KVDelete:
		s.remove(op.Key, s.index)
		return nil, nil
	case api.KVDeleteTree:
		for _, p := range s.below(op.Key) {
			s.remove(p.Key, s.index)
		}
		return nil, nil
	case api.KVDeleteCAS:
		if stands != nil && stands.ModifyIndex != op.Index {
			return nil, fmt.Errorf("failed to delete key %q, index is stale", op.Key)
		}
		s.remove(op.Key, s.index)
		return nil, nil
	case api.KVLock:
		return s.lock(next, op.Session)
	default:
		return nil, fmt.Errorf("consulmodel: no model of %q", op.Verb)
	}
}

// lock gives a key to a session. It succeeds if the session already has the
// key.
func (s *Server) lock(next *pair, session string) ([]*pair, error) {
	if s.sessions[session] == nil {
		return nil, fmt.Errorf("invalid session %q", session)
	}
	next.Session = session
	switch stands := s.kv[next.Key]; {
	case stands == nil:
		next.LockIndex = 1
	case stands.Session == "":
		next.LockIndex = stands.LockIndex + 1
	case stands.Session == session:
		next.LockIndex = stands.LockIndex
	default:
		return nil, fmt.Errorf("failed to lock key %q, lock is already held", next.Key)
	}
	return []*pair{s.set(next, s.index, true)}, nil
}

// set writes a pair. If nothing in it differs from the current pair, nothing
// changes, not even the index.
func (s *Server) set(next *pair, index uint64, withSession bool) *pair {
	next.CreateIndex, next.ModifyIndex = index, index
	stands := s.kv[next.Key]
	if stands != nil {
		next.CreateIndex = stands.CreateIndex
		if !withSession {
			next.Session = stands.Session
		}
		if stands.Session == next.Session && stands.LockIndex == next.LockIndex &&
			stands.Flags == next.Flags && bytes.Equal(stands.Value, next.Value) {
			return stands
		}
	}
	s.kv[next.Key] = next
	s.changedKey(next.Key, index)
	return next
}

func (s *Server) remove(key string, index uint64) {
	if s.kv[key] == nil {
		return
	}
	delete(s.kv, key)
	s.removed[key] = index
	s.changedKey(key, index)
}
