package main

import (
	"context"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"
)

// TestWarmSessionThatLostItsRecordIsFound deletes the record of a session whose sandbox was a
// spare. Only the node helper knows its chat then, and each replica finds it.
func TestWarmSessionThatLostItsRecordIsFound(t *testing.T) {
	w, helpers := poolWorld(t)
	c := w.newPoolCase(t, "lost", operation{claiming, fresh, []step{{"never", newSession}, {"never", newSession}}}, helpers)
	must.NoError(t, w.startSurvivorFirst(t.Context(), c))
	chat, input := uuid.New(), w.load.input("agent-1", time.Hour)
	made, err := c.victims[0].api.Create(t.Context(), chat, input)
	must.NoError(t, err)
	must.True(t, made.Session.Warm)

	for _, find := range []struct {
		by      string
		replica *replica
		before  func(context.Context, *timeline) error // after the loss; may be nil
	}{
		{"the replica that made it", c.victims[0].replica, nil},
		{"another replica", c.victims[1].replica, nil},
		{"a replica that has just started", c.survivor, c.survivor.restart},
	} {
		keys, _, err := w.kv.KV().Keys(c.prefix+"v1/sessions/", "", nil)
		must.NoError(t, err)
		must.SliceLen(t, 1, keys)
		must.StrHasSuffix(t, chat.String(), keys[0])
		_, err = w.kv.KV().Delete(keys[0], nil)
		must.NoError(t, err)
		if find.before != nil {
			must.NoError(t, find.before(t.Context(), w.log))
		}
		found, err := find.replica.api.Create(t.Context(), chat, input)
		must.NoError(t, err, must.Sprint(find.by))
		must.Eq(t, "reused", found.Result, must.Sprint(find.by))
		must.Eq(t, made.Session.SessionID, found.Session.SessionID)
		must.True(t, found.Session.Warm)
		must.NoError(t, w.load.knock(found.Session))
	}
	_, err = c.survivor.api.Delete(t.Context(), chat)
	must.NoError(t, err)
	for _, r := range []*replica{c.survivor, c.victims[0].replica, c.victims[1].replica} {
		must.NoError(t, r.Stop())
	}
	must.Eq(t, 0, w.log.violations(), must.Sprint(w.log.worst()))
}
