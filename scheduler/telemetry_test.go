package scheduler_test

import (
	"context"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"
	"go.opentelemetry.io/otel/trace"

	"github.com/bivouac/bivouac/scheduler"
)

// Names and attributes are asserted where the use cases are specified. Here
// stands what they have in common.

func TestTelemetry_theGaugeHasOwnChangesAtOnceAndThoseOfOtherReplicasAfterAMinute(t *testing.T) {
	w := newWorld(t)
	other := w.peer()
	scrape := func() []string {
		lines, err := w.seen.takeMetrics()
		must.NoError(t, err)
		return lines
	}
	must.Eq(t, []string{"sandbox.active.count 0"}, scrape())

	_, err := other.Create(t.Context(), createA)
	must.NoError(t, err)
	_, err = w.Create(t.Context(), someCreate())
	must.NoError(t, err)
	w.effects.taken()
	must.SliceContains(t, scrape(), "sandbox.active.count 1")
	must.SliceEmpty(t, w.effects.taken(), must.Sprint("a scrape within the minute asks the store nothing"))

	w.clock.advance(time.Minute)
	must.SliceContains(t, scrape(), "sandbox.active.count 2")
	must.Eq(t, []string{"count"}, w.effects.taken())

	_, err = w.Delete(t.Context(), chatA)
	must.NoError(t, err)
	must.SliceContains(t, scrape(), "sandbox.active.count 1", must.Sprint("whoever created it"))
}

func TestTelemetry_afterAWriteThatFailedSessionsAreCountedAnew(t *testing.T) {
	w := newWorld(t)
	w.given(failsAfter("write running + release", scheduler.ErrUnavailable))

	_, err := w.Create(t.Context(), createA) // the write was applied, and its answer lost
	must.NoError(t, err)

	must.SliceContains(t, w.outcome("", nil).Metrics, "sandbox.active.count 1")
}

func TestTelemetry_whereSessionsCannotBeCountedTheGaugeHasNoValue(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA))
	w.effects.fail("count", scheduler.ErrUnavailable)
	w.clock.advance(time.Minute)
	lines, err := w.seen.takeMetrics()
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
	must.SliceEmpty(t, lines)
}

// A use case that refuses its input is an error like any other to those who
// watch, except that its caller alone is told what was wrong.
func TestTelemetry_inputThatIsRefusedIsCountedToo(t *testing.T) {
	invalid := createA
	invalid.AgentID = ""
	for name, call := range map[string]func(*world) error{
		"create": func(w *world) error {
			_, err := w.Create(context.Background(), invalid)
			return err
		},
		"renew": func(w *world) error {
			_, err := w.Renew(context.Background(), chatA, -1)
			return err
		},
		"delete": func(w *world) error {
			_, err := w.Delete(context.Background(), uuid.Nil)
			return err
		},
	} {
		w := newWorld(t)
		got := w.outcome("", call(w))
		must.Eq(t, "error invalid", got.Result)
		must.SliceEmpty(t, got.Effects)
		must.Len(t, 1, got.Spans)
		must.Eq(t, "usecase."+name+"_sandbox", got.Spans[0].Name)
		must.Eq(t, "error", got.Spans[0].Attrs["sandbox.result"])
		must.Eq(t, "invalid", got.Spans[0].Error)
		must.SliceContains(t, got.Metrics, "sandbox."+name+".total{result=error} 1")
		if name != "delete" {
			must.SliceEmpty(t, got.Logs)
		}
	}
}

func TestTelemetry_aLogLineNamesTheRequestThatItComesFrom(t *testing.T) {
	w := newWorld(t)

	_, err := w.Create(scheduler.WithRequestID(t.Context(), "r1"), createA)
	must.NoError(t, err)

	must.Eq(t, []string{"info sandbox_created chat_id=chat-a session_id=s1 container_id=container-1 request_id=r1"},
		w.outcome("", nil).Logs)
}

func TestTelemetry_spansStandInTheirCallersTrace(t *testing.T) {
	w := newWorld(t)
	ctx, caller := w.seen.tracer.Start(t.Context(), "caller")
	defer caller.End()
	var inDriver trace.SpanContext
	w.effects.hook(effect{Name: "driver.create"}, hook{before: func(ctx context.Context) error {
		inDriver = trace.SpanContextFromContext(ctx)
		return nil
	}})

	_, err := w.Create(ctx, createA)
	must.NoError(t, err)

	span := w.seen.spans.Ended()[0]
	must.Eq(t, caller.SpanContext().SpanID(), span.Parent().SpanID())
	must.Eq(t, span.SpanContext().SpanID(), inDriver.SpanID(), must.Sprint("what a driver does stands below the use case"))
}

func TestTelemetry_aCleanupsSpansStandBelowItsPass(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA), later(defaultTTL))

	_, err := w.CleanupExpired(t.Context())
	must.NoError(t, err)

	spans := w.seen.spans.Ended()
	must.Len(t, 2, spans)
	must.Eq(t, "usecase.cleanup_expired_sandboxes", spans[1].Name())
	must.Eq(t, spans[1].SpanContext().SpanID(), spans[0].Parent().SpanID())
}

func TestTelemetry_aCallerWhoIsGoneIsCountedToo(t *testing.T) {
	w := newWorld(t)
	gone, leave := context.WithCancel(t.Context())
	leave()

	_, err := w.Create(gone, createA)
	must.ErrorIs(t, err, context.Canceled)
	_, err = w.Delete(gone, chatA)
	must.ErrorIs(t, err, context.Canceled)

	must.Eq(t, []string{
		"sandbox.active.count 0",
		"sandbox.create.total{result=error} 1",
		"sandbox.delete.total{result=error} 1",
	}, w.outcome("", nil).Metrics)
}
