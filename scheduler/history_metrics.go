package scheduler

import (
	"context"
	"errors"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// historyMetrics are the metrics of a history. Their names are in
// internal/agent/METRICS.md.
type historyMetrics struct {
	now     func() time.Time
	readers metric.Int64UpDownCounter
	cut     metric.Int64Counter
	delay   metric.Float64Histogram
	lost    metric.Int64Counter
}

func newHistoryMetrics(meter metric.Meter, now func() time.Time) (*historyMetrics, error) {
	m := &historyMetrics{now: now}
	var errs [4]error
	m.readers, errs[0] = meter.Int64UpDownCounter("event.readers", metric.WithDescription("Readers of events."))
	m.cut, errs[1] = meter.Int64Counter("event.reader.cut.total",
		metric.WithDescription("Readers of events that were cut off because they missed some."))
	m.delay, errs[2] = meter.Float64Histogram("event.delay", metric.WithUnit("s"), quick(),
		metric.WithDescription("Time from a change until this replica has it for its readers."))
	m.lost, errs[3] = meter.Int64Counter("event.unstored.total",
		metric.WithDescription("Events that were not stored, by type and reason."))
	return m, errors.Join(errs[:]...)
}

// unstored counts a change that was not stored.
func (m *historyMetrics) unstored(ctx context.Context, what ChangeType, reason string) {
	m.lost.Add(ctx, 1, metric.WithAttributes(attribute.String("type", string(what)), attribute.String("reason", reason)))
}

// heard records the delay of changes that the replica has heard of.
func (m *historyMetrics) heard(ctx context.Context, changes []Change) {
	for _, change := range changes {
		m.delay.Record(ctx, max(0, m.now().Sub(change.Time).Seconds()))
	}
}

// observe makes the number of changes in a history a metric.
func (h *history) observe(meter metric.Meter) error {
	_, err := meter.Int64ObservableGauge("event.kept.count", metric.WithDescription("Changes that this replica keeps in memory."),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			h.mu.Lock()
			defer h.mu.Unlock()
			if h.ring != nil {
				o.Observe(int64(len(h.ring.changes)))
			}
			return nil
		}))
	return err
}
