package scheduler_test

import (
	"context"
	"strings"
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
// That chat's sandbox is neither handed out nor stopped, whatever is asked for.
func TestRecordThatNamesAnotherChatsSession(t *testing.T) {
	other := createA
	other.ChatID = chatB
	steal := func(state scheduler.State, expiry time.Duration) func(*world) {
		return func(w *world) {
			theirs := w.standing(chatB)
			edited(chatA, func(s *scheduler.Session) {
				s.SessionID, s.ContainerID, s.Endpoint = theirs.SessionID, theirs.ContainerID, theirs.Endpoint
				s.State, s.ExpiresAt = state, noon.Add(expiry)
			})(w)
		}
	}
	for _, state := range []scheduler.State{scheduler.StateRunning, scheduler.StateCreating, scheduler.StateStopping} {
		for _, expiry := range []time.Duration{time.Hour, -time.Hour} {
			w := newWorld(t)
			w.given(created(createA), created(other), steal(state, expiry))
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
			reused, err := w.Create(t.Context(), other)
			must.NoError(t, err)
			must.Eq(t, scheduler.ResultReused, reused.Result)
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
// records, and still no orphan.
func TestRun_leavesTheSandboxOfADamagedRecordAlone(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA))
		w.driver.Plant(orphanOf(chatB))
		w.effects.hook(effect{chatB, "lock"}, hook{before: func(context.Context) error { return scheduler.ErrDamaged }})
		stop := run(t, w.Scheduler)
		w.driver.Plant(orphanOf(chatC)) // which is one
		pass(5 * time.Minute)
		must.Eq(t, []string{"chat-a s1", "chat-b unwritten"}, w.running())
		told := false
		for _, warning := range w.warnings() {
			told = told || strings.HasPrefix(warning, "sandbox_orphan_failed") && strings.HasSuffix(warning, "error=damaged_record")
		}
		must.True(t, told)
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
