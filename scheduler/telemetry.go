package scheduler

import (
	"context"
	"errors"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// The names of spans, metrics, log events and their attributes are a contract
// with those who watch Bivouac. Those that tell of events are all in this file.

// telling is how the log, the counters and the span tell of a type of event.
type telling struct {
	log     string // name of the log event
	level   hclog.Level
	counter string // name of the counter
	result  string // its attribute "result"
	ends    bool   // the event ends a use case, whose span gets the result, too
}

var tellings = map[EventType]telling{
	EventCreated:        {"sandbox_created", hclog.Info, "sandbox.create.total", "created", true},
	EventReplaced:       {"sandbox_replaced", hclog.Info, "", "", false},
	EventReused:         {"sandbox_reused", hclog.Info, "sandbox.create.total", "reused", true},
	EventConflict:       {"sandbox_conflict", hclog.Warn, "sandbox.create.total", "conflict", true},
	EventCreateFailed:   {"sandbox_create_failed", hclog.Error, "sandbox.create.total", "error", true},
	EventRenewed:        {"sandbox_renewed", hclog.Info, "sandbox.renew.total", "renewed", true},
	EventRenewFailed:    {"sandbox_renew_failed", hclog.Warn, "sandbox.renew.total", "error", true},
	EventDeleted:        {"sandbox_deleted", hclog.Info, "sandbox.delete.total", "deleted", true},
	EventDeleteNotFound: {"sandbox_delete_not_found", hclog.Info, "sandbox.delete.total", "not_found", true},
	EventDeleteFailed:   {"sandbox_delete_failed", hclog.Error, "sandbox.delete.total", "error", true},
	EventExpired:        {"sandbox_cleaned", hclog.Info, "sandbox.cleanup.total", "cleaned", true},
	EventExpireFailed:   {"sandbox_clean_failed", hclog.Error, "sandbox.cleanup.error.total", "error", true},
	EventCleanupFailed:  {"sandbox_cleanup_failed", hclog.Error, "sandbox.cleanup.error.total", "error", true},
	EventRunning:        {"sandbox_running", hclog.Info, "", "", false},
	EventDead:           {"sandbox_dead", hclog.Info, "", "", false},
	EventLost:           {"sandbox_lost", hclog.Info, "", "", false},
	EventRecordFailed:   {"sandbox_record_failed", hclog.Warn, "", "", false},
	EventSettled:        {"sandbox_settled", hclog.Info, "", "", false},
	EventSettleFailed:   {"sandbox_settle_failed", hclog.Warn, "", "", false},
	EventUndoFailed:     {"sandbox_undo_failed", hclog.Warn, "", "", false},
	EventAdopted:        {"sandbox_adopted", hclog.Warn, "sandbox.adopt.total", "adopted", false},
	EventOrphanFound:    {"", hclog.NoLevel, "sandbox.orphan.found.total", "", false},
	EventOrphanStopped:  {"sandbox_orphan_stopped", hclog.Warn, "sandbox.orphan.stopped.total", "", false},
	EventOrphanFailed:   {"sandbox_orphan_failed", hclog.Warn, "", "", false},
	EventRepaired:       {"record_repaired", hclog.Info, "", "", false},
	EventRepairFailed:   {"record_repair_failed", hclog.Error, "", "", false},
}

// result is how an event came out, for its counter and its span.
func (e Event) result() string {
	if e.Type == EventCreated && e.Before != nil {
		return string(ResultReplaced)
	}
	return tellings[e.Type].result
}

// logEvent writes the log line of an event.
func (s *Scheduler) logEvent(ctx context.Context, e Event) {
	told := tellings[e.Type]
	switch {
	case told.log == "", isGivenUp(ctx, e):
		return
	case told.ends && errors.Is(e.Err, ErrInvalid), e.Type == EventCreateFailed && errors.Is(e.Err, ErrBusy):
		return // a caller must not be able to fill the log with what is refused at once
	}
	var args []any
	add := func(pairs ...any) { args = append(args, pairs...) }
	session := e.session()
	switch {
	case session != nil && e.Type != EventRenewFailed:
		add("chat_id", session.ChatID.String(), "session_id", session.SessionID.String(), "container_id", session.ContainerID)
	case e.Type != EventCleanupFailed:
		add("chat_id", e.ChatID.String())
	}
	switch e.Type {
	case EventConflict:
		add("requested_agent_id", e.Asked.AgentID, "session_agent_id", session.AgentID,
			"requested_volume_host_path", e.Asked.VolumeHostPath, "session_volume_host_path", session.VolumeHostPath)
		if e.Asked.Runtime != "" {
			add("requested_runtime", e.Asked.Runtime, "session_runtime", session.Runtime)
		}
		add("reason", e.Reason)
	case EventReplaced, EventRunning, EventDead, EventLost:
		add("reason", e.Reason)
	case EventRenewed, EventAdopted:
		add("expires_at", session.ExpiresAt)
	case EventSettled:
		add("state", session.State)
	case EventRepaired:
		add("result", e.Reason)
	}
	if e.Err != nil {
		add("error", Kind(e.Err), "detail", e.Err)
	}
	if e.RequestID != "" {
		add("request_id", e.RequestID)
	}
	s.Logger.Log(told.level, told.log, args...)
}

// isGivenUp says whether a cleanup failed because nobody wants it any more.
func isGivenUp(ctx context.Context, e Event) bool {
	return (e.Type == EventExpireFailed || e.Type == EventCleanupFailed) && ctx.Err() != nil && errors.Is(e.Err, ctx.Err())
}

// countEvent counts an event.
func (in *instruments) countEvent(ctx context.Context, e Event) {
	told := tellings[e.Type]
	var attrs []attribute.KeyValue
	switch e.Type {
	case EventExpireFailed, EventCleanupFailed:
		attrs = append(attrs, errorType(e.Err))
	case EventOrphanFound, EventOrphanStopped:
		attrs = append(attrs, attribute.String("runtime", e.Before.Runtime))
	default:
		attrs = append(attrs, attribute.String("result", e.result()))
	}
	if e.Type == EventConflict || e.Type == EventCleanupFailed {
		attrs = append(attrs, attribute.String("reason", e.Reason))
	}
	if counter, ok := in.counters[told.counter]; ok && !isGivenUp(ctx, e) {
		counter.Add(ctx, 1, metric.WithAttributes(attrs...))
	}
}

// traceEvent sets the attributes of the use case's span that tell how it came
// out.
func traceEvent(ctx context.Context, e Event) {
	if !tellings[e.Type].ends {
		return
	}
	span := trace.SpanFromContext(ctx)
	switch e.Type {
	case EventCreated, EventCreateFailed:
		span.SetAttributes(createAttrs(e)...)
	case EventExpired, EventExpireFailed: // the span began with its session
	default:
		if session := e.session(); session != nil {
			span.SetAttributes(sessionAttrs(*session)...)
		}
	}
	if e.Type == EventConflict {
		span.SetAttributes(attribute.String("sandbox.conflict.reason", e.Reason))
	}
	traceResult(ctx, e.result())
	if e.Err != nil {
		span.SetAttributes(errorType(e.Err))
		span.RecordError(e.Err)
		span.SetStatus(codes.Error, Kind(e.Err))
	}
}

func traceResult(ctx context.Context, result string) {
	trace.SpanFromContext(ctx).SetAttributes(attribute.String("sandbox.result", result))
}

// createAttrs are the attributes of a create that started a sandbox, or tried
// to.
func createAttrs(e Event) []attribute.KeyValue {
	var attrs []attribute.KeyValue
	if previous := e.Before; previous != nil {
		attrs = append(attrs,
			attribute.String("sandbox.previous_session.id", previous.SessionID.String()),
			attribute.String("sandbox.previous_container.id", previous.ContainerID),
			attribute.String("sandbox.previous_agent.id", previous.AgentID),
			attribute.String("sandbox.previous_volume.host_path", previous.VolumeHostPath),
			attribute.String("sandbox.new_session.id", e.After.SessionID.String()))
		if e.After.ContainerID != "" {
			attrs = append(attrs,
				attribute.String("sandbox.new_container.id", e.After.ContainerID),
				attribute.String("sandbox.new_agent.id", e.After.AgentID),
				attribute.String("sandbox.new_volume.host_path", e.After.VolumeHostPath))
		}
	}
	switch {
	case e.Err == nil:
		attrs = append(attrs, sessionAttrs(*e.After)...)
	case e.After != nil && e.Before == nil:
		attrs = append(attrs, attribute.String("session.id", e.After.SessionID.String()))
	}
	return attrs
}

func sessionAttrs(s Session) []attribute.KeyValue {
	attrs := []attribute.KeyValue{
		attribute.String("session.id", s.SessionID.String()),
		attribute.String("container.id", s.ContainerID),
		attribute.String("sandbox.session_agent.id", s.AgentID),
		attribute.String("sandbox.session_volume.host_path", s.VolumeHostPath),
	}
	if s.Endpoint.IsValid() {
		attrs = append(attrs,
			attribute.String("sandbox.endpoint.ip", s.Endpoint.IP.String()),
			attribute.Int("sandbox.endpoint.port", int(s.Endpoint.Port)))
	}
	return attrs
}

func errorType(err error) attribute.KeyValue { return attribute.String("error.type", Kind(err)) }

func chatAttr(id uuid.UUID) attribute.KeyValue { return attribute.String("chat.id", id.String()) }

func (s *Scheduler) startSpan(ctx context.Context, name string, attrs ...attribute.KeyValue) (context.Context, trace.Span) {
	return s.Tracer.Start(ctx, name, trace.WithAttributes(attrs...))
}
