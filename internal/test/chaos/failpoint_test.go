package main

import (
	"context"
	"slices"
	"testing"

	"github.com/shoenig/test/must"
)

// These constants are what a chat has in the end.
const (
	nothing    = "nothing"     // no record and no sandbox
	newSession = "new session" // a valid session with its sandbox
	oldSession = "old session" // the earlier session, untouched
	oldRecord  = "old record"  // the record of a session whose sandbox has ended
)

// These constants are what a chat has before the operation.
const (
	fresh   = "fresh"   // nothing
	stands  = "stands"  // a session
	ended   = "ended"   // a session whose sandbox ended
	expired = "expired" // a session that has expired
	intent  = "intent"  // an intent that a dead replica had not begun to carry out
)

// operation is an operation during which a replica is hit. It has what the chat
// has before it, and for each step what the chat has once that is settled.
type operation struct {
	name   string
	before string
	steps  []step
}

// cleanup covers all chats; the other operations are about one chat.
var cleanup = operation{"cleanup", expired, []step{
	{"lock:after", nothing}, {"write-stopping:before", nothing}, {"write-stopping:after", nothing},
	{"stop:before", nothing}, {deregistered, nothing}, {"stop:after", nothing},
	{"remove:before", nothing}, {"remove:after", nothing},
}}

// settling settles an intent that a dead replica recorded and did not begin.
// The tombstone keeps a registration that arrives later from running.
var settling = operation{"delete what is noted down", intent, []step{
	{tombstoned, nothing}, {"remove:before", nothing}, {"remove:after", nothing},
}}

// operations are all other operations.
var operations = []operation{
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
		{"delete:before", nothing}, {deregistered, nothing}, {purged, nothing}, {"delete:after", nothing},
		{"remove:before", nothing}, {"remove:after", nothing},
	}},
	{"delete nothing", fresh, []step{
		{"lock:after", nothing}, {"release:before", nothing}, {"release:after", nothing},
	}},
	{"renew", stands, []step{
		{"lock:after", oldSession}, {"write-expiry:before", oldSession}, {"write-expiry:after", oldSession},
	}},
}

// step is a point of an operation, and what the chat has after a replica was
// killed there and others have settled it.
type step struct{ point, then string }

// These steps are inside the driver. The test recognizes them by what Nomad has
// carried out.
const (
	registered   = "job registered"
	deregistered = "job deregistered"
	purged       = "job purged"
	tombstoned   = "tombstone laid"
)

// TestReplicaKilledAtEachStepIsSettledByOthers shows that other replicas settle
// what a replica leaves behind that is killed at any step.
func TestReplicaKilledAtEachStepIsSettledByOthers(t *testing.T) {
	w := testWorld(t)
	survivor := w.survivor(t, "survivor-0", "1h")
	cleaners, others := w.victims(t, kill, cleanup), w.victims(t, kill, operations...)
	settlers := w.victims(t, kill, settling)
	victims := slices.Concat(others, cleaners, settlers)
	now := w.lookOn(t)
	prepare := func(ctx context.Context, v *victim) error { return w.prepare(ctx, survivor, v) }

	// Given replicas that are killed during a cleanup. They go one after the
	// other, because each cleans up everything that has expired, also when it
	// starts …
	for _, v := range cleaners {
		for _, do := range []func(context.Context, *victim) error{begin, prepare, w.die} {
			each(t, []*victim{v}, do)
		}
	}
	w.survivor(t, "survivor-1", "5s") // … and a replica that cleans up what they leave,
	w.awaitAllSettled(t.Context(), cleaners, now)
	// and then replicas that are killed while they settle what another one
	// left,
	dieAndSettle := func(ctx context.Context, v *victim) error {
		err := w.die(ctx, v)
		w.awaitSettled(t.Context(), v, now) // each measured from its own death
		return err
	}
	each(t, settlers, func(ctx context.Context, v *victim) error { return w.leaveIntent(ctx, t, v) })
	each(t, settlers, begin)
	each(t, settlers, dieAndSettle)
	// and replicas in all other operations, all at once,
	each(t, others, prepare)
	each(t, others, begin)
	each(t, others, dieAndSettle)
	w.nameSettlers(t, victims)
	t.Logf("\n%s", table(victims))

	t.Run("each", func(t *testing.T) {
		for _, v := range victims {
			t.Run(v.operation+" killed at "+v.point, func(t *testing.T) {
				t.Parallel()
				// then what each left in flight is settled within the limit, …
				must.Eq(t, "", v.left)
				must.LessEq(t, settleLimit, v.took)
				// and a create gives the chat one sandbox.
				session := w.createsOne(t, survivor, v)
				if v.then == oldSession {
					must.Eq(t, v.old.SessionID, session)
				}
			})
		}
	})
	must.Eq(t, 0, w.log.violations(), must.Sprint(w.log.worst()))
}
