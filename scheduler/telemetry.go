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

// Operators rely on the names of spans, metrics, log events and their attributes. All
// names that derive from events are in this file.

// names are what the log, the counters and the span call a type of event. Empty
// fields mean that it is not in the log, or not counted.
type names struct {
	log     string
	level   hclog.Level
	counter string
	result  string // the counter's attribute "result"
	ends    bool   // the event ends a use case; its span gets the result too
}

var eventNames = map[EventType]names{
	EventCreated:        {"sandbox_created", hclog.Info, "sandbox.create.total", "created", true},
	EventReplaced:       {log: "sandbox_replaced", level: hclog.Info},
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
	EventRunning:        {log: "sandbox_running", level: hclog.Info},
	EventDead:           {log: "sandbox_dead", level: hclog.Info},
	EventLost:           {log: "sandbox_lost", level: hclog.Info},
	EventRecordFailed:   {log: "sandbox_record_failed", level: hclog.Warn},
	EventSettled:        {log: "sandbox_settled", level: hclog.Info},
	EventSettleFailed:   {log: "sandbox_settle_failed", level: hclog.Warn},
	EventUndoFailed:     {log: "sandbox_undo_failed", level: hclog.Warn},
	EventAdopted:        {log: "sandbox_adopted", level: hclog.Warn, counter: "sandbox.adopt.total", result: "adopted"},
	EventOrphanFound:    {counter: "sandbox.orphan.found.total"},
	EventOrphanStopped:  {log: "sandbox_orphan_stopped", level: hclog.Warn, counter: "sandbox.orphan.stopped.total"},
	EventOrphanFailed:   {log: "sandbox_orphan_failed", level: hclog.Warn},
	EventRepaired:       {log: "record_repaired", level: hclog.Info},
	EventRepairFailed:   {log: "record_repair_failed", level: hclog.Error},
}

// Result returns how a use case ended, as its counter and its span say it: "created",
// "replaced", "error" and so on. It is empty if the event ends no use case.
func (e Event) Result() string {
	if e.Type == EventCreated && e.Before != nil {
		return string(ResultReplaced)
	}
	return eventNames[e.Type].result
}

// logEvent writes the log line of an event.
func (s *Scheduler) logEvent(ctx context.Context, e Event) {
	name := eventNames[e.Type]
	if name.log == "" || isRefusal(e) || isGivenUp(ctx, e) {
		return
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
	case EventCreated:
		if session.Warm {
			add("warm", true)
		}
	case EventReplaced, EventRunning, EventDead, EventLost:
		add("reason", e.Reason)
	case EventRenewed, EventAdopted:
		add("expires_at", session.ExpiresAt)
	case EventSettled:
		add("state", session.State)
	case EventRepaired:
		add("result", e.Reason)
	default:
	}
	if e.Err != nil {
		add("error", Kind(e.Err), "detail", e.Err)
	}
	if e.RequestID != "" {
		add("request_id", e.RequestID)
	}
	s.Logger.Log(name.level, name.log, args...)
}

// isRefusal reports whether a request was refused at once. Such events are not
// logged, because a caller could fill the log with them.
func isRefusal(e Event) bool {
	switch e.Type {
	case EventCreateFailed:
		return errors.Is(e.Err, ErrInvalid) || errors.Is(e.Err, ErrBusy) || errors.Is(e.Err, ErrPermissionDenied) || errors.Is(e.Err, ErrQuota)
	case EventRenewFailed, EventDeleteFailed:
		return errors.Is(e.Err, ErrInvalid) || errors.Is(e.Err, ErrPermissionDenied)
	default:
		return false
	}
}

// isGivenUp reports whether a cleanup failed because its context ended. Such events
// are neither logged nor counted.
func isGivenUp(ctx context.Context, e Event) bool {
	return (e.Type == EventExpireFailed || e.Type == EventCleanupFailed) && ctx.Err() != nil && errors.Is(e.Err, ctx.Err())
}

// countEvent counts an event.
func (in *instruments) countEvent(ctx context.Context, e Event) {
	var attrs []attribute.KeyValue
	switch e.Type {
	case EventExpireFailed, EventCleanupFailed:
		attrs = append(attrs, errorType(e.Err))
	case EventOrphanFound, EventOrphanStopped:
		attrs = append(attrs, attribute.String("runtime", e.Before.Runtime))
	default:
		attrs = append(attrs, attribute.String("result", e.Result()))
	}
	if e.Type == EventConflict || e.Type == EventCleanupFailed {
		attrs = append(attrs, attribute.String("reason", e.Reason))
	}
	if counter, ok := in.counters[eventNames[e.Type].counter]; ok && !isGivenUp(ctx, e) {
		counter.Add(ctx, 1, metric.WithAttributes(attrs...))
	}
}

// traceEvent sets the attributes of the use case's span that an event determines.
func traceEvent(ctx context.Context, e Event) {
	if !eventNames[e.Type].ends {
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
	traceResult(ctx, e.Result())
	if e.Err != nil {
		span.SetAttributes(errorType(e.Err))
		span.RecordError(e.Err)
		span.SetStatus(codes.Error, Kind(e.Err))
	}
}

func traceResult(ctx context.Context, result string) {
	trace.SpanFromContext(ctx).SetAttributes(attribute.String("sandbox.result", result))
}

// createAttrs returns the span attributes of a create that started a sandbox or
// failed.
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
	if s.Warm {
		attrs = append(attrs, attribute.Bool("sandbox.warm", true))
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
