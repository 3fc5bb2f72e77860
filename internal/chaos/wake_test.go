package main

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"
)

// A replica that is paused at any step for longer than its locks last finds, when it
// wakes up, that others have settled what it had begun, and does no harm.
func TestReplicaPausedAtEachStepDoesNoHarmWhenItWakes(t *testing.T) {
	// Given replicas that are paused in the middle of all operations but cleanup,
	// which deletes as delete does,
	w := testWorld(t)
	survivor := w.survivor(t, "survivor-0", "1h")
	victims := w.victims(t, halt, operations...)
	now := w.lookOn(t)
	each(t, victims, func(ctx context.Context, v *victim) error { return w.prepare(ctx, survivor, v) })
	each(t, victims, begin)
	each(t, victims, func(ctx context.Context, v *victim) error { return w.fall(ctx, t, v) })

	// and others that settle what they left.
	slept := time.Now()
	w.awaitAllSettled(t.Context(), victims, now)
	w.nameSettlers(t, victims)
	pause(t.Context(), time.Until(slept.Add(pastTTL)))

	// When they wake up and go on, their callers still there,
	each(t, victims, func(ctx context.Context, v *victim) error {
		if err := v.signal(syscall.SIGCONT); err != nil {
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
				// and what they answered is so.
				what, session := v.has(last.records)
				switch {
				case v.err != nil:
				case v.operation == "delete":
					must.Eq(t, nothing, what)
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

// wakeLimit bounds an operation with a pause in it.
const wakeLimit = 4 * time.Minute

// fall has the victim carry out its operation, and waits until it stands still in
// the middle of it.
func (w *world) fall(ctx context.Context, t *testing.T, v *victim) error {
	asking, cancel := context.WithTimeout(t.Context(), wakeLimit)
	v.answered = make(chan struct{})
	go func() {
		defer close(v.answered)
		v.session, v.err = w.ask(asking, v)
	}()
	t.Cleanup(func() { cancel(); <-v.answered })
	for stateOf(v.cmd.Process.Pid) != 'T' {
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
