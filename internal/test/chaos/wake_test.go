package main

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/wire"
)

// TestReplicaPausedAtEachStepDoesNoHarmWhenItWakes pauses a replica at each
// step for longer than its locks last. When it continues, others have settled
// what it had begun, and it does no harm.
func TestReplicaPausedAtEachStepDoesNoHarmWhenItWakes(t *testing.T) {
	// Given replicas that are paused during a cleanup, and during all other
	// operations. The cleanups go one after the other, because each cleans up
	// everything that has expired, also when it starts,
	w := testWorld(t)
	survivor := w.survivor(t, "survivor-0", "1h")
	cleaners, others := w.victims(t, halt, cleanup, cleanupLate), w.victims(t, halt, operations...)
	victims := slices.Concat(others, cleaners)
	now := w.lookOn(t)
	prepare := func(ctx context.Context, v *victim) error { return w.prepare(ctx, survivor, v) }
	fall := func(ctx context.Context, v *victim) error { return w.fall(ctx, t, v) }
	for _, v := range cleaners {
		for _, do := range []func(context.Context, *victim) error{begin, prepare, fall} {
			each(t, []*victim{v}, do)
		}
	}
	each(t, others, prepare)
	each(t, others, begin)
	each(t, others, fall)

	// and others that settle what they left and replace a session that one was
	// about to end.
	slept := time.Now()
	w.survivor(t, "survivor-1", "5s")
	w.awaitAllSettled(t.Context(), victims, now)
	w.nameSettlers(t, victims)
	each(t, cleaners, func(ctx context.Context, v *victim) (err error) {
		if v.operation == cleanupLate.name {
			res, createErr := survivor.api.Create(ctx, v.chat, w.load.input("agent-1", time.Hour))
			v.next, err = res.Session, createErr
		}
		return err
	})
	pause(t.Context(), time.Until(slept.Add(pastTTL)))

	// When they continue and their callers still wait,
	each(t, victims, func(ctx context.Context, v *victim) error {
		if err := v.Resume(); err != nil {
			return err
		}
		select {
		case <-v.answered:
			return nil
		case <-ctx.Done():
			return errors.New("it does not answer")
		}
	})
	t.Logf("\n%s", table(victims))

	// then nothing is left over,
	woken := time.Now()
	each(t, victims, func(ctx context.Context, v *victim) error {
		for left := "not looked at"; left != ""; pause(ctx, 50*time.Millisecond) {
			if last := now(); last.began.After(woken) {
				left = v.leftover(last.records, last.left)
			}
			if time.Since(woken) > settleLimit {
				return errors.New(left)
			}
		}
		return nil
	})
	last := now()
	t.Run("each", func(t *testing.T) {
		for _, v := range victims {
			t.Run(v.operation+" paused at "+v.point, func(t *testing.T) {
				t.Parallel()
				must.Eq(t, "", v.left)
				// and their answers are true.
				what, session := v.has(last.records)
				switch {
				case v.err != nil: // it lost its lock or cannot know; no other error is allowed
					must.SliceContains(t, []wire.Code{wire.CodeLockLost, wire.CodeStoreUnavailable}, codeOf(v.err), must.Sprint(v.err))
				case v.operation == "delete", v.operation == "delete nothing", v.operation == cleanup.name:
					must.Eq(t, nothing, what)
				case v.operation == cleanupLate.name: // it leaves the new session alone
					must.Eq(t, v.next.SessionID, session)
					must.NoError(t, w.load.knock(v.next))
				default:
					must.NotEq(t, uuid.Nil, v.session)
					must.Eq(t, v.session, session)
				}
				if v.operation == "renew" {
					must.Eq(t, oldSession, what)
				}
				w.createsOne(t, survivor, v)
			})
		}
	})
	must.Eq(t, 0, w.log.violations(), must.Sprint(w.log.worst()))
}

// cleanupLate is a cleanup whose chat has another session by the time the
// replica continues.
var cleanupLate = operation{"cleanup of what is replaced", expired, cleanup.steps}

// wakeLimit limits an operation that includes a pause.
const wakeLimit = 4 * time.Minute

// fall lets the victim begin its operation and waits until it is paused in the
// middle of it.
func (w *world) fall(ctx context.Context, t *testing.T, v *victim) error {
	asking, cancel := context.WithTimeout(t.Context(), wakeLimit)
	v.answered = make(chan struct{})
	go func() {
		defer close(v.answered)
		v.session, v.err = w.ask(asking, v)
	}()
	t.Cleanup(func() { cancel(); <-v.answered })
	for stateOf(v.PID()) != 'T' {
		select {
		case <-v.answered:
			return errors.Join(errors.New("it was not paused"), v.err)
		case <-ctx.Done():
			return errors.New("it was not paused")
		case <-time.After(5 * time.Millisecond):
		}
	}
	v.died = time.Now()
	return nil
}
