package scheduler_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// explainer is a driver that tells what a test has it tell.
type explainer struct {
	*fakeruntime.Driver
	explain func(ctx context.Context, sessionID string) ([]runtime.Happening, error)
}

func (e *explainer) Explain(ctx context.Context, sessionID string) ([]runtime.Happening, error) {
	return e.explain(ctx, sessionID)
}

// newExplainedWorld returns a world whose driver tells with explain what happened.
func newExplainedWorld(t *testing.T, explain func(ctx context.Context, sessionID string) ([]runtime.Happening, error)) *world {
	return newWorld(t, func(c *scheduler.Config) {
		c.Drivers["fake"] = &explainer{c.Drivers["fake"].(*fakeruntime.Driver), explain}
	})
}

// why returns what is told of the chat, as "SESSION STATE: OUTCOME" and "TIME SOURCE TEXT".
func (w *world) why(ctx context.Context, chatID uuid.UUID) []string {
	stories, err := w.Why(ctx, chatID)
	must.NoError(w.t, err)
	var lines []string
	for _, story := range stories {
		lines = append(lines, w.name(fmt.Sprintf("%s %s: %s", story.SessionID, story.State, story.Outcome)))
		for _, one := range story.Events {
			at := "unknown"
			if !one.Time.IsZero() {
				at = one.Time.Format(time.TimeOnly)
			}
			lines = append(lines, w.name("  "+at+" "+one.Source+" "+one.Text))
		}
	}
	return lines
}

func TestWhy(t *testing.T) {
	do := func(use func(*world) error) func(*world) {
		return func(w *world) { must.NoError(w.t, use(w)) }
	}
	remove := do(func(w *world) error { _, err := w.Delete(t.Context(), chatA); return err })
	const isCreated, isReady = "  12:00:00 bivouac created by anonymous", "  12:00:00 bivouac its sandbox is ready"
	other := createA
	other.AgentID = "agent-2"

	for _, tc := range []struct {
		name string
		do   []func(*world)
		want []string
	}{
		{"tells that the sandbox runs", []func(*world){created(createA)}, []string{
			"s1 running: It runs, and expires at 2030-03-01T12:30:00Z.", isCreated, isReady,
		}},
		{"tells that the session is about to be cleaned up", []func(*world){created(createA), later(time.Hour)}, []string{
			"s1 running: It still runs, but expired at 2030-03-01T12:30:00Z and is about to be cleaned up.", isCreated, isReady,
		}},
		{"tells how the sandbox ended", []func(*world){created(createA), later(time.Minute), killed("exit code 3")}, []string{
			"s1 dead: Its sandbox ended: exit code 3.", isCreated, isReady,
		}},
		{"tells that the sandbox cannot be reached", []func(*world){created(createA), lost("node n1 is lost")}, []string{
			"s1 lost: Its sandbox cannot be reached: node n1 is lost.", isCreated, isReady,
		}},
		{"tells that a start is in progress", []func(*world){abandonedStart}, []string{
			"s1 creating: Its start is in progress since 2030-03-01T12:00:00Z.", isCreated,
		}},
		{"tells that a stop is in progress", []func(*world){created(createA), abandonedStop}, []string{
			"s1 stopping: Its stop is in progress.", isCreated, isReady,
		}},
		{"tells of a start that failed", []func(*world){fails("driver.create", fmt.Errorf("%w: memory exhausted on 2 nodes", runtime.ErrNotPlaced)), func(w *world) {
			_, err := w.Create(t.Context(), createA)
			must.ErrorIs(t, err, runtime.ErrNotPlaced)
		}}, []string{
			"s1 : Start failed and was undone: not placed: memory exhausted on 2 nodes.", isCreated,
			"  12:00:00 bivouac start failed and was undone: not placed: memory exhausted on 2 nodes",
		}},
		{"tells the newest session first", []func(*world){created(createA), killed("exit code 3"), later(time.Minute), created(createA)}, []string{
			"s2 running: It runs, and expires at 2030-03-01T12:31:00Z.", "  12:01:00 bivouac created by anonymous", "  12:01:00 bivouac its sandbox is ready",
			"s1 : Stopped and replaced by a create of anonymous, because: exit code 3.", isCreated, isReady,
			"  12:01:00 bivouac stopped and replaced by a create of anonymous, because: exit code 3",
		}},
		{"tells who deleted it", []func(*world){created(createA), later(time.Minute), remove}, []string{
			"s1 : Deleted by anonymous.", isCreated, isReady, "  12:01:00 bivouac deleted by anonymous",
		}},
		{"tells that it expired", []func(*world){created(createA), later(time.Hour), do(func(w *world) error { _, err := w.CleanupExpired(t.Context()); return err })}, []string{
			"s1 : Expired and cleaned up by anonymous.", isCreated, isReady, "  13:00:00 bivouac expired and cleaned up by anonymous",
		}},
		{"tells of what a replica left unfinished", []func(*world){abandonedStart, do(func(w *world) error { return w.SettleInFlight(t.Context()) })}, []string{
			"s1 : Ended, because a replica had left its start or its stop unfinished.", isCreated,
			"  12:00:00 bivouac ended, because a replica had left its start or its stop unfinished",
		}},
		{"tells of a renewal and a conflict", []func(*world){
			created(createA), do(func(w *world) error { _, err := w.Renew(t.Context(), chatA, time.Hour); return err }),
			func(w *world) {
				_, err := w.Create(t.Context(), other)
				must.ErrorIs(t, err, scheduler.ErrConflict)
			},
		}, []string{
			"s1 running: It runs, and expires at 2030-03-01T13:00:00Z.", isCreated, isReady, "  12:00:00 bivouac renewed by anonymous",
			"  12:00:00 bivouac a create by anonymous got a conflict, because these differ: agent_id",
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.given(tc.do...)
			must.Eq(t, tc.want, w.why(t.Context(), chatA))
		})
	}
}

func TestWhy_the_runtime_s_part(t *testing.T) {
	t.Run("is in the order of time, with what has no time at the end", func(t *testing.T) {
		w := newExplainedWorld(t, func(context.Context, string) ([]runtime.Happening, error) {
			return []runtime.Happening{
				{Time: noon.Add(-time.Second), Text: "job registered"}, {Text: "some time"}, {Time: noon.Add(time.Second), Text: "exit code 3"},
			}, nil
		})
		w.given(created(createA))
		must.Eq(t, []string{
			"s1 running: It runs, and expires at 2030-03-01T12:30:00Z.", "  11:59:59 fake job registered",
			"  12:00:00 bivouac created by anonymous", "  12:00:00 bivouac its sandbox is ready", "  12:00:01 fake exit code 3", "  unknown fake some time",
		}, w.why(t.Context(), chatA))
	})
	for _, tc := range []struct {
		name string
		err  error
		want []string
	}{
		{"is left out if it knows nothing", runtime.ErrNotFound, []string{}},
		{"is left out if it cannot tell", errors.ErrUnsupported, []string{}},
		{"says that it is missing if it cannot be asked", fmt.Errorf("%w: secret address", runtime.ErrUnavailable), []string{"  unknown fake the runtime cannot tell now what happened: runtime_unavailable"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newExplainedWorld(t, func(context.Context, string) ([]runtime.Happening, error) { return nil, tc.err })
			w.given(created(createA))
			must.Eq(t, tc.want, w.why(t.Context(), chatA)[3:])
		})
	}
	t.Run("is asked for at most three sessions", func(t *testing.T) {
		w := newExplainedWorld(t, func(context.Context, string) ([]runtime.Happening, error) {
			return []runtime.Happening{{Time: noon, Text: "asked"}}, nil
		})
		for range 12 {
			w.given(created(createA), killed("exit code 3"))
		}
		lines := w.why(t.Context(), chatA)
		must.Eq(t, 3, strings.Count(strings.Join(lines, "\n"), "fake asked"))
		must.Eq(t, 10, strings.Count(strings.Join(lines, "\n"), "created by"))
	})
}

func TestWhy_shows_only_what_the_caller_may_see(t *testing.T) {
	w := newWorld(t)
	other := createA
	other.AgentID = "agent-2"
	w.given(created(createA), func(w *world) {
		_, err := w.Delete(t.Context(), chatA)
		must.NoError(t, err)
	}, created(other))
	may := func(prefix string) context.Context {
		return as(t, rule(prefix, scheduler.CapRead))
	}
	must.Len(t, 2, mustWhy(may("agent-"), t, w))
	for _, agent := range []string{"agent-1", "agent-2"} {
		stories := mustWhy(may(agent), t, w)
		must.Len(t, 1, stories)
		must.Eq(t, agent, stories[0].AgentID)
	}
	_, err := w.Why(may("agent-3"), chatA)
	must.ErrorIs(t, err, scheduler.ErrNotFound)
	_, err = w.Why(t.Context(), chatB)
	must.ErrorIs(t, err, scheduler.ErrNotFound)
	_, err = w.Why(t.Context(), uuid.Nil)
	must.ErrorIs(t, err, scheduler.ErrInvalid)
}

func mustWhy(ctx context.Context, t *testing.T, w *world) []scheduler.Story {
	stories, err := w.Why(ctx, chatA)
	must.NoError(t, err)
	return stories
}

func TestWhy_shows_no_token_and_no_control_characters(t *testing.T) {
	var w *world
	w = newExplainedWorld(t, func(context.Context, string) ([]runtime.Happening, error) {
		return []runtime.Happening{
			{Time: noon, Text: "got " + string(w.standing(chatA).AccessToken)},
			{Time: noon, Text: "two\nlines \x1b[31mred\x07 \u202egnol\xff"},
			{Time: noon, Text: strings.Repeat("ü", 5000)},
		}, nil
	})
	w.given(created(createA), func(w *world) { killed("token " + string(w.standing(chatA).AccessToken))(w) })
	stories := mustWhy(t.Context(), t, w)
	must.Eq(t, "Its sandbox ended: token [access token].", stories[0].Outcome)
	texts := stories[0].Events[2:]
	must.Eq(t, "got [access token]", texts[0].Text)
	must.Eq(t, "two lines \uFFFD[31mred\uFFFD \uFFFDgnol\uFFFD", texts[1].Text)
	must.StrHasSuffix(t, "ü…", texts[2].Text)
	must.LessEq(t, 4096, len(texts[2].Text))
}

func TestAccessToken_is_in_no_reason_and_no_error(t *testing.T) {
	w, keeper := newWorldOfSpecs(t)
	w.effects.hook(effect{Name: "driver.create"}, hook{before: func(context.Context) error {
		return fmt.Errorf("%w: 500: %s", runtime.ErrNotReady, string(w.standing(chatA).AccessToken))
	}})
	_, err := w.Create(t.Context(), createA)
	must.ErrorIs(t, err, runtime.ErrNotReady)
	must.ErrorContains(t, err, "500: [access token]")
	must.StrContains(t, strings.Join(w.changes(), "\n"), "500: [access token]")

	w.effects.heal()
	w.given(created(createA))
	token := string(keeper.specs[len(keeper.specs)-1].AccessToken)
	w.given(killed("exit code 3: " + token))
	session, _, err := w.Get(t.Context(), chatA, scheduler.Block{})
	must.NoError(t, err)
	must.Eq(t, "exit code 3: [access token]", session.Reason)

	w.given(fails("driver.delete", fmt.Errorf("%w: task %s runs", runtime.ErrNotStopped, token)))
	_, err = w.Delete(t.Context(), chatA)
	must.ErrorContains(t, err, "task [access token] runs")
	must.StrContains(t, w.standing(chatA).Reason, "task [access token] runs")
}

func TestWhy_is_limited_in_number(t *testing.T) {
	asked, answer := make(chan struct{}), make(chan struct{})
	w := newExplainedWorld(t, func(context.Context, string) ([]runtime.Happening, error) {
		asked <- struct{}{}
		<-answer
		return nil, nil
	})
	w.given(created(createA))
	ended := make(chan error)
	const limit = 16
	for range limit {
		go func() {
			_, err := w.Why(t.Context(), chatA)
			ended <- err
		}()
	}
	for range limit {
		<-asked
	}
	_, err := w.Why(t.Context(), chatA)
	must.ErrorIs(t, err, scheduler.ErrBusy)
	close(answer)
	for range limit {
		must.NoError(t, <-ended)
	}
}
