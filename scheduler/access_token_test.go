package scheduler_test

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// specKeeper remembers the spec of each create.
type specKeeper struct {
	*fakeruntime.Driver
	specs []runtime.Spec
}

func (k *specKeeper) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	k.specs = append(k.specs, spec)
	return k.Driver.Create(ctx, spec, progress)
}

// newWorldOfSpecs returns a world, and what remembers the specs of its sandboxes.
func newWorldOfSpecs(t *testing.T) (*world, *specKeeper) {
	keeper := &specKeeper{}
	w := newWorld(t, func(c *scheduler.Config) {
		keeper.Driver = c.Drivers["fake"].(*fakeruntime.Driver)
		c.Drivers["fake"] = keeper
	})
	return w, keeper
}

func TestAccessToken(t *testing.T) {
	t.Run("is_random_and_reaches_the_sandbox_with_its_intent", func(t *testing.T) {
		w, keeper := newWorldOfSpecs(t)
		var intent runtime.Secret
		w.effects.before("driver.create", func() { intent = w.standing(chatA).AccessToken })

		res, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		other, err := w.Create(t.Context(), someCreate())
		must.NoError(t, err)

		must.RegexMatch(t, regexp.MustCompile(`^[0-9a-f]{64}$`), string(res.Session.AccessToken))
		must.NotEq(t, res.Session.AccessToken, other.Session.AccessToken)
		must.Eq(t, res.Session.AccessToken, intent)
		must.Eq(t, res.Session.AccessToken, keeper.specs[0].AccessToken)
		must.NoError(t, keeper.specs[0].Validate())
	})
	t.Run("stays_with_the_session", func(t *testing.T) {
		w := newWorld(t)
		res, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		token := res.Session.AccessToken

		_, err = w.Renew(t.Context(), chatA, maxTTL)
		must.NoError(t, err)
		w.driver.Lose(res.Session.SessionID.String(), "node down")
		got, _, err := w.Get(t.Context(), chatA, scheduler.Block{})
		must.NoError(t, err)
		must.Eq(t, token, got.AccessToken)
		w.driver.Regain(res.Session.SessionID.String())
		reused, err := w.peer().Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultReused, reused.Result)
		must.Eq(t, token, reused.Session.AccessToken)
	})
	t.Run("is_another_one_after_a_replacement", func(t *testing.T) {
		w, keeper := newWorldOfSpecs(t)
		w.given(created(createA), killed("exit code 1"))
		res, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultReplaced, res.Result)
		must.NotEq(t, keeper.specs[0].AccessToken, keeper.specs[1].AccessToken)
		must.Eq(t, keeper.specs[1].AccessToken, res.Session.AccessToken)
	})
	t.Run("is_not_passed_on_from_a_start_that_was_abandoned", func(t *testing.T) {
		w, keeper := newWorldOfSpecs(t)
		w.given(abandonedStart)
		res, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.NotEq(t, keeper.specs[0].AccessToken, res.Session.AccessToken)
		must.Eq(t, keeper.specs[1].AccessToken, res.Session.AccessToken)
	})
	t.Run("is_the_one_on_record_if_the_answer_to_its_write_was_lost", func(t *testing.T) {
		w := newWorld(t)
		w.given(failsAfter("write running + release", scheduler.ErrUnavailable))
		res, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, w.standing(chatA).AccessToken, res.Session.AccessToken)
	})
	t.Run("is_returned_only_to_callers_that_may_write", func(t *testing.T) {
		w := newWorld(t)
		res, err := w.Create(as(t, rule("agent-", scheduler.CapWrite)), createA)
		must.NoError(t, err)
		must.NotEq(t, "", string(res.Session.AccessToken))
		for capabilities, token := range map[scheduler.Capabilities]runtime.Secret{
			scheduler.CapWrite: res.Session.AccessToken,
			scheduler.CapRead:  "",
			scheduler.CapRead | scheduler.CapLogs | scheduler.CapExec: "",
		} {
			got, _, err := w.Get(as(t, rule("agent-", capabilities)), chatA, scheduler.Block{})
			must.NoError(t, err)
			must.Eq(t, token, got.AccessToken)
			must.Eq(t, res.Session.SessionID, got.SessionID)
		}
	})
	t.Run("is_not_part_of_an_index", func(t *testing.T) {
		w := newWorld(t)
		reader := as(t, rule("agent-", scheduler.CapRead))
		w.given(created(createA))
		_, index, err := w.Get(reader, chatA, scheduler.Block{})
		must.NoError(t, err)
		w.given(func(w *world) {
			lease, err := w.peer().locker.Lock(t.Context(), chatA, 0)
			must.NoError(t, err)
			session := *lease.Session()
			session.AccessToken = runtime.Secret(strings.Repeat("5e", 32))
			must.NoError(t, lease.Write(t.Context(), &session, scheduler.Release))
		})
		_, again, err := w.Get(reader, chatA, scheduler.Block{})
		must.NoError(t, err)
		must.Eq(t, index, again, must.Sprint("an index that depends on the token would tell something of it"))
	})
	t.Run("is_lost_with_its_record", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA), unrecorded(chatA))
		res, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultReused, res.Result)
		must.Eq(t, "", string(res.Session.AccessToken))
	})
}

// TestAccessToken_isNotShown takes sessions through all that can happen to them. No
// log, span, metric or error contains an access token, and neither does what prints a
// session or a spec.
func TestAccessToken_isNotShown(t *testing.T) {
	w, keeper := newWorldOfSpecs(t)
	var shown strings.Builder
	show := func(values ...any) {
		for _, e := range w.seen.events {
			fmt.Fprintln(&shown, append([]any{e.name}, e.args...)...)
		}
		for _, value := range append(values, w.outcome("", nil)) {
			fmt.Fprintf(&shown, "%v %+v %#v\n", value, value, value)
		}
	}

	show(w.Create(t.Context(), createA))
	other := createA
	other.AgentID = "agent-2"
	_, err := w.Create(t.Context(), other)
	conflict, ok := errors.AsType[*scheduler.ConflictError](err)
	must.True(t, ok)
	show(err, *conflict)
	show(w.Renew(t.Context(), chatA, maxTTL))
	killed("exit code 1")(w)
	show(w.Create(t.Context(), createA))
	show(w.List(t.Context(), scheduler.Query{PerPage: 10}))
	unrecorded(chatA)(w)
	show(w.Adopt(t.Context()))
	abandonedStop(w)
	show(w.SettleInFlight(t.Context()))
	w.effects.fail("driver.create", runtime.ErrNotReady)
	show(w.Create(t.Context(), createA))
	show(keeper.specs)

	for _, event := range []string{"sandbox_created", "sandbox_conflict", "sandbox_renewed", "sandbox_replaced", "sandbox_adopted",
		"sandbox_delete_failed", "sandbox_settled", "sandbox_create_failed", "redacted"} {
		must.StrContains(t, shown.String(), event)
	}
	must.Len(t, 3, keeper.specs)
	for _, spec := range keeper.specs {
		must.StrNotContains(t, shown.String(), string(spec.AccessToken))
	}
}
