package scheduler_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

func orphanOf(chat uuid.UUID) runtime.Spec {
	return runtime.Spec{SessionID: uuid.NewString(), ChatID: chat.String(), AgentID: "agent-1", VolumeHostPath: "/data/a"}
}

func TestRun_stopsSandboxesThatHaveNoRecord(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA))
		stop := run(t, w.Scheduler)
		pass(time.Second)
		w.driver.Plant(orphanOf(chatA)) // of a chat that has another one on record
		w.driver.Plant(orphanOf(chatB))

		pass(59 * time.Second)
		must.Len(t, 3, w.running(), must.Sprint("one look is not enough"))
		pass(time.Minute)

		must.Eq(t, []string{"chat-a s1"}, w.running())
		must.Eq(t, []string{"chat-a s1 running"}, w.reasons())
		stop()
	})
}

// Each runtime's sandboxes are looked at for themselves.
func TestRun_stopsOrphansOfEveryRuntime(t *testing.T) {
	second := fakeruntime.New("second")
	several := func(c *scheduler.Config) {
		c.Drivers = map[string]runtime.Driver{"fake": c.Drivers["fake"], "second": second}
	}
	inBubbleWith(t, several, func(t *testing.T, w *world) {
		w.given(created(createA))
		stop := run(t, w.Scheduler)
		pass(time.Second)
		w.driver.Plant(orphanOf(chatB))
		second.Plant(orphanOf(chatC))

		pass(2 * time.Minute)

		must.Eq(t, []string{"chat-a s1"}, w.running())
		must.SliceEmpty(t, second.Running())
		stop()
	})
}

// A record that was edited to name another chat's session leaves its own sandbox
// without a record. That one is not stopped for it.
func TestRun_leavesAloneTheSandboxOfAnEditedRecord(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		other := createA
		other.ChatID = chatB
		w.given(created(createA), created(other))
		lease, err := w.peer().locker.Lock(t.Context(), chatA, 0)
		must.NoError(t, err)
		edited := *lease.Session()
		session, _, err := w.Get(t.Context(), chatB, scheduler.Block{})
		must.NoError(t, err)
		edited.SessionID = session.SessionID
		must.NoError(t, lease.Write(t.Context(), &edited, scheduler.Release))

		stop := run(t, w.Scheduler)
		pass(5 * time.Minute)

		must.Len(t, 2, w.running())
		must.SliceContains(t, w.warnings(), "sandbox_orphan_failed session_id=s1 container_id=container-1 error=damaged_record")
		stop()
	})
}

// Orphans that cannot be stopped do not keep others from being.
func TestRun_stopsAnOrphanBehindThoseThatItCannotStop(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA))
		stop := run(t, w.Scheduler)
		for range 17 {
			stuck := orphanOf(chatC)
			stuck.ChatID = "of no chat"
			w.driver.Plant(stuck)
		}
		pass(3 * time.Minute)
		w.driver.Plant(orphanOf(chatB))
		pass(4 * time.Minute)
		must.Len(t, 18, w.running())
		must.SliceNotContains(t, w.running(), "chat-b unwritten")
		stop()
	})
}

func TestRun_looksAgainUnderTheLockBeforeItStopsAnOrphan(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		stop := run(t, w.Scheduler)
		pass(time.Second)
		sandbox := w.driver.Plant(orphanOf(chatB))
		w.effects.hook(effect{chatB, "lock"}, hook{before: func(ctx context.Context) error {
			lease, err := w.peer().locker.Lock(ctx, chatB, 0)
			must.NoError(t, err)
			return lease.Write(ctx, &scheduler.Session{
				SessionID: uuid.MustParse(sandbox.SessionID), ChatID: chatB, AgentID: "agent-1", VolumeHostPath: "/data/a",
				Runtime: "fake", ContainerID: sandbox.ContainerID, Endpoint: sandbox.Endpoint,
				CreatedAt: time.Now(), ExpiresAt: time.Now().Add(time.Hour), State: scheduler.StateRunning,
			}, scheduler.Release)
		}})

		pass(3 * time.Minute)

		must.Eq(t, []string{"chat-b unwritten"}, w.running())
		must.Eq(t, []string{"chat-b unwritten running"}, w.reasons())
		stop()
	})
}

func TestRun_stopsNothingWhereAReadFails(t *testing.T) {
	for _, read := range []string{"list", "driver.list"} {
		for _, f := range []func(string, error) func(*world){fails, failsAfter} {
			inBubble(t, func(t *testing.T, w *world) {
				w.given(created(createA), f(read, errors.New("of no known kind")))
				stop := run(t, w.Scheduler)
				w.driver.Plant(orphanOf(chatB))
				pass(10 * time.Minute)
				must.Len(t, 2, w.running())
				must.SliceContains(t, w.warnings(), "reconcile_failed runtime=fake error=internal")
				stop()
			})
		}
	}
}

func TestRun_standsStillWhereAllRecordsAreGone(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		for range 17 {
			w.driver.Plant(orphanOf(uuid.New()))
		}
		stop := run(t, w.Scheduler)
		pass(10 * time.Minute)
		must.Len(t, 17, w.running())
		must.SliceContains(t, w.warnings(), "reconcile_failed runtime=fake error=store_unavailable")

		_, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		pass(time.Minute)
		must.Len(t, 2, w.running(), must.Sprint("16 a pass, and the one on record"))
		pass(time.Minute)
		must.Eq(t, []string{"chat-a s1"}, w.running())
		stop()
	})
}

func TestRun_standsStillWhereTheRecordsOfWhatRunsVanish(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA))
		stop := run(t, w.Scheduler)
		pass(time.Second)
		lease, err := w.peer().locker.Lock(t.Context(), chatA, 0)
		must.NoError(t, err)
		must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))

		pass(10 * time.Minute)
		must.Eq(t, []string{"chat-a s1"}, w.running())
		must.SliceContains(t, w.warnings(), "reconcile_failed runtime=fake error=store_unavailable")

		// One record shows that the store is not empty: what has none is an orphan.
		other := createA
		other.ChatID = chatB
		_, err = w.Create(t.Context(), other)
		must.NoError(t, err)
		pass(time.Minute)
		must.Eq(t, []string{"chat-b s2"}, w.running())
		stop()
	})
}

// As when the store was set back to an old state.
func TestRun_standsStillWhereMostRecordsVanish(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		vanish := []uuid.UUID{chatA, chatB}
		for _, chat := range append(vanish, chatC) {
			cmd := createA
			cmd.ChatID = chat
			w.given(created(cmd))
		}
		stop := run(t, w.Scheduler)
		pass(time.Second)
		for _, chat := range vanish {
			lease, err := w.peer().locker.Lock(t.Context(), chat, 0)
			must.NoError(t, err)
			must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))
		}

		pass(10 * time.Minute)

		must.Len(t, 3, w.running())
		must.SliceContains(t, w.warnings(), "reconcile_failed runtime=fake error=store_unavailable")
		stop()
	})
}

func TestRun_oneReplicaReconcilesAtATime(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		stop := run(t, w.Scheduler)
		pass(time.Second)
		second := w.peer()
		stopSecond := run(t, second.Scheduler)
		pass(10 * time.Minute)
		must.SliceEmpty(t, w.warnings())

		stop() // the other one takes over
		w.driver.Plant(orphanOf(chatB))
		pass(3 * time.Minute)
		must.SliceEmpty(t, w.running())
		stopSecond()
	})
}
