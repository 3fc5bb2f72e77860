package storetest

import (
	"testing"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

// scans reads all records shard by shard, while some are damaged.
func scans(t *testing.T, c Cluster) {
	store := c.Join(t)
	want := make(map[uuid.UUID]scheduler.Session)
	for i := range 50 {
		session := newSession()
		put(t, store, session)
		if i%10 == 0 {
			c.Damage(t, session.ChatID)
			session = scheduler.Session{}
		}
		want[session.ChatID] = session
	}
	delete(want, uuid.Nil)

	got := make(map[uuid.UUID]scheduler.Session)
	damaged := 0
	for shard := 0; shard < scheduler.Shards; {
		part, next, err := store.Scan(t.Context(), shard)
		must.NoError(t, err)
		must.Greater(t, shard, next)
		shard, damaged = next, damaged+len(part.Damaged)
		for _, session := range part.Sessions {
			must.MapNotContainsKey(t, got, session.ChatID)
			got[session.ChatID] = session
		}
	}
	must.Eq(t, want, got)
	must.Eq(t, 5, damaged)
}
