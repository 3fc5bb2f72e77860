package scheduler_test

import (
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// renewSpan is the span of a renewal on chat A, with more attributes.
func renewSpan(failed string, more attrs) []span {
	spans := deleteSpan(failed, more)
	spans[0].Name = "usecase.renew_sandbox"
	return spans
}

func TestRenew(t *testing.T) {
	renewed := func(expiry string, effects ...string) outcome {
		return outcome{
			Result:  "renewed until " + expiry,
			Effects: effects,
			Spans:   renewSpan("", sessionAttrs(attrs{"sandbox.result": "renewed"})),
			Metrics: []string{"sandbox.active.count 1", "sandbox.renew.total{result=renewed} 1"},
			Logs: []string{"info sandbox_renewed chat_id=chat-a session_id=s1 container_id=container-1" +
				" expires_at=2030-03-01 " + expiry + " +0000 UTC"},
			Records: []string{"chat-a s1 running container-1 " + expiry},
			Running: []string{"chat-a s1"},
		}
	}
	refused := func(kind string, span attrs, record, running []string, effects ...string) outcome {
		active := "sandbox.active.count 1"
		if record == nil {
			active = "sandbox.active.count 0"
		}
		return outcome{
			Result:  "error " + kind,
			Effects: effects,
			Spans:   renewSpan(kind, span),
			Metrics: []string{active, "sandbox.renew.total{result=error} 1"},
			Logs:    []string{"warn sandbox_renew_failed chat_id=chat-a error=" + kind},
			Records: record,
			Running: running,
		}
	}
	standing, alive := []string{"chat-a s1 running container-1 12:30:00"}, []string{"chat-a s1"}
	written := []string{"lock", "driver.inspect", "write running + release"}
	intent := refused("not_found", nil, []string{"chat-a s1 creating  12:30:00"}, alive, "lock", "release")
	intent.Metrics[0] = "sandbox.active.count 0"

	for _, tc := range []struct {
		name  string
		given []func(*world)
		ttl   time.Duration
		want  outcome
	}{{
		name:  "by the default, from now on",
		given: []func(*world){created(createA), later(10 * time.Minute)},
		want:  renewed("12:40:00", written...),
	}, {
		name:  "by what is asked for",
		given: []func(*world){created(createA)},
		ttl:   maxTTL,
		want:  renewed("14:00:00", written...),
	}, {
		name:  "never to an earlier time",
		given: []func(*world){created(createA)},
		ttl:   time.Minute,
		want:  renewed("12:30:00", "lock", "driver.inspect", "release"),
	}, {
		name:  "up to its last moment",
		given: []func(*world){created(createA), later(defaultTTL - time.Second)},
		want:  renewed("12:59:59", written...),
	}, {
		name:  "where the runtime cannot tell: doubt is not death",
		given: []func(*world){created(createA), fails("driver.inspect", runtime.ErrUnavailable)},
		ttl:   time.Hour,
		want:  renewed("13:00:00", written...),
	}, {
		name: "not without a session",
		want: refused("not_found", nil, nil, nil, "lock", "release"),
	}, {
		name:  "not a start that is abandoned",
		given: []func(*world){abandonedStart},
		want:  intent,
	}, {
		name:  "not at its expiry",
		given: []func(*world){created(createA), later(defaultTTL)},
		want:  refused("expired", sessionAttrs(nil), standing, alive, "lock", "driver.inspect", "release"),
	}, {
		name:  "not with its sandbox dead",
		given: []func(*world){created(createA), killed("exit code 1")},
		want:  refused("not_running", sessionAttrs(nil), standing, nil, "lock", "driver.inspect", "release"),
	}, {
		name:  "not while it is being stopped",
		given: []func(*world){created(createA), abandonedStop},
		want: refused("not_running", sessionAttrs(nil), []string{"chat-a s1 stopping container-1 12:30:00"}, alive,
			"lock", "release"),
	}, {
		name:  "not where the lock does not come free",
		given: []func(*world){created(createA), fails("lock", scheduler.ErrLockTimeout)},
		want:  refused("lock_timeout", nil, standing, alive, "lock"),
	}, {
		name:  "not where it cannot be written",
		given: []func(*world){created(createA), fails("write running + release", scheduler.ErrUnavailable)},
		ttl:   time.Hour,
		want: refused("store_unavailable", sessionAttrs(nil), standing, alive,
			"lock", "driver.inspect", "write running + release", "release"),
	}, {
		name:  "not with the lock lost",
		given: []func(*world){created(createA), lockLost("write running + release")},
		ttl:   time.Hour,
		want: refused("lock_lost", sessionAttrs(nil), standing, alive,
			"lock", "driver.inspect", "write running + release", "release"),
	}} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.given(tc.given...)

			session, err := w.Renew(t.Context(), chatA, tc.ttl)

			must.Eq(t, tc.want, w.outcome("renewed until "+session.ExpiresAt.Format(time.TimeOnly), err))
			if err == nil {
				must.Eq(t, w.standing(chatA), session)
			}
		})
	}
}

func TestRenew_aLostSandboxStaysItsChatsOwn(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA), lost("node down"))

	session, err := w.Renew(t.Context(), chatA, time.Hour)

	must.NoError(t, err)
	must.Eq(t, scheduler.StateLost, session.State)
	must.Eq(t, []string{"chat-a s1 lost container-1 13:00:00: node down"}, w.records())

	w.driver.Regain(session.SessionID.String())
	res, err := w.Create(t.Context(), createA)
	must.NoError(t, err)
	must.Eq(t, scheduler.ResultReused, res.Result, must.Sprint("it is back"))
}

func TestRenew_refusesATimeToLiveOutOfBounds(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA))
	for _, ttl := range []time.Duration{-1, scheduler.MinTTL - 1, maxTTL + 1} {
		_, err := w.Renew(t.Context(), chatA, ttl)
		must.ErrorIs(t, err, scheduler.ErrInvalid)
	}
	must.SliceEmpty(t, w.effects.taken())
}
