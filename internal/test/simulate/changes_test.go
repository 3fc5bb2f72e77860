package simulate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/test/changelog"
	"github.com/bivouac/bivouac/internal/test/simulate/network"
	"github.com/bivouac/bivouac/scheduler"
)

// follower reads the changes at one replica. When the replica restarts, it goes on after
// the last change that it got.
type follower struct {
	place   int // of the replica
	changes []changelog.Change
	stop    context.CancelFunc
	done    sync.WaitGroup
}

// follow starts a follower at each replica.
func (w *world) follow() {
	for i := range w.replicas {
		ctx, stop := context.WithCancel(network.WithCaller(w.ctx, fmt.Sprintf("follower %d", i)))
		f := &follower{place: i, stop: stop}
		w.followers = append(w.followers, f)
		f.done.Go(func() {
			for ctx.Err() == nil {
				w.readChanges(ctx, f, time.Minute)
			}
		})
	}
}

// readChanges makes one read for a follower. It reports whether the follower has all
// changes: none came within a time. The read ends with the replica.
func (w *world) readChanges(ctx context.Context, f *follower, within time.Duration) (all bool) {
	type result struct {
		changes []scheduler.Change
		err     error
	}
	r := w.replica(f.place)
	reading, cancel := context.WithCancel(ctx)
	defer cancel()
	answered := make(chan result, 1)
	w.remains.Go(func() {
		changes, err := r.turns.Changes(reading, f.last(), within)
		answered <- result{changes, err}
	})
	var got result
	select {
	case got = <-answered:
	case <-r.died:
		got.err = errors.New("the replica died")
	}
	switch {
	case errors.Is(got.err, scheduler.ErrIndexTooOld) && !w.isWiped():
		w.violate("a follower of replica %d has read up to change %d, and is told: %v", f.place, f.last(), got.err)
		f.stop()
	case got.err != nil:
		wait(ctx, time.Second+time.Duration(f.place)*time.Millisecond)
	}
	for _, c := range got.changes {
		f.changes = append(f.changes, changelog.Change{
			Index: c.Index, Type: string(c.Type), Chat: c.ChatID, Session: c.SessionID, Request: c.RequestID,
		})
	}
	return got.err == nil && len(got.changes) == 0
}

// last returns the index of the last change that the follower got.
func (f *follower) last() uint64 {
	if len(f.changes) == 0 {
		return 0
	}
	return f.changes[len(f.changes)-1].Index
}

func (w *world) isWiped() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.wiped
}

// comparisons is how often what the followers got is compared until it agrees. A session
// may expire between two reads, and is then being stopped for seconds. A change that is
// missing stays missing.
const comparisons = 20

// checkChanges ends the followers and checks what they got. It checks nothing if the store
// was wiped.
func (w *world) checkChanges() {
	for _, f := range w.followers {
		f.stop()
		f.done.Wait()
	}
	var problems []string
	for range comparisons {
		for _, f := range w.followers {
			for tries := 0; tries < 20 && !w.isWiped() && !w.readChanges(w.ctx, f, time.Second); tries++ {
			}
		}
		if w.isWiped() {
			return
		}
		if problems = w.compareChanges(); len(problems) == 0 {
			break
		}
	}
	for _, problem := range problems {
		w.violate("%s", problem)
	}
	w.countFailedClaims(w.followers[0].changes)
	w.mu.Lock()
	w.changes = len(w.followers[0].changes)
	w.mu.Unlock()
}

// compareChanges compares what the followers got: with each other, with what callers were
// told, and with the records. Of chats that are edited it compares little.
func (w *world) compareChanges() []string {
	edited := func(chat uuid.UUID) bool { return w.isEdited(chat.String()) }
	changes := w.followers[0].changes
	standing, problems := changelog.Check(changes, edited)
	for _, f := range w.followers[1:] {
		if difference := changelog.Difference(changes, f.changes); difference != "" {
			problems = append(problems, fmt.Sprintf("the followers of replicas 0 and %d differ: %s", f.place, difference))
		}
	}
	return slices.Concat(problems, changelog.Compare(changes, w.requestsAndAnswers(), edited), w.notAsRecorded(standing))
}

// requestsAndAnswers returns the requests as the checker wants them.
func (w *world) requestsAndAnswers() []changelog.Request {
	var all []changelog.Request
	for _, c := range w.history {
		r := changelog.Request{ID: c.id, Kind: c.kind, Chat: w.chatIDs[c.chat]}
		if c.err == nil && !c.open && c.session != "" && (c.told != "renewed" || w.mustRenew(c)) {
			r.Told, r.Session = c.told, uuid.MustParse(c.session)
		}
		all = append(all, r)
	}
	return all
}

// mustRenew reports whether a renewal certainly changed the expiry: its answer has a later
// one than all that others may have set.
func (w *world) mustRenew(renewal call) bool {
	skew := w.skew()
	return !slices.ContainsFunc(w.history, func(c call) bool {
		sets := c.id != renewal.id && c.chat == renewal.chat && (c.kind == "create" || c.kind == "renew") && c.began < renewal.ended
		return sets && (c.open || c.expires+skew >= renewal.expires)
	})
}

// notAsRecorded compares the sessions of which the changes tell with the records.
func (w *world) notAsRecorded(standing map[uuid.UUID]changelog.Standing) []string {
	recorded := make(map[uuid.UUID]changelog.Standing)
	for key, pair := range w.consul.Keys(prefix + "sessions/") {
		var r record
		if err := json.Unmarshal(pair.Value, &r); err != nil {
			return []string{fmt.Sprintf("%s: %v", key, err)}
		}
		recorded[uuid.MustParse(r.ChatID)] = changelog.Standing{Session: uuid.MustParse(r.SessionID), State: r.State}
	}
	var problems []string
	for _, chat := range w.chatIDs {
		if told, is := standing[chat], recorded[chat]; told != is && !w.isEdited(chat.String()) {
			problems = append(problems, fmt.Sprintf("the changes of chat %s end with session %s, %q, and its record is session %s, %q",
				chat, told.Session, told.State, is.Session, is.State))
		}
	}
	return problems
}
