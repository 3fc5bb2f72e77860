package scheduler_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// labelled is createA with labels.
func labelled(labels map[string]string) scheduler.CreateCommand {
	cmd := createA
	cmd.Labels = labels
	return cmd
}

func TestCreate_labels(t *testing.T) {
	given := map[string]string{"ticket": "4711"}

	t.Run("stay_with_the_session_and_its_sandbox", func(t *testing.T) {
		w := newWorld(t)
		res, err := w.Create(t.Context(), labelled(given))
		must.NoError(t, err)
		must.Eq(t, given, res.Session.Labels)
		must.Eq(t, scheduler.DefaultOwner, res.Session.Owner)
		renewed, err := w.Renew(t.Context(), chatA, maxTTL)
		must.NoError(t, err)
		must.Eq(t, given, renewed.Labels)
		sandbox, err := w.driver.Inspect(t.Context(), res.Session.SessionID.String())
		must.NoError(t, err)
		must.Eq(t, given, sandbox.Labels)
		must.Eq(t, scheduler.DefaultOwner, sandbox.Owner)
	})
	for name, tc := range map[string]struct {
		first, again map[string]string
		conflict     bool
	}{
		"may_be_left_out_of_a_reuse":       {given, nil, false},
		"may_be_repeated_in_a_reuse":       {given, map[string]string{"ticket": "4711"}, false},
		"of_nothing_fit_a_session_without": {nil, map[string]string{}, false},
		"of_another_value_are_a_conflict":  {given, map[string]string{"ticket": "4712"}, true},
		"that_lack_one_are_a_conflict":     {given, map[string]string{}, true},
		"that_have_more_are_a_conflict":    {nil, given, true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.given(created(labelled(tc.first)))
			_, err := w.Create(t.Context(), labelled(tc.again))
			if !tc.conflict {
				must.NoError(t, err)
				return
			}
			conflict, ok := errors.AsType[*scheduler.ConflictError](err)
			must.True(t, ok)
			must.Eq(t, "labels", conflict.Reason)
		})
	}
	t.Run("are_not_passed_on_to_a_replacement", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(labelled(given)), later(defaultTTL))
		res, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultReplaced, res.Result)
		must.MapEmpty(t, res.Session.Labels)
	})
	t.Run("come_back_when_a_lost_record_is_written_again", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(labelled(given)))
		before := w.standing(chatA)
		w.store.Damage(chatA)
		res, err := w.Repair(t.Context(), chatA)
		must.NoError(t, err)
		must.Eq(t, scheduler.RepairAdopted, res.Result)
		before.AccessToken = "" // it is lost with the record
		must.Eq(t, before, w.standing(chatA))
	})
	t.Run("are_not_known_of_a_sandbox_that_does_not_tell", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(labelled(given)))
		w.driver.Edit(w.standing(chatA).SessionID.String(), func(s *runtime.Sandbox) { s.Owner, s.Labels = "", nil })
		w.store.Damage(chatA)
		_, err := w.Repair(t.Context(), chatA)
		must.NoError(t, err)
		must.Eq(t, scheduler.DefaultOwner, w.standing(chatA).Owner)
		must.MapEmpty(t, w.standing(chatA).Labels)
	})
}

// Health and the log report a record that only a newer version may read, the log
// once. Its sandbox is no orphan.
func TestRun_leavesARecordOfANewerVersionAlone(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.given(created(createA), created(createOf(chatB)))
		theirs := w.standing(chatB)
		w.store.Outdate(chatB)
		stop := run(t, w.Scheduler)
		pass(10 * time.Minute)

		must.Eq(t, []string{"chat-a s1", "chat-b s2"}, w.running())
		must.Eq(t, []string{"chat-a s1 running"}, w.reasons())
		must.ErrorContains(t, w.Health(t.Context()), fmt.Sprintf("the record of chat %s is of a newer version", chatB))
		must.Eq(t, []string{"record_newer chat_id=chat-b error=newer_record"}, w.warnings())
		w.driver.Kill(theirs.SessionID.String(), "killed")
		pass(10 * time.Minute)
		must.SliceEmpty(t, w.warnings(), must.Sprint("a newer replica tells of its end"))
		stop()
	})
}
