package scheduler_test

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/store/memory"
	"github.com/bivouac/bivouac/scheduler"
)

// happens stores changes of AI agents, each in a transaction, and returns the index of
// the last one.
func happens(t must.T, store *memory.Store, agents ...string) uint64 {
	for _, agent := range agents {
		must.NoError(t, store.NoteChange(context.Background(), scheduler.Change{
			Type: scheduler.ChangeConflict, Time: time.Now(), ChatID: chatA, AgentID: agent,
		}))
	}
	changes, err := store.Changes(context.Background(), 0, 0)
	must.NoError(t, err)
	if len(changes) == 0 {
		return 0
	}
	return changes[len(changes)-1].Index
}

// readEvents returns what a query yields, each batch as "TYPE AGENT, …" and an error as
// its kind, without what every reader gets at first.
func readEvents(ctx context.Context, s *scheduler.Scheduler, query scheduler.EventQuery) []string {
	got := &lines{}
	got.read(ctx, s, query)
	return got.take()
}

// lines is what a reader of events got.
type lines struct {
	mu    sync.Mutex
	all   []string
	begin uint64 // the index of the first batch
	last  uint64 // the index of the last batch
}

func (l *lines) read(ctx context.Context, s *scheduler.Scheduler, query scheduler.EventQuery) {
	first := true
	for batch, err := range s.Events(ctx, query) {
		l.mu.Lock()
		switch {
		case err != nil:
			l.all = append(l.all, "error "+scheduler.Kind(err))
		case first:
			l.begin = batch.Index
		case len(batch.Changes) == 0:
			l.all = append(l.all, "heartbeat")
		default:
			var texts []string
			for _, c := range batch.Changes {
				texts = append(texts, fmt.Sprintf("%s %s", c.Type, c.AgentID))
			}
			l.all = append(l.all, strings.Join(texts, ", "))
			l.last = batch.Index
		}
		l.mu.Unlock()
		first = false
	}
}

// take returns what came since it was last called.
func (l *lines) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := l.all
	l.all = nil
	return all
}

// follow reads events until the returned function is called.
func follow(ctx context.Context, s *scheduler.Scheduler, query scheduler.EventQuery) (*lines, func()) {
	ctx, cancel := context.WithCancel(ctx)
	query.Follow = true
	got, done := &lines{}, make(chan struct{})
	go func() {
		defer close(done)
		got.read(ctx, s, query)
	}()
	synctest.Wait()
	return got, func() {
		cancel()
		<-done
	}
}

func TestEventsOfAChat(t *testing.T) {
	w := newWorld(t)
	other := createA
	other.AgentID = "agent-2"
	second := createA
	second.ChatID = chatB
	_, err := w.Create(t.Context(), createA)
	must.NoError(t, err)
	_, err = w.Create(t.Context(), second)
	must.NoError(t, err)
	_, err = w.Create(t.Context(), other)
	must.ErrorIs(t, err, scheduler.ErrConflict)
	killed("exit code 3")(w)
	_, err = w.Create(t.Context(), other)
	must.NoError(t, err)
	_, err = w.Delete(t.Context(), chatA)
	must.NoError(t, err)

	history, err := w.History(t.Context(), chatA)
	must.NoError(t, err)
	var got []string
	for _, c := range history {
		must.Eq(t, chatA, c.ChatID)
		got = append(got, fmt.Sprintf("%s %s %s", c.Type, c.AgentID, c.Reason))
	}
	must.Eq(t, []string{
		"created agent-1 ", "ready agent-1 ", "conflict agent-1 agent_id",
		"replaced agent-1 exit code 3", "created agent-2 ", "ready agent-2 ", "deleted agent-2 ",
	}, got)

	history, err = w.History(as(t, rule("agent-2", scheduler.CapRead)), chatA)
	must.NoError(t, err)
	must.Len(t, 3, history, must.Sprint("a caller sees what happened to sessions that it may see"))
}

func TestEvents(t *testing.T) {
	w := newWorld(t)
	happens(t, w.store, "a", "b")
	second := happens(t, w.store, "a")
	must.NoError(t, w.store.NoteChange(t.Context(), scheduler.Change{Type: scheduler.ChangeDead, Time: time.Now(), ChatID: chatB, AgentID: "b"}))
	all := []string{"conflict a", "conflict b", "conflict a", "dead b"}

	for _, tc := range []struct {
		name  string
		query scheduler.EventQuery
		want  []string
	}{
		{"all that are kept", scheduler.EventQuery{After: new(uint64)}, all},
		{"those after an index", scheduler.EventQuery{After: new(second - 1)}, all[2:]},
		{"those after the last index", scheduler.EventQuery{After: new(second + 1)}, nil},
		{"none that happened before", scheduler.EventQuery{}, nil},
		{"of an AI agent", scheduler.EventQuery{After: new(uint64), AgentID: "b"}, []string{"conflict b", "dead b"}},
		{"of a chat", scheduler.EventQuery{After: new(uint64), ChatID: chatB}, []string{"dead b"}},
		{"of some types", scheduler.EventQuery{After: new(uint64), Types: []scheduler.ChangeType{"ready", "dead"}}, []string{"dead b"}},
		{"of another store", scheduler.EventQuery{After: new(second + 1000)}, []string{"error index_too_old"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			must.Eq(t, tc.want, readEvents(t.Context(), w.Scheduler, tc.query))
		})
	}
}

func TestEvents_changes_of_one_transaction_are_one_batch(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA), killed("exit code 3"))
	w.given(created(createA))
	must.Eq(t, []string{"created agent-1", "ready agent-1", "replaced agent-1, created agent-1", "ready agent-1"},
		readEvents(t.Context(), w.Scheduler, scheduler.EventQuery{After: new(uint64)}))
}

func TestEvents_of_a_transaction_stay_together(t *testing.T) {
	w := newWorld(t)
	const transactions = 500 // more than a reader takes at a time
	for range transactions {
		lease, err := w.locker.Lock(t.Context(), chatA, 0)
		must.NoError(t, err)
		three := []scheduler.Change{{Type: "a", Time: time.Now()}, {Type: "b", Time: time.Now()}, {Type: "c", Time: time.Now()}}
		must.NoError(t, lease.Write(t.Context(), &scheduler.Session{ChatID: chatA}, scheduler.Release, three...))
	}
	got := readEvents(t.Context(), w.Scheduler, scheduler.EventQuery{After: new(uint64)})
	must.Len(t, transactions, got)
	for _, line := range got {
		must.Eq(t, "a , b , c ", line)
	}
}

func TestEvents_follows(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		stop := run(t, w.Scheduler)
		happens(t, w.store, "a")
		got, leave := follow(t.Context(), w.Scheduler, scheduler.EventQuery{})
		must.Eq(t, happens(t, w.store, "b")-1, got.begin)
		pass(0)
		must.Eq(t, []string{"conflict b"}, got.take())

		// A heartbeat comes after 10 seconds without a batch.
		pass(10*time.Second - 1)
		must.SliceEmpty(t, got.take())
		pass(1)
		must.Eq(t, []string{"heartbeat"}, got.take())

		leave()
		must.Eq(t, []string{"error canceled"}, got.take())
		stop()
		must.SliceEmpty(t, w.warnings())
	})
}

func TestEvents_show_nothing_of_others(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		stop := run(t, w.Scheduler)
		mine := as(t, rule("mine", scheduler.CapRead))
		own := happens(t, w.store, "mine")
		others := happens(t, w.store, "other", "other")
		got, leave := follow(mine, w.Scheduler, scheduler.EventQuery{})
		must.Eq(t, own, got.begin, must.Sprint("not an index of others"))

		// What others do changes neither the batches nor their times.
		for range 29 {
			pass(time.Second)
			happens(t, w.store, "other")
		}
		must.Eq(t, []string{"heartbeat", "heartbeat"}, got.take())
		happens(t, w.store, "mine")
		pass(time.Second)
		must.Eq(t, []string{"conflict mine"}, got.take())
		leave()

		// Nor do they change what an index is worth.
		for index := range others + 100 {
			want := []string{"error index_too_old"}
			switch index {
			case 0:
				want = []string{"conflict mine", "conflict mine"}
			case own:
				want = []string{"conflict mine"}
			case got.last:
				want = nil
			}
			must.Eq(t, want, readEvents(mine, w.Scheduler, scheduler.EventQuery{After: &index}), must.Sprint(index))
		}
		highest := uint64(math.MaxUint64)
		for _, caller := range []context.Context{mine, t.Context()} {
			must.Eq(t, []string{"error index_too_old"}, readEvents(caller, w.Scheduler, scheduler.EventQuery{After: &highest}))
		}
		must.Eq(t, []string{"error permission_denied"}, readEvents(mine, w.Scheduler, scheduler.EventQuery{AgentID: "other"}))
		stop()
	})
}

// patient is a store whose changes can be out of reach, too old, and big.
type patient struct {
	scheduler.Store

	mu      sync.Mutex
	up      context.Context
	fall    context.CancelFunc
	dropped uint64
}

func newPatient(store scheduler.Store) *patient {
	s := &patient{Store: store}
	s.rise()
	return s
}

func (s *patient) rise() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.up, s.fall = context.WithCancel(context.Background())
}

// forget drops the changes up to an index.
func (s *patient) forget(index uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropped = index
}

func (s *patient) Changes(ctx context.Context, after uint64, wait time.Duration) ([]scheduler.Change, error) {
	s.mu.Lock()
	up, dropped := s.up, s.dropped
	s.mu.Unlock()
	if up.Err() != nil {
		return nil, scheduler.ErrUnavailable
	}
	if after != 0 && after < dropped {
		return nil, scheduler.ErrIndexTooOld
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(up, cancel)()
	changes, err := s.Store.Changes(ctx, max(after, dropped), wait)
	if up.Err() != nil {
		return nil, scheduler.ErrUnavailable
	}
	for i, change := range changes {
		if change.Reason == big {
			changes[i].Reason = padding
		}
	}
	return changes, err
}

// big is a reason for which a patient store gives a very long one. A replica keeps less
// than four such changes in memory.
const big = "big"

var padding = strings.Repeat("x", 5<<20)

// inBubbleWithPatient is inBubble with a patient store.
func inBubbleWithPatient(t *testing.T, test func(*testing.T, *world, *patient)) {
	t.Helper()
	var store *patient
	inBubbleWith(t, func(c *scheduler.Config) {
		store = newPatient(c.Store)
		c.Store = store
	}, func(t *testing.T, w *world) { test(t, w, store) })
}

func withoutHeartbeats(lines []string) []string {
	return slices.DeleteFunc(lines, func(line string) bool { return line == "heartbeat" })
}

func TestEvents_while_the_store_is_out_of_reach(t *testing.T) {
	inBubbleWithPatient(t, func(t *testing.T, w *world, store *patient) {
		stop := run(t, w.Scheduler)
		pass(0)
		got, leave := follow(t.Context(), w.Scheduler, scheduler.EventQuery{})
		happens(t, w.store, "a")
		pass(0)
		must.Eq(t, []string{"conflict a"}, got.take())

		store.fall()
		happens(t, w.store, "b")
		pass(25 * time.Second)
		must.Eq(t, []string{"heartbeat", "heartbeat"}, got.take())
		must.Eq(t, []string{"error store_unavailable"}, readEvents(t.Context(), w.Scheduler, scheduler.EventQuery{}),
			must.Sprint("a new reader had better ask another replica"))

		happens(t, w.store, "c")
		store.rise()
		pass(time.Minute)
		must.Eq(t, []string{"conflict b", "conflict c"}, withoutHeartbeats(got.take()))
		leave()
		stop()
	})
}

func TestEvents_tell_a_gap(t *testing.T) {
	for name, before := range map[string][]string{"after some changes": {"a"}, "after none": nil} {
		t.Run("of an outage that was too long, "+name, func(t *testing.T) {
			inBubbleWithPatient(t, func(t *testing.T, w *world, store *patient) {
				stop := run(t, w.Scheduler)
				pass(0)
				got, leave := follow(t.Context(), w.Scheduler, scheduler.EventQuery{})
				happens(t, w.store, before...)
				pass(0)
				must.Len(t, len(before), got.take())
				store.fall()
				pass(0)
				missed := happens(t, w.store, "b")
				store.forget(missed)
				happens(t, w.store, "c")
				store.rise()
				pass(time.Minute)
				must.Eq(t, []string{"error index_too_old"}, withoutHeartbeats(got.take()))
				leave()

				must.Eq(t, []string{"conflict c"}, readEvents(t.Context(), w.Scheduler, scheduler.EventQuery{After: new(uint64)}))
				must.Eq(t, []string{"error index_too_old"}, readEvents(t.Context(), w.Scheduler, scheduler.EventQuery{After: new(missed - 1)}))
				stop()
			})
		})
	}
	t.Run("but no outage in which nothing happened", func(t *testing.T) {
		inBubbleWithPatient(t, func(t *testing.T, w *world, store *patient) {
			stop := run(t, w.Scheduler)
			pass(0)
			got, leave := follow(t.Context(), w.Scheduler, scheduler.EventQuery{})
			store.fall()
			pass(time.Minute)
			store.rise()
			pass(time.Minute)
			happens(t, w.store, "a")
			pass(0)
			must.Eq(t, []string{"conflict a"}, withoutHeartbeats(got.take()))
			leave()
			stop()
		})
	})
	t.Run("of a reader that is too slow", func(t *testing.T) {
		inBubbleWithPatient(t, func(t *testing.T, w *world, _ *patient) {
			stop := run(t, w.Scheduler)
			var got []string
			slow, done := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(done)
				for batch, err := range w.Events(t.Context(), scheduler.EventQuery{Follow: true}) {
					if err != nil {
						got = append(got, "error "+scheduler.Kind(err))
						continue
					}
					got = append(got, fmt.Sprintf("%d changes", len(batch.Changes)))
					<-slow
				}
			}()
			pass(0)
			for range 5 {
				must.NoError(t, w.store.NoteChange(t.Context(), scheduler.Change{Time: time.Now(), Reason: big}))
				pass(0)
			}
			close(slow)
			<-done
			must.Eq(t, []string{"0 changes", "error index_too_old"}, got)
			kept := readEvents(t.Context(), w.Scheduler, scheduler.EventQuery{After: new(uint64)})
			must.Len(t, 3, kept, must.Sprint("the newest are kept"))
			stop()
		})
	})
}

func TestEvents_of_a_replica_that_has_just_started(t *testing.T) {
	inBubbleWithPatient(t, func(t *testing.T, w *world, store *patient) {
		start := func() *scheduler.Scheduler {
			c := w.peerConfig()
			c.Store = store
			s, err := scheduler.New(c)
			must.NoError(t, err)
			return s
		}
		first := happens(t, w.store, "a")
		created(createA)(w)
		last := happens(t, w.store, "b")
		must.Eq(t, []string{"created agent-1", "ready agent-1", "conflict b"},
			readEvents(t.Context(), start(), scheduler.EventQuery{After: &first}))

		// An index whose change is no longer kept is good as long as none after it is
		// missing.
		store.forget(last)
		empty := start()
		must.Eq(t, []string{"error index_too_old"}, readEvents(t.Context(), empty, scheduler.EventQuery{After: new(last - 1)}))
		must.Eq(t, []string{"error index_too_old"}, readEvents(t.Context(), empty, scheduler.EventQuery{After: new(last + 1)}))
		must.Eq(t, nil, readEvents(t.Context(), empty, scheduler.EventQuery{After: &last}))
		_, err := w.Renew(t.Context(), chatA, time.Hour)
		must.NoError(t, err)
		restarted := start()
		must.Eq(t, []string{"error index_too_old"}, readEvents(t.Context(), restarted, scheduler.EventQuery{After: new(last - 1)}))
		must.Eq(t, []string{"renewed agent-1"}, readEvents(t.Context(), restarted, scheduler.EventQuery{After: &last}))

		// While the store is out of reach, no index is called too old.
		store.fall()
		must.Eq(t, []string{"error store_unavailable"}, readEvents(t.Context(), start(), scheduler.EventQuery{After: new(last - 1)}))
	})
}

func TestConflictsDoNotPushOtherChangesOut(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA))
		other := createA
		other.AgentID = "agent-2"
		conflicts := func(n int) {
			for range n {
				_, err := w.Create(t.Context(), other)
				must.ErrorIs(t, err, scheduler.ErrConflict)
			}
		}
		conflicts(1000)
		must.Len(t, 2+100, w.changes())
		must.SliceContains(t, w.outcome("", nil).Metrics, "event.unstored.total{reason=limit type=conflict} 900")

		time.Sleep(10 * time.Second)
		conflicts(2)
		must.Len(t, 2+100+1, w.changes())
	})
}
