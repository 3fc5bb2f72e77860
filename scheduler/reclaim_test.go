package scheduler_test

import (
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// What a create, a delete and a cleanup do about a chat's sandboxes that its
// record does not name, without waiting for a pass.
func TestReclaim(t *testing.T) {
	t.Run("a_create_reuses_the_sandbox_whose_record_is_gone", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA), unrecorded(chatA))
		res, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultReused, res.Result)
		must.Eq(t, []string{"chat-a s1 running container-1 12:30:00"}, w.records())
		must.Eq(t, []string{
			"get", "lock", "driver.find", "write running", "driver.inspect", "release",
		}, w.effects.taken()[:6])
		must.Eq(t, 1, w.driver.MostPerChat())
	})

	t.Run("a_create_with_other_parameters_is_a_conflict_with_it", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA), unrecorded(chatA))
		other := createA
		other.AgentID = "agent-2"
		_, err := w.Create(t.Context(), other)
		must.ErrorIs(t, err, scheduler.ErrConflict)
		must.Eq(t, []string{"chat-a s1"}, w.running())
	})

	t.Run("a_create_takes_the_newest_and_ends_the_others_first", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA), unrecorded(chatA))
		older := orphanOf(chatA)
		older.CreatedAt = noon.Add(-time.Minute)
		w.driver.Plant(older)
		res, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultReused, res.Result)
		must.Eq(t, []string{"chat-a s1"}, w.running())
	})

	t.Run("a_create_ends_what_cannot_be_adopted_before_it_writes_its_intent", func(t *testing.T) {
		w := newWorld(t)
		orphan := w.driver.Plant(orphanOf(chatA))
		w.driver.Edit(orphan.SessionID, func(s *runtime.Sandbox) { s.AgentID = "" })
		w.effects.before("write creating", func() { must.SliceEmpty(t, w.running()) })
		res, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultCreated, res.Result)
		must.Eq(t, 1, w.driver.MostPerChat())
	})

	t.Run("a_create_starts_nothing_if_that_cannot_be_ended_or_looked_for", func(t *testing.T) {
		for _, effect := range []string{"driver.delete", "driver.find"} {
			w := newWorld(t)
			orphan := w.driver.Plant(orphanOf(chatA))
			w.driver.Edit(orphan.SessionID, func(s *runtime.Sandbox) { s.State = runtime.StateLost })
			w.effects.fail(effect, runtime.ErrUnavailable)
			_, err := w.Create(t.Context(), createA)
			must.ErrorIs(t, err, runtime.ErrUnavailable)
			must.SliceEmpty(t, w.records())
			must.Eq(t, 1, w.driver.Created())
		}
	})

	t.Run("a_create_that_replaces_an_expired_session_ends_a_second_sandbox_too", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA), later(defaultTTL))
		w.driver.Plant(orphanOf(chatA))
		res, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultReplaced, res.Result)
		must.Eq(t, []string{"chat-a s2"}, w.running())
	})

	t.Run("an_intent_that_was_set_back_makes_way_and_its_late_start_fails", func(t *testing.T) {
		w := newWorld(t)
		intent := uuid.New()
		w.given(created(createA), edited(chatA, func(s *scheduler.Session) {
			s.SessionID, s.State, s.ContainerID, s.Endpoint = intent, scheduler.StateCreating, "", runtime.Endpoint{}
		}))
		res, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultReused, res.Result)
		late := orphanOf(chatA)
		late.SessionID = intent.String()
		_, err = w.driver.Create(t.Context(), late, func(runtime.Stage) {})
		must.ErrorIs(t, err, runtime.ErrConflict)
	})

	t.Run("settling_and_cleaning_up_a_record_that_was_set_back_end_nothing", func(t *testing.T) {
		for _, state := range []scheduler.State{scheduler.StateRunning, scheduler.StateCreating, scheduler.StateStopping} {
			w := newWorld(t)
			w.given(created(createA), edited(chatA, func(s *scheduler.Session) {
				s.SessionID, s.State, s.ExpiresAt = uuid.New(), state, noon
			}))
			must.NoError(t, w.SettleInFlight(t.Context()))
			_, err := w.CleanupExpired(t.Context())
			must.NoError(t, err)
			must.Eq(t, []string{"chat-a s1"}, w.running())
			must.Eq(t, []string{"chat-a s1 running container-1 12:30:00"}, w.records())
		}
	})

	t.Run("a_delete_ends_the_sandbox_whose_record_is_gone", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA), unrecorded(chatA))
		res, err := w.Delete(t.Context(), chatA)
		must.NoError(t, err)
		must.True(t, res.Found)
		must.Eq(t, "container-1", res.ContainerID)
		must.SliceEmpty(t, w.running())
		must.SliceEmpty(t, w.records())
	})

	t.Run("a_delete_ends_a_second_sandbox_of_the_chat_too", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA))
		w.driver.Plant(orphanOf(chatA))
		_, err := w.Delete(t.Context(), chatA)
		must.NoError(t, err)
		must.SliceEmpty(t, w.running())
	})
}

// A runtime that forgets a sandbox, as by "nomad job stop -purge", does not end it.
func TestSandboxThatItsRuntimeForgotAndThatAnswers(t *testing.T) {
	hidden := func(w *world) { w.driver.Hide(w.standing(chatA).SessionID.String()) }
	ends := func(w *world, after time.Duration) {
		id := w.standing(chatA).SessionID.String()
		time.AfterFunc(after, func() { w.driver.Kill(id, "exit code 0") })
	}
	t.Run("is_replaced_once_it_no_longer_answers", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			w.given(created(createA), hidden)
			ends(w, 4*time.Second)
			began := time.Now()
			res, err := w.Create(t.Context(), createA)
			must.NoError(t, err)
			must.Eq(t, scheduler.ResultReplaced, res.Result)
			must.GreaterEq(t, 4*time.Second, time.Since(began))
			must.Eq(t, 1, w.driver.MostPerChat())
			effects := w.effects.taken()
			must.SliceNotContains(t, effects, "driver.stop", must.Sprint("no session ID is used up"))
			must.SliceNotContains(t, effects, "driver.delete")
		})
	})
	t.Run("is_waited_for_a_minute_and_nothing_is_started", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			w.given(created(createA), hidden)
			began := time.Now()
			_, err := w.Create(t.Context(), createA)
			must.ErrorIs(t, err, runtime.ErrUnavailable)
			must.ErrorContains(t, err, "still answers at 127.0.0.1:20001")
			must.Eq(t, time.Minute, time.Since(began))
			_, err = w.Delete(t.Context(), chatA)
			must.ErrorIs(t, err, runtime.ErrUnavailable)
			must.Eq(t, 1, w.driver.Created())

			stop := run(t, w.Scheduler) // settles it once it has ended
			ends(w, time.Minute)
			pass(2 * time.Minute)
			must.SliceEmpty(t, w.records())
			stop()
		})
	})
}

func TestAdopt(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA), unrecorded(chatA), created(createOf(chatB)))
	w.driver.Plant(orphanOf(chatB))
	foreign := orphanOf(chatC)
	foreign.ChatID = uuid.Nil.String()
	w.driver.Plant(foreign)

	res, err := w.Adopt(t.Context())

	must.NoError(t, err)
	must.Len(t, 1, res.Adopted)
	must.Eq(t, w.standing(chatA), res.Adopted[0])
	must.Len(t, 2, res.Left)
	must.StrContains(t, res.Left[0].Reason, "Bivouac did not make this sandbox")
	must.StrContains(t, res.Left[1].Reason, "stopped: the chat has session")
	must.Eq(t, []string{"00000000-0000-0000-0000-000000000000 unwritten", "chat-a s1", "chat-b s2"}, namedAll(w))

	w.effects.fail("driver.list", runtime.ErrUnavailable)
	_, err = w.Adopt(t.Context())
	must.ErrorIs(t, err, runtime.ErrUnavailable)
}

func namedAll(w *world) []string {
	var lines []string
	for _, s := range w.driver.Running() {
		line := w.name(s.ChatID + " " + s.SessionID)
		if s.ChatID == uuid.Nil.String() {
			line = s.ChatID + " unwritten"
		}
		lines = append(lines, line)
	}
	slices.Sort(lines)
	return lines
}

func TestRepair(t *testing.T) {
	spoiled := func(w *world) { w.store.Damage(chatA) }
	for _, tc := range []struct {
		name    string
		given   []func(*world)
		want    scheduler.RepairOutcome
		records []string
		running []string
	}{
		{"writes_a_damaged_record_anew", []func(*world){created(createA), spoiled}, scheduler.RepairAdopted,
			[]string{"chat-a s1 running container-1 12:30:00"}, []string{"chat-a s1"}},
		{"removes_a_damaged_record_without_a_sandbox", []func(*world){created(createA), forgotten, spoiled}, scheduler.RepairRemoved, nil, nil},
		{"changes_nothing_that_is_well", []func(*world){created(createA)}, scheduler.RepairIntact,
			[]string{"chat-a s1 running container-1 12:30:00"}, []string{"chat-a s1"}},
		{"heals_an_edited_session_ID", []func(*world){created(createA), edited(chatA, func(s *scheduler.Session) { s.SessionID = uuid.New() })},
			scheduler.RepairAdopted, []string{"chat-a s1 running container-1 12:30:00"}, []string{"chat-a s1"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.given(tc.given...)
			res, err := w.Repair(t.Context(), chatA)
			must.NoError(t, err)
			must.Eq(t, tc.want, res.Result)
			must.Eq(t, tc.records, w.records())
			must.Eq(t, tc.running, w.running())
			if tc.want != scheduler.RepairRemoved {
				must.Eq(t, new(w.standing(chatA)), res.Session)
			}
			_, err = w.Create(t.Context(), createA)
			must.NoError(t, err)
			must.Eq(t, 1, w.driver.MostPerChat())
		})
	}

	t.Run("finds_the_sandbox_also_where_the_runtime_must_list", func(t *testing.T) {
		w := newWorld(t, func(c *scheduler.Config) {
			c.Drivers = map[string]runtime.Driver{"fake": struct{ runtime.Driver }{c.Drivers["fake"]}}
		})
		w.given(created(createA), spoiled)
		res, err := w.Repair(t.Context(), chatA)
		must.NoError(t, err)
		must.Eq(t, scheduler.RepairAdopted, res.Result)
	})

	t.Run("tells_of_a_chat_without_a_session", func(t *testing.T) {
		_, err := newWorld(t).Repair(t.Context(), chatA)
		must.ErrorIs(t, err, scheduler.ErrNotFound)
	})
}
