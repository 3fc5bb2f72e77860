package scheduler_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// orphanOf is the spec of a sandbox of a chat that no record names. It is to be
// planted now.
func orphanOf(chat uuid.UUID) runtime.Spec {
	return runtime.Spec{
		SessionID: uuid.NewString(), ChatID: chat.String(), AgentID: "agent-1", VolumeHostPath: "/data/a",
		CreatedAt: time.Now().UTC(), ExpiresAt: time.Now().UTC().Add(time.Minute),
	}
}

// unrecorded removes a chat's record behind the scheduler's back.
func unrecorded(chat uuid.UUID) func(*world) {
	return func(w *world) {
		lease, err := w.peer().locker.Lock(context.Background(), chat, 0)
		must.NoError(w.t, err)
		must.NoError(w.t, lease.Write(context.Background(), nil, scheduler.Release))
	}
}

func createOf(chat uuid.UUID) scheduler.CreateCommand {
	cmd := createA
	cmd.ChatID = chat
	return cmd
}

func TestRun_sandboxWithoutARecord(t *testing.T) {
	t.Run("is_adopted_and_lives_on_as_a_session", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			w.given(created(createA))
			before := w.standing(chatA)
			stop := run(t, w.Scheduler)
			pass(time.Second)
			w.given(unrecorded(chatA))

			pass(59 * time.Second)
			must.SliceEmpty(t, w.records(), must.Sprint("one look is not enough"))
			pass(time.Minute)
			after := w.standing(chatA)
			must.Eq(t, time.Now().UTC().Add(defaultTTL), after.ExpiresAt, must.Sprint("its expiry may have been extended"))
			after.ExpiresAt = before.ExpiresAt
			before.AccessToken = "" // it is lost with the record
			must.Eq(t, before, after)
			must.Eq(t, []string{"chat-a s1"}, w.running())
			must.SliceContains(t, w.warnings(), "sandbox_adopted chat_id=chat-a session_id=s1 container_id=container-1 expires_at=2000-01-01 00:32:00 +0000 UTC")

			pass(defaultTTL + time.Minute) // nothing leaks for ever
			must.SliceEmpty(t, w.records())
			must.SliceEmpty(t, w.running())
			stop()
		})
	})

	t.Run("is_never_ended_because_the_store_lost_its_records", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			var chats []uuid.UUID
			for range 40 {
				chat := uuid.New()
				chats = append(chats, chat)
				w.given(created(createOf(chat)), unrecorded(chat))
			}
			w.given(created(createA)) // some records are there: the store is not empty
			stop := run(t, w.Scheduler)
			pass(2 * time.Minute)
			must.Len(t, 41, w.running())
			for _, chat := range chats {
				res, err := w.Create(t.Context(), createOf(chat))
				must.NoError(t, err)
				must.Eq(t, scheduler.ResultReused, res.Result)
			}
			must.Len(t, 41, w.running())
			stop()
		})
	})

	t.Run("is_stopped_if_its_chat_has_another", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			w.given(created(createA))
			stop := run(t, w.Scheduler)
			pass(time.Second)
			w.driver.Plant(orphanOf(chatA))
			pass(59 * time.Second)
			must.Len(t, 2, w.running(), must.Sprint("one look is not enough"))
			pass(time.Minute)
			must.Eq(t, []string{"chat-a s1"}, w.running())
			must.Eq(t, []string{"chat-a s1 running"}, w.reasons())
			stop()
		})
	})

	t.Run("is_stopped_if_it_started_long_after_its_create_was_given_up", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			stop := run(t, w.Scheduler)
			late := w.driver.Plant(orphanOf(chatB))
			w.driver.Edit(late.SessionID, func(s *runtime.Sandbox) { s.CreatedAt = s.CreatedAt.Add(-5 * time.Hour) })
			stuck := w.driver.Plant(orphanOf(chatC))
			w.driver.Edit(stuck.SessionID, func(s *runtime.Sandbox) { s.State = runtime.StateStarting })
			pass(2 * time.Minute)
			must.Eq(t, []string{"chat-c unwritten"}, w.running(), must.Sprint("a create may still wait for the other"))
			pass(5 * time.Minute)
			must.SliceEmpty(t, w.running())
			must.SliceEmpty(t, w.records())
			stop()
		})
	})

	t.Run("is_left_alone_and_told_of_if_nothing_says_what_it_was_created_for", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			stop := run(t, w.Scheduler)
			old := w.driver.Plant(orphanOf(chatB))
			w.driver.Edit(old.SessionID, func(s *runtime.Sandbox) { s.AgentID = "" })
			pass(10 * time.Minute)
			must.Eq(t, []string{"chat-b unwritten"}, w.running())
			must.ErrorContains(t, w.Health(t.Context()), "bivouac session delete "+chatB.String())

			deleted, err := w.Delete(t.Context(), chatB)
			must.NoError(t, err)
			must.True(t, deleted.Found)
			must.Eq(t, old.ContainerID, deleted.ContainerID)
			must.SliceEmpty(t, w.running())
			pass(time.Minute)
			must.NoError(t, w.Health(t.Context()))
			stop()
		})
	})

	t.Run("of_every_runtime_is_looked_at", func(t *testing.T) {
		second := fakeruntime.New("second")
		several := func(c *scheduler.Config) {
			c.Drivers = map[string]runtime.Driver{"fake": c.Drivers["fake"], "second": second}
		}
		inBubbleWith(t, several, func(t *testing.T, w *world) {
			w.given(created(createA))
			stop := run(t, w.Scheduler)
			pass(time.Second)
			w.driver.Plant(orphanOf(chatA))
			second.Plant(orphanOf(chatA)) // a record of the one runtime counts for the other
			pass(2 * time.Minute)
			must.Eq(t, []string{"chat-a s1"}, w.running())
			must.SliceEmpty(t, second.Running())
			stop()
		})
	})

	t.Run("is_looked_at_again_under_its_chats_lock", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			w.given(created(createA))
			stop := run(t, w.Scheduler)
			pass(time.Second)
			sandbox := w.driver.Plant(orphanOf(chatA))
			w.effects.hook(effect{chatA, "lock"}, hook{before: func(ctx context.Context) error {
				return w.driver.Stop(ctx, sandbox.SessionID)
			}})
			pass(3 * time.Minute)
			must.Eq(t, []string{"chat-a s1"}, w.running())
			must.SliceEmpty(t, w.warnings())
			stop()
		})
	})
}

// A record that names a session which does not run, while another one of the chat
// does, was edited or set back.
func TestRun_recordThatNamesAnotherSession(t *testing.T) {
	for name, spoil := range map[string]func(w *world){
		"an_edited_session_ID": edited(chatA, func(s *scheduler.Session) { s.SessionID = uuid.New() }),
		"the_session_of_another_chat": func(w *world) {
			theirs := w.standing(chatB).SessionID
			edited(chatA, func(s *scheduler.Session) { s.SessionID = theirs })(w)
		},
		"a_session_that_died_before": func(w *world) {
			old := w.standing(chatA)
			w.driver.Kill(old.SessionID.String(), "exit code 1")
			w.given(created(createA))
			edited(chatA, func(s *scheduler.Session) { *s = old })(w)
		},
	} {
		t.Run(name+"_ends_nothing_and_is_healed_by_a_create", func(t *testing.T) {
			inBubble(t, func(t *testing.T, w *world) {
				w.given(created(createA), created(createOf(chatB)), spoil)
				running := w.driver.Running()
				stop := run(t, w.Scheduler)
				pass(5 * time.Minute)
				must.Eq(t, running, w.driver.Running())
				must.ErrorContains(t, w.Health(t.Context()), "bivouac operator repair "+chatA.String())

				res, err := w.Create(t.Context(), createA)
				must.NoError(t, err)
				must.Eq(t, scheduler.ResultReused, res.Result)
				must.Eq(t, running, w.driver.Running())
				pass(time.Minute)
				must.NoError(t, w.Health(t.Context()))
				stop()
			})
		})
	}
}

// Sandboxes about which nothing can be done, and chats that somebody is at work
// on, do not keep others waiting.
func TestRun_orphansDoNotWaitForEachOther(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA))
		stop := run(t, w.Scheduler)
		pass(time.Second)
		for _, chatID := range []string{"of no chat", uuid.Nil.String(), uuid.Nil.String(), uuid.Nil.String()} {
			foreign := orphanOf(chatC)
			foreign.ChatID = chatID
			w.driver.Plant(foreign)
		}
		var held []scheduler.Lease
		for range 30 {
			chat := uuid.New()
			w.driver.Plant(orphanOf(chat))
			lease, err := w.peer().locker.Lock(t.Context(), chat, 0)
			must.NoError(t, err)
			held = append(held, lease)
		}
		w.driver.Plant(orphanOf(chatA))
		w.driver.Plant(orphanOf(chatB))

		pass(2*time.Minute + 5*time.Second)

		must.Eq(t, []string{"chat-a s1 running", "chat-b s2 running"}, w.reasons())
		must.Len(t, 36, w.running())
		must.ErrorContains(t, w.Health(t.Context()), uuid.Nil.String())
		must.ErrorContains(t, w.Health(t.Context()), "Bivouac did not make this sandbox")
		must.StrNotContains(t, w.Health(t.Context()).Error(), "lock", must.Sprint("that may pass"))
		pass(10 * time.Minute)
		must.ErrorContains(t, w.Health(t.Context()), "lock")
		must.ErrorContains(t, w.Health(t.Context()), "more sandboxes without a record")
		for _, lease := range held {
			must.NoError(t, lease.Release(t.Context()))
		}
		stop()
		must.NoError(t, w.Health(t.Context()), must.Sprint("another replica leads"))
	})
}

func TestRun_stopsNothingWhereAReadFails(t *testing.T) {
	for _, read := range []string{"scan", "driver.list"} {
		for _, f := range []func(string, error) func(*world){fails, failsAfter} {
			inBubble(t, func(t *testing.T, w *world) {
				w.given(created(createA), f(read, errors.New("of no known kind")))
				stop := run(t, w.Scheduler)
				w.driver.Plant(orphanOf(chatA))
				pass(10 * time.Minute)
				must.Len(t, 2, w.running())
				must.SliceContains(t, w.warnings(), "reconcile_failed runtime=fake error=internal")
				stop()
			})
		}
	}
}

// A pass may take a minute. What ends meanwhile is no sandbox without a record.
func TestRun_aSessionThatEndsDuringAPassIsNoOrphan(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA), created(createOf(chatB)))
		var once sync.Once
		w.effects.before("scan", func() {
			once.Do(func() {
				_, err := w.Delete(t.Context(), chatA)
				must.NoError(t, err)
			})
		})
		stop := run(t, w.Scheduler)
		pass(time.Second)
		must.Eq(t, []string{"chat-b s2 running"}, w.reasons())
		const found = "sandbox.orphan.found.total{runtime=fake} 1"
		counted, err := w.seen.takeMetrics()
		must.NoError(t, err)
		must.SliceNotContains(t, counted, found)

		w.driver.Plant(orphanOf(chatA))
		pass(time.Minute)
		counted, err = w.seen.takeMetrics()
		must.NoError(t, err)
		must.SliceContains(t, counted, found)
		stop()
	})
}

// A sandbox that cannot be looked at is as listed.
func TestRun_anOrphanThatCannotBeInspectedIsStillStopped(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA), fails("driver.inspect", runtime.ErrUnavailable))
		stop := run(t, w.Scheduler)
		w.driver.Plant(orphanOf(chatB))
		pass(time.Second)
		must.SliceEmpty(t, w.warnings(), must.Sprint("the pass goes on"))
		pass(3 * time.Minute)
		must.Eq(t, []string{"chat-a s1 running", "chat-b s2 running"}, w.reasons())
		stop()
	})
}

// What a pass has read of a session that is dead already needs no more questions.
func TestRun_asksNothingAboutSessionsThatAreAsRecorded(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		long := createOf(chatA)
		long.TTL = maxTTL
		w.given(created(long), created(createOf(chatB)), created(createOf(chatC)))
		stop := run(t, w.Scheduler)
		pass(time.Second)
		w.driver.Kill(w.standing(chatA).SessionID.String(), "exit code 1")
		w.driver.Forget(w.standing(chatB).SessionID.String())
		pass(2 * time.Minute)
		must.Eq(t, []string{
			"chat-a s1 dead exit code 1", "chat-b s2 lost the runtime no longer knows the sandbox", "chat-c s3 running",
		}, w.reasons())
		w.effects.taken()
		pass(10 * time.Minute)
		asked := w.effects.taken()
		must.SliceContains(t, asked, "scan")
		must.SliceNotContains(t, asked, "get")
		must.SliceNotContains(t, asked, "lock")
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
		must.Eq(t, []string{"1"}, w.seen.measured(t, "bivouac.leader"))

		stop() // the other one takes over
		must.Eq(t, []string{"0"}, w.seen.measured(t, "bivouac.leader"))
		w.driver.Plant(orphanOf(chatB))
		pass(3 * time.Minute)
		must.Eq(t, []string{"chat-b unwritten running"}, w.reasons())
		stopSecond()
	})
}

// largeStore is a store with a million records that say nothing new.
type largeStore struct {
	scheduler.Store
	scans *[]time.Duration // when each was made
	began time.Time
}

func (s largeStore) Scan(_ context.Context, shard int) (scheduler.Part, int, error) {
	*s.scans = append(*s.scans, time.Since(s.began))
	return scheduler.Part{Sessions: make([]scheduler.Session, 1_000_000/scheduler.Shards)}, shard + 1, nil
}

func TestRun_readsAMillionRecordsOverAMinute(t *testing.T) {
	var scans []time.Duration
	inBubbleWith(t, func(c *scheduler.Config) { c.Store = largeStore{c.Store, &scans, time.Now()} }, func(t *testing.T, w *world) {
		stop := run(t, w.Scheduler)
		pass(59 * time.Second)
		must.Between(t, 250, len(scans), scheduler.Shards)
		for i := range scans[1:] {
			must.Less(t, 250*time.Millisecond, scans[i+1]-scans[i])
		}
		stop()
	})
}
