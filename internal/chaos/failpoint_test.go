package main

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/shoenig/test/must"
)

// What a chat has in the end.
const (
	nothing    = "nothing"     // no record and no sandbox
	newSession = "new session" // one that stands, with its sandbox
	oldSession = "old session" // the one that stood before, untouched
	oldRecord  = "old record"  // that of a session whose sandbox has ended
)

// What a chat has before the operation.
const (
	fresh   = "fresh"   // nothing
	stands  = "stands"  // a session
	ended   = "ended"   // a session whose sandbox ended
	expired = "expired" // a session that has expired
)

// operations are what a replica is killed in the middle of: what the chat has
// before, and each of its steps with what the chat has once that is settled.
var operations = []struct {
	name   string
	before string
	steps  []step
}{
	{"create", fresh, []step{
		{"lock:before", nothing}, {"lock:after", nothing},
		{"write-creating:before", nothing}, {"write-creating:after", nothing},
		{"create:before", nothing}, {registered, nothing},
		{"create:placed", nothing}, {"create:ready", nothing}, {"create:after", nothing},
		{"write-running:before", nothing}, {"write-running:after", newSession},
	}},
	{"replace", ended, []step{
		{"lock:after", oldRecord}, {"write-stopping:before", oldRecord}, {"write-stopping:after", nothing},
		{"stop:before", nothing}, {"stop:after", nothing},
		{"write-creating:before", nothing}, {"write-creating:after", nothing},
		{registered, nothing}, {"create:after", nothing}, {"write-running:after", newSession},
	}},
	{"delete", stands, []step{
		{"lock:before", oldSession}, {"lock:after", oldSession},
		{"write-stopping:before", oldSession}, {"write-stopping:after", nothing},
		{"delete:before", nothing}, {deregistered, nothing}, {"delete:after", nothing},
		{"remove:before", nothing}, {"remove:after", nothing},
	}},
	{"cleanup", expired, []step{
		{"lock:after", nothing}, {"write-stopping:before", nothing}, {"write-stopping:after", nothing},
		{"stop:before", nothing}, {deregistered, nothing}, {"stop:after", nothing},
		{"remove:before", nothing}, {"remove:after", nothing},
	}},
	{"renew", stands, []step{
		{"lock:after", oldSession}, {"write-expiry:before", oldSession}, {"write-expiry:after", oldSession},
	}},
}

// step is a point of an operation, and what the chat has when a replica that was
// killed there is settled.
type step struct{ point, then string }

// Steps inside the driver are seen from what Nomad has carried out.
const (
	registered   = "job registered"
	deregistered = "job deregistered"
)

// A replica that is killed at any step leaves something that others settle.
func TestReplicaKilledAtEachStepIsSettledByOthers(t *testing.T) {
	w := testWorld(t)
	survivor := w.survivor(t, "survivor-0", "1h")
	victims := w.victims(t)
	w.census = newCensus(w.chats, w.log, w.told)
	w.watch(t.Context())
	t.Cleanup(w.halt)
	now := w.lookOn(t)

	// Given replicas that are killed in the middle of a cleanup, one after the
	// other, since each cleans up whatever has expired …
	prepare := func(ctx context.Context, v *victim) error { return w.prepare(ctx, survivor, v) }
	begin := func(ctx context.Context, v *victim) error { return v.begin(ctx) }
	settle := func(victims []*victim) {
		last := time.Now() // until now another may have died with this one's chat in its hands
		var all sync.WaitGroup
		for _, v := range victims {
			all.Go(func() { w.awaitSettled(t, v, last, now) })
		}
		all.Wait()
	}
	var cleaners, others []*victim
	for _, v := range victims {
		if v.operation != "cleanup" {
			others = append(others, v)
			continue
		}
		cleaners = append(cleaners, v)
		for _, do := range []func(context.Context, *victim) error{prepare, begin, w.die} {
			each(t, []*victim{v}, do)
		}
	}
	w.survivor(t, "survivor-1", "5s") // … and one that cleans up what they leave,
	settle(cleaners)
	// and then replicas that are killed in all other operations, all at once,
	each(t, others, prepare)
	each(t, others, begin)
	each(t, others, w.die)
	settle(others)
	w.nameSettlers(t, victims)
	t.Logf("\n%s", table(victims))

	t.Run("each", func(t *testing.T) {
		for _, v := range victims {
			t.Run(v.operation+" killed at "+v.point, func(t *testing.T) {
				t.Parallel()
				// then what it left in flight is settled within the limit, …
				must.Eq(t, "", v.left)
				// and a create gives the chat one sandbox.
				res, err := survivor.api.Create(t.Context(), v.chat, w.load.input("agent-1", time.Hour))
				must.NoError(t, err)
				must.NoError(t, w.load.knock(res.Session))
				if v.then == oldSession {
					must.Eq(t, v.old.SessionID, res.Session.SessionID)
				}
				_, err = survivor.api.Delete(t.Context(), v.chat)
				must.NoError(t, err)
			})
		}
	})
	must.Eq(t, 0, w.log.violations(), must.Sprint(w.log.worst()))
}
