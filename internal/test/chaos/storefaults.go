package main

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	consulapi "github.com/hashicorp/consul/api"
)

// storeFaults returns wrong writes to Consul that an operator may make by hand.
func (w *world) storeFaults() []fault {
	faults := []fault{
		{"clock key set a day ahead", 10 * time.Second, nil, w.setClock},
		{"record deleted", 5 * time.Second, nil, func(ctx context.Context) error { return w.deleteRecord(ctx, false) }},
	}
	if w.pools != nil {
		faults = append(faults, fault{"record deleted, of a warm session", 5 * time.Second, nil, func(ctx context.Context) error {
			return w.deleteRecord(ctx, true)
		}})
	}
	return faults
}

// setClock sets the clock key a day ahead. No session may end because of that.
// If no replica knows the time, setClock deletes the key, as the health check
// says to.
func (w *world) setClock(ctx context.Context) error {
	value := []byte("hand " + time.Now().Add(24*time.Hour).UTC().Format(time.RFC3339Nano))
	if err := patiently(ctx, func(ctx context.Context) error {
		_, err := w.kv.KV().Put(&consulapi.KVPair{Key: clockKey, Value: value}, (&consulapi.WriteOptions{}).WithContext(ctx))
		return err
	}); err != nil {
		return err
	}
	pause(ctx, 5*time.Second)
	return patiently(ctx, func(ctx context.Context) error {
		pair, _, err := w.kv.KV().Get(clockKey, (&consulapi.QueryOptions{RequireConsistent: true}).WithContext(ctx))
		if err != nil || pair == nil || !bytes.Equal(pair.Value, value) {
			return err
		}
		w.log.note("nobody has overwritten the clock key: it is deleted")
		_, _, err = w.kv.KV().DeleteCAS(pair, (&consulapi.WriteOptions{}).WithContext(ctx))
		return err
	})
}

// deleteRecord deletes the record of a session whose sandbox runs. The sandbox
// must be adopted, and the chat must not get a second one.
func (w *world) deleteRecord(ctx context.Context, warm bool) error {
	var pairs consulapi.KVPairs
	if err := patiently(ctx, func(ctx context.Context) (err error) {
		pairs, _, err = w.kv.KV().List(prefix+"v1/sessions/", (&consulapi.QueryOptions{RequireConsistent: true}).WithContext(ctx))
		return err
	}); err != nil {
		return err
	}
	running := w.census.running()
	pairs = slices.DeleteFunc(pairs, func(pair *consulapi.KVPair) bool {
		r, err := decode(pair)
		return err != nil || r.State != "running" || r.Warm != warm || running[r.SessionID] == nil
	})
	if len(pairs) == 0 {
		return errMissed
	}
	pair := pairs[w.below(len(pairs))]
	chat, err := uuid.Parse(pair.Key[strings.LastIndexByte(pair.Key, '/')+1:])
	if err != nil {
		return err
	}
	w.told.loses(chat)
	r, err := decode(pair)
	if err != nil {
		return err
	}
	undo := func() {}
	if warm {
		undo = w.loseWarm(r.SessionID)
	}
	w.log.note("delete the record of chat %s session %s, warm %t", chat, r.SessionID, warm)
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	done, _, err := w.kv.KV().DeleteCAS(pair, (&consulapi.WriteOptions{}).WithContext(ctx))
	if err != nil || !done {
		if err == nil {
			undo()
		}
		w.log.note("the record of chat %s was not deleted: %v", chat, err)
		return errMissed // it changed, or Consul is down
	}
	return nil
}
