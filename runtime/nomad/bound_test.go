package nomad

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/runtime"
)

// A claim is known to the driver that made it, and to the helper on the spare's node.
func TestFindChat_finds_a_claimed_spare(t *testing.T) {
	claimedWorld := func(t *testing.T) *world {
		w := newWorld(t)
		w.register(t, ofPool(), nil)
		_, err := w.Claim(t.Context(), claimOf(chatID))
		must.NoError(t, err)
		return w
	}
	// events puts into a driver's cache what it would have read of Nomad.
	events := func(w *world, d *Driver) {
		d.cache.updateJob(w.job)
		d.cache.updateAlloc(w.spare)
		d.cache.setCurrent(true)
	}
	finds := func(t *testing.T, d *Driver, want ...runtime.Sandbox) {
		t.Helper()
		found, err := d.FindChat(t.Context(), chatID, "")
		must.NoError(t, err)
		must.Eq(t, want, found)
	}
	eventually := func(t *testing.T, done func() bool) {
		t.Helper()
		must.Wait(t, wait.InitialSuccess(wait.Timeout(time.Minute), wait.BoolFunc(done)))
	}
	awaitHeard := func(t *testing.T, d *Driver) {
		t.Helper()
		eventually(t, func() bool { return len(d.helpers.all()) == 2 && len(d.helpers.unheard()) == 0 })
	}
	t.Run("by_asking_the_helpers", func(t *testing.T) {
		w := claimedWorld(t)
		finds(t, w.another(t), claimed(w))
	})
	t.Run("without_asking_while_it_follows_them", func(t *testing.T) {
		w := claimedWorld(t)
		d := w.another(t)
		startFollowing(t, d)
		events(w, d)
		awaitHeard(t, d)
		w.helper.mu.Lock()
		w.helper.down = true
		asked := w.helper.asked
		w.helper.mu.Unlock()
		finds(t, d, claimed(w))
		must.Eq(t, asked, w.helper.asked)
	})
	t.Run("that_was_claimed_later", func(t *testing.T) {
		w := newWorld(t)
		w.register(t, ofPool(), nil)
		d := w.another(t)
		startFollowing(t, d)
		events(w, d)
		awaitHeard(t, d)
		finds(t, d)
		_, err := w.Claim(t.Context(), claimOf(chatID))
		must.NoError(t, err)
		eventually(t, func() bool {
			found, err := d.FindChat(t.Context(), chatID, "")
			return err == nil && len(found) == 1
		})
		finds(t, d, claimed(w))
		sandbox, err := d.Inspect(t.Context(), spareID)
		must.NoError(t, err)
		must.Eq(t, claimed(w), sandbox)
	})
	t.Run("unless_the_helper_is_down", func(t *testing.T) {
		w := claimedWorld(t)
		w.helper.down = true
		finds(t, w.another(t))
	})
	t.Run("unless_it_has_ended", func(t *testing.T) {
		w := claimedWorld(t)
		w.job.Stop, w.job.ModifyIndex = true, 9
		ended := *w.spare
		ended.ModifyIndex, ended.ClientStatus, ended.TaskStates = 9, "complete", nil
		w.spare = &ended
		finds(t, w.another(t))
		finds(t, w.Driver)
	})
	t.Run("or_fails_if_Nomad_cannot_tell_how_it_is", func(t *testing.T) {
		w := claimedWorld(t)
		w.broken = true
		_, err := w.another(t).FindChat(t.Context(), chatID, "")
		must.ErrorIs(t, err, runtime.ErrUnavailable)
	})
	t.Run("that_was_claimed_while_the_events_were_lost", func(t *testing.T) {
		w := claimedWorld(t)
		d := w.another(t)
		d.cache.setCurrent(true)
		startFollowing(t, d)
		awaitHeard(t, d) // it does not know the spare, and asks again
		d.cache.setCurrent(false)
		events(w, d)
		eventually(t, func() bool {
			sandbox, err := d.Inspect(t.Context(), spareID)
			return err == nil && sandbox.ChatID == chatID
		})
	})
	t.Run("that_was_claimed_for_another_chat_when_its_own_claim_is_refused", func(t *testing.T) {
		w := claimedWorld(t)
		d := w.another(t)
		events(w, d)
		_, err := d.Claim(t.Context(), claimOf("00000000-0000-4000-8000-000000000001"))
		must.ErrorIs(t, err, runtime.ErrConflict)
		sandbox, err := d.Inspect(t.Context(), spareID)
		must.NoError(t, err)
		must.Eq(t, claimed(w), sandbox)
		asked := len(w.helper.orders)
		_, err = d.Claim(t.Context(), claimOf("00000000-0000-4000-8000-000000000001"))
		must.ErrorIs(t, err, runtime.ErrConflict)
		must.ErrorContains(t, err, "it was given to chat "+chatID)
		must.Len(t, asked, w.helper.orders)
	})
	for name, change := range map[string]func(*nodeapi.Order){
		"that_is_on_another_node":     func(o *nodeapi.Order) { o.AllocID = "alloc-2" },
		"without_a_note":              func(o *nodeapi.Order) { o.Note = "" },
		"of_another_instance":         func(o *nodeapi.Order) { o.Note = strings.Replace(o.Note, `"test"`, `"other"`, 1) },
		"with_a_note_of_another_chat": func(o *nodeapi.Order) { o.ChatID = spareID },
	} {
		t.Run("believes_no_helper_about_a_spare_"+name, func(t *testing.T) {
			w := newWorld(t)
			w.register(t, ofPool(), nil)
			order, err := w.bindOrder(claimOf(chatID), w.spare)
			must.NoError(t, err)
			w.noteClaim("node-2", order)
			change(&order)
			w.noteClaim("node-1", order)
			sandbox, err := w.Inspect(t.Context(), spareID)
			must.NoError(t, err)
			must.Eq(t, "", sandbox.ChatID)
			must.Eq(t, "small", sandbox.Pool)
		})
	}
	t.Run("and_ends_with_its_context", func(t *testing.T) {
		w := claimedWorld(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := w.another(t).FindChat(ctx, chatID, "")
		must.True(t, errors.Is(err, context.Canceled))
	})
}
