package simulate

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	consulapi "github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/internal/store/consul"
	"github.com/bivouac/bivouac/scheduler"
)

// identityKey is the key of the identity of the Bivouac that owns the records.
const identityKey = prefix + "identity"

// loseRecord deletes the record of one session, as an operator may by hand, and
// reports whether there was one. It does not delete intents: only Consul knows
// of a start that was requested and has not reached Nomad.
func (w *world) loseRecord(which int) bool {
	var lost string
	w.consul.Change(prefix, func(pairs map[string]consulapi.KVPair) map[string]consulapi.KVPair {
		var settled []string
		for key, pair := range pairs {
			var r record
			if isOf(key, "sessions") && json.Unmarshal(pair.Value, &r) == nil && r.State != "creating" && r.State != "stopping" {
				settled = append(settled, key)
			}
		}
		if len(settled) == 0 {
			return nil
		}
		slices.Sort(settled)
		lost = settled[which%len(settled)]
		delete(pairs, lost)
		return pairs
	})
	if lost == "" {
		return false
	}
	w.edit(lost[strings.LastIndexByte(lost, '/')+1:])
	w.loseTrack()
	return true
}

// setBack restores an earlier state of the store and then has an operator
// repair all chats. It reports whether it did.
func (w *world) setBack(after time.Duration) bool {
	var saved map[string]consulapi.KVPair
	w.whenQuiet(func(pairs map[string]consulapi.KVPair) map[string]consulapi.KVPair {
		saved = pairs
		return nil
	})
	if saved == nil {
		return false
	}
	wait(w.ctx, after)
	done := w.whenQuiet(func(pairs map[string]consulapi.KVPair) map[string]consulapi.KVPair {
		next := make(map[string]consulapi.KVPair)
		for key, pair := range saved {
			if !isKept(key) {
				next[key] = pair
			}
		}
		for key, pair := range pairs {
			if isKept(key) {
				next[key] = pair
			}
		}
		return next
	})
	if !done {
		return false
	}
	w.editAll()
	w.loseTrack()
	for _, chat := range w.chatIDs {
		w.operate(func(ctx context.Context, r *replica) error {
			_, err := r.scheduler.Repair(ctx, chat)
			if errors.Is(err, scheduler.ErrNotFound) {
				return nil // the chat has neither a record nor a sandbox
			}
			return err
		})
	}
	return true
}

// isKept reports whether a key keeps its value when the store is set back. The
// identity is as old as the store, locks belong to their holders, and the keys of
// replicas to their Consul sessions. Changes are ordered by the indexes of their keys,
// which the model does not set back.
func isKept(key string) bool {
	return key == identityKey || isOf(key, "locks") || isOf(key, "replicas") || isOf(key, "events")
}

// wipe deletes everything in the store, and after a time has an operator adopt
// the running sandboxes. It reports whether it did.
//
// It does nothing if requests may arrive late. A replica's retried write of its
// first identity could then be applied to the empty store, as the identity of
// another Bivouac. Every Bivouac would then leave the running sandboxes alone.
func (w *world) wipe(lasts time.Duration) bool {
	if w.odds.Late > 0 {
		return false
	}
	var own consul.Identity
	done := w.whenQuiet(func(pairs map[string]consulapi.KVPair) map[string]consulapi.KVPair {
		if json.Unmarshal(pairs[identityKey].Value, &own) != nil {
			return nil
		}
		return make(map[string]consulapi.KVPair)
	})
	if !done {
		return false
	}
	w.editAll()
	w.loseTrack()
	w.mu.Lock()
	w.wiped = true
	w.mu.Unlock()
	wait(w.ctx, lasts)
	w.operate(func(ctx context.Context, r *replica) error {
		_, err := r.store.Adopt(ctx, own.Instance)
		switch {
		case errors.Is(err, scheduler.ErrInvalid): // none of its sandboxes runs
			if _, _, err = r.store.Forget(ctx); errors.Is(err, scheduler.ErrInvalid) {
				return nil // the store has a new identity already
			}
		case err == nil:
			_, err = r.scheduler.Adopt(ctx)
		}
		return err
	})
	return true
}

// whenQuiet changes the store at a moment when nothing is in flight. It reports
// whether it found such a moment and changed something. It waits because only
// Consul knows of a start that was requested and has not reached Nomad.
func (w *world) whenQuiet(change func(map[string]consulapi.KVPair) map[string]consulapi.KVPair) (changed bool) {
	for range 200 {
		quiet := false
		w.consul.Change(prefix, func(pairs map[string]consulapi.KVPair) map[string]consulapi.KVPair {
			for key := range maps.Keys(pairs) {
				if isOf(key, "flight") || isOf(key, "locks") && !strings.HasSuffix(key, nobody) {
					return nil
				}
			}
			quiet = true
			next := change(pairs)
			changed = next != nil
			return next
		})
		if quiet {
			return changed
		}
		wait(w.ctx, 53*time.Millisecond)
	}
	return false
}

// isOf reports whether a key is in one of the store's folders.
func isOf(key, folder string) bool { return strings.HasPrefix(key, prefix+folder+"/") }

// edit records that the chat's record no longer matches what callers were told.
func (w *world) edit(chatID string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.edited[chatID] = true
}

func (w *world) editAll() {
	for _, chat := range w.chatIDs {
		w.edit(chat.String())
	}
}

// isEdited reports whether the chat's record was changed by hand. Callers may
// then get any answer, except that a live process is dead.
func (w *world) isEdited(chatID string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.edited[chatID]
}

// operate retries an operator's action on the replicas until it succeeds on
// one.
func (w *world) operate(f func(context.Context, *replica) error) {
	for n := range 60 {
		if r := w.replica(n); !r.isDead() && w.ctx.Err() == nil {
			ctx, cancel := context.WithTimeout(w.ctx, 20*time.Second)
			done := make(chan error, 1)
			w.remains.Go(func() { done <- f(ctx, r) })
			err := errors.New("the replica died")
			select {
			case err = <-done:
			case <-r.died:
			}
			cancel()
			if err == nil {
				return
			}
			w.note(logged, "the operator is told by "+r.name+": "+err.Error())
		}
		wait(w.ctx, 2*time.Second)
	}
}
