package consul

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/scheduler"
)

func changeOf(session scheduler.Session, reason string) scheduler.Change {
	return scheduler.Change{Type: scheduler.ChangeRenewed, Time: time.Now(), ChatID: session.ChatID, SessionID: session.SessionID, Reason: reason}
}

// reasons returns the reasons of all changes that are kept, in order.
func reasons(t *testing.T, store scheduler.Store) []string {
	t.Helper()
	changes, err := store.Changes(t.Context(), 0, 0)
	must.NoError(t, err)
	return reasonsOf(changes)
}

func reasonsOf(changes []scheduler.Change) []string {
	told := []string{}
	for _, change := range changes {
		told = append(told, change.Reason)
	}
	return told
}

// noteChange stores a change that belongs to no record.
func noteChange(t *testing.T, store scheduler.Store, reason string) {
	t.Helper()
	must.NoError(t, store.NoteChange(t.Context(), changeOf(freshSession(), reason)))
}

// openSegment makes the replica open the next segment.
func openSegment(t *testing.T, r *replica) {
	t.Helper()
	for {
		must.NoError(t, r.changes.moved(t.Context(), 0))
		old := r.changes.current()
		next := old
		next.Segment++
		must.NoError(t, r.changes.replace(t.Context(), old, next))
		if r.changes.current().Segment > old.Segment {
			return
		}
	}
}

// TestChangeIsStoredOnceWhateverHappensToARequest loses the first request of each kind of
// write with a change. Between two tries another replica may open the next segment.
func TestChangeIsStoredOnceWhateverHappensToARequest(t *testing.T) {
	for name, mistake := range mistakes() {
		for _, moves := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, the segment changes: %t", name, moves), func(t *testing.T) {
				t.Parallel()
				c, direct, proxied, p := behindProxy(t)
				fault := mistake
				if moves {
					fault = func(w http.ResponseWriter, r *http.Request, consul http.Handler) {
						defer openSegment(t, direct)
						mistake(w, r, consul)
					}
				}
				session, renewed := freshSession(), freshSession()
				renewed.ChatID = session.ChatID
				var want []string
				for _, then := range []scheduler.Then{scheduler.Keep, scheduler.Release} {
					for i, next := range []*scheduler.Session{nil, &session, &renewed, nil} {
						lease := lock(t, proxied, session.ChatID)
						p.do(first(1, "write", fault))
						told := fmt.Sprintf("write %d, then %d", i, then)
						want = append(want, told)
						must.NoError(t, lease.Write(t.Context(), next, then, changeOf(session, told)), must.Sprint(told))
						must.NoError(t, lease.Release(t.Context()))
						must.Eq(t, want, reasons(t, direct))
					}
				}
				p.do(first(1, "note", fault))
				noteChange(t, proxied, "note")
				must.Eq(t, append(want, "note"), reasons(t, direct))
				must.Eq(t, append(want, "note"), reasons(t, proxied))
				c.MustBeEmpty(t)
			})
		}
	}
}

// TestWriterThatIsLateWritesToTheCurrentSegment covers a request that arrives after the next
// segment was opened, and after changes were stored there.
func TestWriterThatIsLateWritesToTheCurrentSegment(t *testing.T) {
	t.Parallel()
	_, direct, proxied, p := behindProxy(t)
	session := freshSession()
	noteChange(t, direct, "before")
	begin, err := direct.Changes(t.Context(), 0, 0)
	must.NoError(t, err)
	lease := lock(t, proxied, session.ChatID)
	p.do(first(1, "write", func(w http.ResponseWriter, r *http.Request, consul http.Handler) {
		openSegment(t, direct)
		noteChange(t, direct, "in between")
		changes, err := direct.Changes(t.Context(), begin[0].Index, patience)
		must.NoError(t, err)
		must.Eq(t, []string{"in between"}, reasonsOf(changes))
		consul.ServeHTTP(w, r)
	}))
	must.NoError(t, lease.Write(t.Context(), &session, scheduler.Release, changeOf(session, "late")))
	must.Eq(t, []string{"before", "in between", "late"}, reasons(t, direct))
	must.Eq(t, 2, direct.changes.current().Segment)
	must.Eq(t, 2, proxied.changes.current().Segment)
	must.Eq(t, &session, read(t, direct, session.ChatID))
}

// TestChangeWhoseWriteArrivesLateIsNotStored covers a write that is in transit when its
// caller has given up.
func TestChangeWhoseWriteArrivesLateIsNotStored(t *testing.T) {
	_, direct, proxied, p := behindProxy(t)
	session := freshSession()
	lease := lock(t, proxied, session.ChatID)
	ctx, arrive := holdFirstWrite(t, p)
	must.ErrorIs(t, lease.Write(ctx, &session, scheduler.Keep, changeOf(session, "never")), scheduler.ErrUnavailable)
	must.NoError(t, lease.Release(t.Context()))
	arrive()
	must.Eq(t, []string{}, reasons(t, direct))
	must.Nil(t, read(t, direct, session.ChatID))
}

func TestSegmentsAreOpenedAndDroppedWhateverHappensToARequest(t *testing.T) {
	for name, mistake := range mistakes() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := open(t)
			c.Retain(scheduler.Retention{Max: 16}) // two changes fill a segment
			p := newProxy(t, c.addr)
			proxied := c.join(t, p.addr)
			odd := false
			p.do(func(r request) fault {
				if r.kind != "tidy" && r.kind != "upkeep" {
					return nil
				}
				if odd = !odd; odd {
					return mistake
				}
				return nil
			})
			var all []scheduler.Change
			var last uint64
			for i := range 60 {
				noteChange(t, proxied, fmt.Sprint(i))
				more, err := proxied.Changes(t.Context(), last, patience)
				must.NoError(t, err)
				all = append(all, more...)
				last = all[len(all)-1].Index
			}
			must.Len(t, 60, all)
			for i, change := range all {
				must.Eq(t, fmt.Sprint(i), change.Reason)
			}
			_, err := proxied.changes.tidyOnce(t.Context())
			for errors.Is(err, scheduler.ErrUnavailable) {
				_, err = proxied.changes.tidyOnce(t.Context())
			}
			must.NoError(t, err)
			h := proxied.changes.current()
			must.Greater(t, 1, h.Oldest)
			must.Eq(t, all[slices.IndexFunc(all, func(c scheduler.Change) bool { return c.Index > h.Dropped }):],
				all[len(all)-len(reasons(t, proxied)):])
		})
	}
}

// TestTwoReplicasOpenTheSameSegment checks that of two replicas only one opens the next
// segment, and that both know it then.
func TestTwoReplicasOpenTheSameSegment(t *testing.T) {
	t.Parallel()
	c := open(t)
	a, b := c.join(t, c.addr), c.join(t, c.addr)
	noteChange(t, a, "1")
	noteChange(t, b, "2")
	old := a.changes.current()
	must.Eq(t, old, b.changes.current())
	next := old
	next.Segment++
	var wg sync.WaitGroup
	for _, r := range []*replica{a, b} {
		wg.Go(func() {
			if err := r.changes.replace(t.Context(), old, next); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	must.Eq(t, a.changes.current(), b.changes.current())
	must.Eq(t, 2, a.changes.current().Segment)
	noteChange(t, a, "3")
	noteChange(t, b, "4")
	must.Eq(t, []string{"1", "2", "3", "4"}, reasons(t, a))
}

// TestRetentionPlan checks what becomes of the segments. A segment is written as the number
// of its changes and the age of its first and last one.
func TestRetentionPlan(t *testing.T) {
	now := time.Now()
	of := func(changes int, first, last time.Duration, index uint64) segment {
		return segment{transactions: changes, changes: changes, first: now.Add(-first), last: now.Add(-last), index: index}
	}
	c := newChangeLog(&Store{}, scheduler.Retention{Age: 80 * time.Minute, Max: 80})
	must.Eq(t, 10, c.segmentSize())
	const minute = time.Minute
	for name, tc := range map[string]struct {
		old      head
		segments map[uint64]segment
		want     head
	}{
		"empty": {head{Segment: 1, Oldest: 1}, nil, head{Segment: 1, Oldest: 1}},
		"young and not full": {
			head{Segment: 1, Oldest: 1}, map[uint64]segment{1: of(9, 9*minute, 0, 9)}, head{Segment: 1, Oldest: 1},
		},
		"full":      {head{Segment: 1, Oldest: 1}, map[uint64]segment{1: of(10, minute, 0, 9)}, head{Segment: 2, Oldest: 1}},
		"old":       {head{Segment: 1, Oldest: 1}, map[uint64]segment{1: of(1, 10*minute, 0, 9)}, head{Segment: 2, Oldest: 1}},
		"next full": {head{Segment: 2, Oldest: 1}, map[uint64]segment{1: of(12, 2*minute, minute, 9), 2: of(10, minute, 0, 20)}, head{Segment: 3, Oldest: 1, Kept: 12}},
		"the current one is never dropped": {
			head{Segment: 1, Oldest: 1}, map[uint64]segment{1: of(9, 200*minute, 100*minute, 9)}, head{Segment: 2, Oldest: 1},
		},
		"too old": {
			head{Segment: 4, Oldest: 2, Kept: 5}, map[uint64]segment{2: of(5, 99*minute, 80*minute, 50), 3: of(5, 99*minute, 79*minute, 70)},
			head{Segment: 4, Oldest: 3, Dropped: 50},
		},
		"all too old": {
			head{Segment: 4, Oldest: 2, Kept: 5}, map[uint64]segment{2: of(5, 99*minute, 80*minute, 50), 3: of(5, 99*minute, 80*minute, 70)},
			head{Segment: 4, Oldest: 4, Dropped: 70},
		},
		"one too many is kept until a whole segment is": {
			head{Segment: 9, Oldest: 1, Kept: 75}, map[uint64]segment{1: of(10, 9*minute, minute, 10), 8: of(10, 0, 0, 80), 9: of(4, 0, 0, 84)},
			head{Segment: 9, Oldest: 1, Kept: 75},
		},
		"a segment too many": {
			head{Segment: 9, Oldest: 1, Kept: 75}, map[uint64]segment{1: of(10, 9*minute, minute, 10), 2: of(10, minute, minute, 20), 8: of(10, 0, 0, 80), 9: of(5, 0, 0, 85)},
			head{Segment: 9, Oldest: 2, Kept: 65, Dropped: 10},
		},
		"at most so many at a time": {
			head{Segment: 99, Oldest: 1, Kept: 900}, map[uint64]segment{},
			head{Segment: 99, Oldest: 1 + dropAtATime, Kept: 900},
		},
	} {
		t.Run(name, func(t *testing.T) { must.Eq(t, tc.want, c.plan(tc.old, tc.segments, now)) })
	}
}

// TestReaderLearnsThatTheStoreWasSetBack restores a snapshot of Consul from before changes
// that were read.
func TestReaderLearnsThatTheStoreWasSetBack(t *testing.T) {
	t.Parallel()
	stack.NeedServers(t)
	server, err := stack.StartConsul(t.Context(), stack.ConsulConfig{})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, server.Stop()) })
	client, err := server.Client()
	must.NoError(t, err)
	c := &cluster{client: client, addr: server.Addr(), prefix: "test/"}
	r := c.join(t, c.addr)
	noteChange(t, r, "1")
	snapshot, _, err := client.Snapshot().Save(nil)
	must.NoError(t, err)
	defer func() { must.NoError(t, snapshot.Close()) }()
	noteChange(t, r, "2")
	openSegment(t, r)
	noteChange(t, r, "3")
	seen, err := r.Changes(t.Context(), 0, 0)
	must.NoError(t, err)
	must.Eq(t, []string{"1", "2", "3"}, reasonsOf(seen))

	told := make(chan error, 1)
	go func() {
		_, err := r.Changes(t.Context(), seen[2].Index, patience)
		told <- err
	}()
	must.NoError(t, client.Snapshot().Restore(nil, snapshot))
	must.ErrorIs(t, <-told, scheduler.ErrIndexTooOld)
	must.Eq(t, []string{"1"}, reasons(t, r))
	noteChange(t, r, "4")
	must.Eq(t, []string{"1", "4"}, reasons(t, r))

	// A change after the restore does not hide that "3" is gone.
	r.changes.setPosition(position{index: seen[2].Index, read: true, segment: 1, changed: seen[2].Index})
	_, err = r.Changes(t.Context(), seen[2].Index, patience)
	must.ErrorIs(t, err, scheduler.ErrIndexTooOld)
}

// TestReaderLearnsThatTheStoreWasWiped covers a Consul that lost its data, also if only the
// head is gone or cannot be read.
func TestReaderLearnsThatTheStoreWasWiped(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(*testing.T, *cluster){
		"everything is deleted":  func(t *testing.T, c *cluster) { c.wipe(t) },
		"the head is deleted":    func(t *testing.T, c *cluster) { c.remove(t, c.keys(t).eventsHead()) },
		"the head is damaged":    func(t *testing.T, c *cluster) { c.set(t, c.keys(t).eventsHead(), `{"segment":"x"}`) },
		"the head is impossible": func(t *testing.T, c *cluster) { c.set(t, c.keys(t).eventsHead(), `{"segment":1,"oldest":2}`) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := open(t)
			b, beside := c.startAs(t, Config{Instance: "test"}), c.startAs(t, Config{Instance: "test"})
			b.identified(t)
			beside.identified(t)
			noteChange(t, b, "1")
			noteChange(t, b, "2")
			seen, err := b.Changes(t.Context(), 0, 0)
			must.NoError(t, err)
			damage(t, c)
			if name == "everything is deleted" {
				b.standsStill(t)
				_, err := b.Changes(t.Context(), seen[1].Index, patience)
				must.ErrorIs(t, err, scheduler.ErrUnavailable)
				must.ErrorIs(t, b.NoteChange(t.Context(), seen[0]), scheduler.ErrUnavailable)
				must.False(t, c.has(t, b.keys.eventsHead()))
				_, err = b.Adopt(t.Context(), "")
				must.NoError(t, err)
			}
			_, err = b.Changes(t.Context(), seen[0].Index, patience)
			must.ErrorIs(t, err, scheduler.ErrIndexTooOld)
			_, err = b.Changes(t.Context(), seen[1].Index, patience)
			must.ErrorIs(t, err, scheduler.ErrIndexTooOld)
			noteChange(t, beside, "3")
			must.Eq(t, []string{"3"}, reasons(t, b))
			must.Eq(t, []string{"3"}, reasons(t, beside))
		})
	}
}

// TestReaderBeginsWithTheOldestSegment covers a replica that knows another oldest segment than
// there is now, as after a restore.
func TestReaderBeginsWithTheOldestSegment(t *testing.T) {
	c := open(t)
	r := c.join(t, c.addr)
	var want []string
	for i := range 20 {
		want = append(want, fmt.Sprint(i))
		noteChange(t, r, fmt.Sprint(i))
		openSegment(t, r)
	}
	stands := r.changes.current()
	for _, oldest := range []uint64{1, 2, 20, 21, 99} {
		r.changes.take(head{Segment: max(stands.Segment, oldest), Oldest: oldest, index: stands.index})
		must.Eq(t, want, reasons(t, r))
	}
}

// TestDamagedChangesHideNoOthers covers a value that was changed by hand.
func TestDamagedChangesHideNoOthers(t *testing.T) {
	c := open(t)
	r := c.join(t, c.addr)
	noteChange(t, r, "1")
	c.set(t, r.keys.segment(1)+"by-hand", "{")
	noteChange(t, r, "2")
	must.Eq(t, []string{"1", "2"}, reasons(t, r))
}

func TestRequestsPerChange(t *testing.T) {
	_, direct, proxied, p := behindProxy(t)
	noteChange(t, direct, "1")
	changes, err := proxied.Changes(t.Context(), 0, patience)
	must.NoError(t, err)
	_ = p.kinds()
	noteChange(t, proxied, "2")
	must.Eq(t, []string{"note"}, p.kinds())
	changes, err = proxied.Changes(t.Context(), changes[0].Index, patience)
	must.NoError(t, err)
	must.Eq(t, []string{"2"}, reasonsOf(changes))
	must.Eq(t, []string{"blocking get", "read changes"}, p.kinds())
	_, err = proxied.Changes(t.Context(), changes[0].Index, 0)
	must.NoError(t, err)
	must.Eq(t, []string{"read changes"}, p.kinds())

	// One read of all that came meanwhile, whatever its number.
	for range 20 {
		noteChange(t, direct, "3")
	}
	changes, err = proxied.Changes(t.Context(), changes[0].Index, patience)
	must.NoError(t, err)
	must.Len(t, 20, changes)
	must.Eq(t, []string{"blocking get", "read changes"}, p.kinds())
}

// TestRequestsPerUseCase shows that use cases make no request more for their changes, except
// for a conflict.
func TestRequestsPerUseCase(t *testing.T) {
	c, _, proxied, p := behindProxy(t)
	noteChange(t, proxied, "the head is known")
	u := schedule(t, c, proxied)
	chat := uuid.New()
	other := u.command(chat)
	other.AgentID = "agent-2"
	create := func(command scheduler.CreateCommand) error { _, err := u.Create(t.Context(), command); return err }
	for _, tc := range []struct {
		name     string
		do       func() error
		requests []string
		changes  []scheduler.ChangeType
	}{
		{"create", func() error { return create(u.command(chat)) }, []string{"get", "lock", "write", "write"}, []scheduler.ChangeType{scheduler.ChangeCreated, scheduler.ChangeReady}},
		{"reuse", func() error { return create(u.command(chat)) }, []string{"get"}, nil},
		{"conflict", func() error {
			must.ErrorIs(t, create(other), scheduler.ErrConflict)
			return nil
		}, []string{"get", "note"}, []scheduler.ChangeType{scheduler.ChangeConflict}},
		{"renew", func() error { _, err := u.Renew(t.Context(), chat, 2*time.Hour); return err }, []string{"lock", "write"}, []scheduler.ChangeType{scheduler.ChangeRenewed}},
		{"delete", func() error { _, err := u.Delete(t.Context(), chat); return err }, []string{"lock", "write", "write"}, []scheduler.ChangeType{scheduler.ChangeDeleted}},
	} {
		before, err := proxied.Changes(t.Context(), 0, 0)
		must.NoError(t, err)
		_ = p.kinds()
		must.NoError(t, tc.do(), must.Sprint(tc.name))
		must.Eq(t, tc.requests, p.kinds(), must.Sprint(tc.name))
		after, err := proxied.Changes(t.Context(), before[len(before)-1].Index, 0)
		must.NoError(t, err)
		var types []scheduler.ChangeType
		for _, change := range after {
			types = append(types, change.Type)
		}
		must.Eq(t, tc.changes, types, must.Sprint(tc.name))
	}
}

func TestReadersOfChangesAreBounded(t *testing.T) {
	c := open(t)
	r := c.join(t, c.addr)
	noteChange(t, r, "1")
	seen, err := r.Changes(t.Context(), 0, 0)
	must.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	results := make(chan error, maxReaders+1)
	for range maxReaders + 1 {
		go func() {
			_, err := r.Changes(ctx, seen[0].Index, patience)
			results <- err
		}()
	}
	must.ErrorIs(t, <-results, scheduler.ErrBusy)
	stop()
	for range maxReaders {
		must.ErrorIs(t, <-results, context.Canceled)
	}
}

// remove deletes a key by hand.
func (c *cluster) remove(t *testing.T, key string) {
	t.Helper()
	_, err := c.client.KV().Delete(key, (&api.WriteOptions{}).WithContext(t.Context()))
	must.NoError(t, err)
}
