package scheduler_test

import (
	"context"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// edited changes a chat's record behind the scheduler's back.
func edited(chat uuid.UUID, edit func(*scheduler.Session)) func(*world) {
	return func(w *world) {
		lease, err := w.peer().locker.Lock(context.Background(), chat, 0)
		must.NoError(w.t, err)
		session := *lease.Session()
		edit(&session)
		must.NoError(w.t, lease.Write(context.Background(), &session, scheduler.Release))
	}
}

// Somebody edited a chat's record so that it names the session of another chat.
// That chat's sandbox is neither handed out nor stopped, whatever is asked for,
// and the chat's own is found again.
func TestRecordThatNamesAnotherChatsSession(t *testing.T) {
	steal := func(state scheduler.State, expiry time.Duration) func(*world) {
		return func(w *world) {
			theirs := w.standing(chatB)
			edited(chatA, func(s *scheduler.Session) {
				s.SessionID, s.ContainerID, s.Endpoint = theirs.SessionID, theirs.ContainerID, theirs.Endpoint
				s.State, s.ExpiresAt = state, noon.Add(expiry)
			})(w)
		}
	}
	ownGone := func(w *world) { w.driver.Forget(w.standing(chatA).SessionID.String()) }
	for _, state := range []scheduler.State{scheduler.StateRunning, scheduler.StateCreating, scheduler.StateStopping} {
		for _, expiry := range []time.Duration{time.Hour, -time.Hour} {
			w := newWorld(t)
			w.given(created(createA), created(createOf(chatB)), ownGone, steal(state, expiry))
			stands := w.records()

			_, err := w.Create(t.Context(), createA)
			must.ErrorIs(t, err, scheduler.ErrDamaged)
			must.ErrorContains(t, err, chatB.String())
			_, err = w.Delete(t.Context(), chatA)
			must.ErrorIs(t, err, scheduler.ErrDamaged)
			must.NoError(t, w.SettleInFlight(t.Context()))
			cleaned, err := w.CleanupExpired(t.Context())
			must.NoError(t, err)
			must.SliceEmpty(t, cleaned.Cleaned)
			seen, _, err := w.Get(t.Context(), chatA, scheduler.Block{})
			must.NoError(t, err)
			if state == scheduler.StateRunning {
				must.Eq(t, scheduler.StateLost, seen.State)
				must.Eq(t, "the session is that of another chat: "+chatB.String(), seen.Reason)
			}
			must.SliceContains(t, w.running(), "chat-b s2")
			must.Eq(t, stands, w.records())
			reused, err := w.Create(t.Context(), createOf(chatB))
			must.NoError(t, err)
			must.Eq(t, scheduler.ResultReused, reused.Result)
			repaired, err := w.Repair(t.Context(), chatA)
			must.NoError(t, err)
			must.Eq(t, scheduler.RepairRemoved, repaired.Result)

			// While its own sandbox runs, a create finds that.
			w = newWorld(t)
			w.given(created(createA), created(createOf(chatB)), steal(state, expiry))
			reused, err = w.Create(t.Context(), createA)
			must.NoError(t, err)
			must.Eq(t, scheduler.ResultReused, reused.Result)
			must.Eq(t, []string{"chat-a s1", "chat-b s2"}, w.running())
		}
	}
}

// Somebody edited a record so that it names another container: what it names is
// not the session's sandbox, and the one that is gets replaced.
func TestRecordThatNamesAnotherContainer(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA), edited(chatA, func(s *scheduler.Session) { s.ContainerID = "container-of-another" }))
	seen, _, err := w.Get(t.Context(), chatA, scheduler.Block{})
	must.NoError(t, err)
	must.Eq(t, scheduler.StateLost, seen.State)
	res, err := w.Create(t.Context(), createA)
	must.NoError(t, err)
	must.Eq(t, scheduler.ResultReplaced, res.Result)
	must.Eq(t, []string{"chat-a s2"}, w.running())
}

// A sandbox that its driver calls somebody else's is neither handed out nor
// stopped, and its session says why.
func TestSandboxThatIsSomebodyElses(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA))
	for _, call := range []string{"driver.inspect", "driver.stop", "driver.delete"} {
		w.effects.fail(call, runtime.ErrConflict)
	}
	seen, _, err := w.Get(t.Context(), chatA, scheduler.Block{})
	must.NoError(t, err)
	must.Eq(t, scheduler.StateLost, seen.State)
	must.StrContains(t, seen.Reason, runtime.ErrConflict.Error())
	_, err = w.Create(t.Context(), createA)
	must.ErrorIs(t, err, runtime.ErrConflict)
	_, err = w.Delete(t.Context(), chatA)
	must.ErrorIs(t, err, runtime.ErrConflict)
	must.Eq(t, []string{"chat-a s1 running container-1 12:30:00"}, w.records())
}

// blindStore is a store whose indexes lost everything.
type blindStore struct{ scheduler.Store }

func (blindStore) Expired(context.Context, time.Time, int) ([]scheduler.Session, error) {
	return nil, nil
}

func (blindStore) InFlight(context.Context) ([]scheduler.Session, error) { return nil, nil }

// What the store's indexes lack is found by reconciling, which reads the records.
func TestRun_catchesUpOnWhatTheIndexesLack(t *testing.T) {
	inBubbleWith(t, func(c *scheduler.Config) { c.Store = blindStore{c.Store} }, func(t *testing.T, w *world) {
		short := createA
		short.TTL = scheduler.MinTTL
		abandonedStart(w)
		other := short
		other.ChatID = chatB
		w.given(created(other))
		must.Eq(t, []string{"chat-a s1", "chat-b s2"}, w.running())

		stop := run(t, w.Scheduler)
		pass(3 * time.Minute)

		must.SliceEmpty(t, w.running())
		must.SliceEmpty(t, w.records())
		stop()
	})
}

// The sandbox of a chat whose record cannot be understood is on no list of
// records, and still no orphan. Health says what to do about it.
func TestRun_leavesTheSandboxOfADamagedRecordAlone(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA), created(createOf(chatB)), created(createOf(chatC)))
		w.driver.Forget(w.standing(chatC).SessionID.String())
		w.store.Damage(chatB)
		w.store.Damage(chatC)
		stop := run(t, w.Scheduler)
		w.driver.Plant(orphanOf(chatA)) // which is one
		pass(5 * time.Minute)
		must.Eq(t, []string{"chat-a s1", "chat-b s2"}, w.running())
		must.Eq(t, []string{"chat-a s1 running"}, w.reasons())
		for _, chat := range []uuid.UUID{chatB, chatC} {
			must.ErrorContains(t, w.Health(t.Context()), "run: bivouac operator repair "+chat.String())
			_, err := w.Repair(t.Context(), chat)
			must.NoError(t, err)
		}
		pass(time.Minute)
		must.NoError(t, w.Health(t.Context()))
		must.Eq(t, []string{"chat-a s1 running", "chat-b s2 running"}, w.reasons())
		stop()
	})
}

// A start that takes its time is not taken for one that was left behind.
func TestRun_catchesUpOnNothingThatIsUnderWay(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.effects.before("driver.create", func() { time.Sleep(4 * time.Minute) })
		stop := run(t, w.Scheduler)
		res, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultCreated, res.Result)
		must.Eq(t, []string{"chat-a s1"}, w.running())
		stop()
	})
}
