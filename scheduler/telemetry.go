package scheduler

import (
	"context"
	"fmt"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// The names of spans, metrics, log events and their attributes are a contract
// with those who watch Bivouac. They are spelled out where they are used.

type instruments struct {
	create, delete, renew, cleanup, cleanupError, adopt metric.Int64Counter
}

// newInstruments makes the counters, and the gauge of active sessions, which
// asks the store at each collection and so is exact whichever replica changed
// what.
func newInstruments(meter metric.Meter, store Store) (instruments, error) {
	var in instruments
	for _, c := range []struct {
		to         *metric.Int64Counter
		name, desc string
	}{
		{&in.create, "sandbox.create.total", "Creates by result."},
		{&in.delete, "sandbox.delete.total", "Deletes by result."},
		{&in.renew, "sandbox.renew.total", "Renewals by result."},
		{&in.cleanup, "sandbox.cleanup.total", "Expired sandboxes cleaned up."},
		{&in.adopt, "sandbox.adopt.total", "Records written anew from what runs."},
		{&in.cleanupError, "sandbox.cleanup.error.total", "Failures to clean up, by kind of error."},
	} {
		counter, err := meter.Int64Counter(c.name, metric.WithDescription(c.desc))
		if err != nil {
			return in, fmt.Errorf("%s: %w", c.name, err)
		}
		*c.to = counter
	}
	_, err := meter.Int64ObservableGauge("sandbox.active.count",
		metric.WithDescription("Sessions recorded, counted at each collection."),
		metric.WithInt64Callback(func(ctx context.Context, o metric.Int64Observer) error {
			n, err := store.Count(ctx)
			if err != nil {
				return fmt.Errorf("count sessions: %w", err)
			}
			o.Observe(int64(n))
			return nil
		}))
	if err != nil {
		return in, fmt.Errorf("sandbox.active.count: %w", err)
	}
	return in, nil
}

func count(ctx context.Context, c metric.Int64Counter, attrs ...attribute.KeyValue) {
	c.Add(ctx, 1, metric.WithAttributes(attrs...))
}

func result(r string) attribute.KeyValue { return attribute.String("result", r) }

func errorType(err error) attribute.KeyValue { return attribute.String("error.type", Kind(err)) }

func spanResult(span trace.Span, r string) {
	span.SetAttributes(attribute.String("sandbox.result", r))
}

func spanError(span trace.Span, err error) {
	span.SetAttributes(attribute.String("sandbox.result", "error"), errorType(err))
	span.RecordError(err)
	span.SetStatus(codes.Error, Kind(err))
}

func (s *Scheduler) startSpan(ctx context.Context, name string, attrs ...attribute.KeyValue) (context.Context, trace.Span) {
	return s.Tracer.Start(ctx, name, trace.WithAttributes(attrs...))
}

func chatAttr(id uuid.UUID) attribute.KeyValue { return attribute.String("chat.id", id.String()) }

func spanSession(span trace.Span, s Session) {
	span.SetAttributes(
		attribute.String("session.id", s.SessionID.String()),
		attribute.String("container.id", s.ContainerID),
		attribute.String("sandbox.session_agent.id", s.AgentID),
		attribute.String("sandbox.session_volume.host_path", s.VolumeHostPath),
	)
	if s.Endpoint.IsValid() {
		span.SetAttributes(
			attribute.String("sandbox.endpoint.ip", s.Endpoint.IP.String()),
			attribute.Int("sandbox.endpoint.port", int(s.Endpoint.Port)),
		)
	}
}

func spanPreviousSession(span trace.Span, s Session) {
	span.SetAttributes(
		attribute.String("sandbox.previous_session.id", s.SessionID.String()),
		attribute.String("sandbox.previous_container.id", s.ContainerID),
		attribute.String("sandbox.previous_agent.id", s.AgentID),
		attribute.String("sandbox.previous_volume.host_path", s.VolumeHostPath),
	)
}

func spanNewSession(span trace.Span, s Session) {
	span.SetAttributes(
		attribute.String("sandbox.new_container.id", s.ContainerID),
		attribute.String("sandbox.new_agent.id", s.AgentID),
		attribute.String("sandbox.new_volume.host_path", s.VolumeHostPath),
	)
}

// logArgs names a session in a log event.
func logArgs(s Session, more ...any) []any {
	return append([]any{
		"chat_id", s.ChatID.String(),
		"session_id", s.SessionID.String(),
		"container_id", s.ContainerID,
	}, more...)
}
