package scheduler_test

import (
	"context"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// claimThatIsLost gives the only spare to chat A, and has the store lose the session. The
// record of the spare returns as change has it.
func (w *world) claimThatIsLost(t *testing.T, change func(*scheduler.Spare)) (spare uuid.UUID) {
	w.fill(t)
	spares, _, err := w.store.Spares(t.Context(), scheduler.Block{})
	must.NoError(t, err)
	_, err = w.Create(t.Context(), createA)
	must.NoError(t, err)
	lease, err := w.peer().locker.Lock(t.Context(), chatA, 0)
	must.NoError(t, err)
	must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))
	spares[0].Version = 0
	change(&spares[0])
	_, err = w.store.PutSpare(t.Context(), spares[0])
	must.NoError(t, err)
	return spares[0].SessionID
}

func TestClaimed_spare_that_lost_its_record_is_adopted(t *testing.T) {
	byCreate := func(t *testing.T, w *world) {
		got, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultReused, got.Result)
	}
	byLeader := func(t *testing.T, w *world) {
		defer run(t, w.Scheduler)()
		pass(3 * time.Minute)
	}
	for name, tc := range map[string]struct {
		returned func(*scheduler.Spare)
		regain   func(*testing.T, *world)
	}{
		"by the chat's next create":              {func(*scheduler.Spare) {}, byCreate},
		"by the leader":                          {func(*scheduler.Spare) {}, byLeader},
		"by the leader, of a spare in its start": {func(s *scheduler.Spare) { s.State, s.ContainerID = scheduler.SpareStarting, "" }, byLeader},
		"by the leader, of a spare in its end":   {func(s *scheduler.Spare) { s.State = scheduler.SpareEnding }, byLeader},
		"by the leader, of an old variant":       {func(s *scheduler.Spare) { s.Variant = "0" }, byLeader},
		"by the leader, of a pool that has gone": {func(s *scheduler.Spare) { s.Pool = "gone" }, byLeader},
	} {
		t.Run(name, func(t *testing.T) {
			inBubbleWith(t, pooled(1), func(t *testing.T, w *world) {
				id := w.claimThatIsLost(t, tc.returned)
				tc.regain(t, w)
				adopted := w.standing(chatA)
				must.Eq(t, id, adopted.SessionID)
				must.True(t, adopted.Warm)
				spare, chat, err := w.store.FindSpare(t.Context(), id)
				must.NoError(t, err)
				must.Nil(t, spare, must.Sprint("it would be given to another chat"))
				must.Eq(t, chatA, chat)
				must.SliceContains(t, w.running(), "chat-a s1")
			})
		})
	}
}

func TestCreate_leaves_the_spare_of_another_chat_alone(t *testing.T) {
	for name, tc := range map[string]struct {
		interceptor fakeruntime.Interceptor // of the create
		want        error
	}{
		"which the runtime refuses": {},
		"which does not answer":     {interceptor: fakeruntime.Fail(fakeruntime.OpClaim, fakeruntime.Before, runtime.ErrNotReady)},
		"which cannot be looked at": {
			interceptor: func(_ context.Context, call fakeruntime.Call) error {
				if call.Op == fakeruntime.OpClaim || call.Op == fakeruntime.OpInspect {
					return runtime.ErrUnavailable
				}
				return nil
			},
			want: runtime.ErrUnavailable,
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubbleWith(t, pooled(1), func(t *testing.T, w *world) {
				id := w.claimThatIsLost(t, func(*scheduler.Spare) {})
				c := w.peerConfig()
				pooled(1)(&c)
				other, err := scheduler.New(c) // which has not claimed it itself
				must.NoError(t, err)
				stop := run(t, other)
				pass(0)
				stop()
				w.driver.Intercept(tc.interceptor)
				got, err := other.Create(t.Context(), createOf(chatB))
				w.driver.Intercept(nil)
				if tc.want != nil {
					must.ErrorIs(t, err, tc.want)
				} else {
					must.NoError(t, err)
					must.False(t, got.Session.Warm)
					must.NotEq(t, id, got.Session.SessionID)
				}
				must.SliceEmpty(t, w.spares())
				// Whatever is left of the create is settled, and the sandbox stays.
				stop = run(t, other)
				pass(10 * time.Second)
				stop()
				again, err := w.Create(t.Context(), createA)
				must.NoError(t, err)
				must.Eq(t, id, again.Session.SessionID)
				_, err = other.Create(t.Context(), createOf(chatB))
				must.NoError(t, err)
			})
		})
	}
}
