package scheduler

import (
	"context"
	"errors"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// poolMetrics are the metrics of pools. Their names and attributes are in
// internal/agent/METRICS.md.
type poolMetrics struct {
	claims      metric.Int64Counter
	fills       metric.Int64Counter
	claim, fill metric.Float64Histogram
}

func newPoolMetrics(meter metric.Meter, pools []Pool, spares *spares) (poolMetrics, error) {
	var m poolMetrics
	var errs [6]error
	m.claims, errs[0] = meter.Int64Counter("sandbox.pool.claim.total",
		metric.WithDescription("Creates with a runtime that has a pool, by pool and result: hit, miss, failed, or taken by another create."))
	m.fills, errs[1] = meter.Int64Counter("sandbox.pool.fill.total", metric.WithDescription("Spares started, by pool and result."))
	m.claim, errs[2] = meter.Float64Histogram("sandbox.pool.claim.duration", quick(), metric.WithUnit("s"),
		metric.WithDescription("Time that a runtime takes to give a spare to a chat."))
	m.fill, errs[3] = meter.Float64Histogram("sandbox.pool.fill.duration", slow(), metric.WithUnit("s"),
		metric.WithDescription("Time until a spare is ready or has failed."))
	gauge := func(name, description string, value func(Pool) int) error {
		_, err := meter.Int64ObservableGauge(name, metric.WithDescription(description),
			metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
				for _, pool := range pools {
					o.Observe(int64(value(pool)), ofPool(pool))
				}
				return nil
			}))
		return err
	}
	errs[4] = gauge("sandbox.pool.size", "How many spares a pool should have.", func(p Pool) int { return p.Size })
	errs[5] = gauge("sandbox.pool.ready", "Spares that a create may take, as this replica last read them.", spares.ready)
	return m, errors.Join(errs[:]...)
}

func ofPool(pool Pool) metric.MeasurementOption {
	return metric.WithAttributes(attribute.String("pool", pool.Name))
}

// claimed counts a create that could have taken a spare.
func (m poolMetrics) claimed(ctx context.Context, pool Pool, outcome string) {
	m.claims.Add(ctx, 1, ofPool(pool), result(outcome))
}

// filled counts a start of a spare.
func (m poolMetrics) filled(ctx context.Context, pool Pool, took time.Duration, err error) {
	outcome := "ready"
	if err != nil {
		outcome = Kind(err)
	}
	m.fills.Add(ctx, 1, ofPool(pool), result(outcome))
	m.fill.Record(ctx, took.Seconds(), ofPool(pool), result(outcome))
}
