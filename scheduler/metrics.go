package scheduler

import (
	"context"
	"fmt"

	"go.opentelemetry.io/otel/metric"
)

// instruments are the metrics of a scheduler.
type instruments struct {
	counters map[string]metric.Int64Counter // by name
}

func newInstruments(meter metric.Meter, store Store) (*instruments, error) {
	in := &instruments{counters: make(map[string]metric.Int64Counter)}
	for name, description := range map[string]string{
		"sandbox.create.total":         "Creates by result.",
		"sandbox.delete.total":         "Deletes by result.",
		"sandbox.renew.total":          "Renewals by result.",
		"sandbox.cleanup.total":        "Expired sandboxes cleaned up.",
		"sandbox.cleanup.error.total":  "Failures to clean up, by kind of error.",
		"sandbox.adopt.total":          "Records written anew from what runs.",
		"sandbox.orphan.found.total":   "Sandboxes found without a record, by runtime.",
		"sandbox.orphan.stopped.total": "Sandboxes without a record that were stopped, by runtime.",
	} {
		counter, err := meter.Int64Counter(name, metric.WithDescription(description))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		in.counters[name] = counter
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
		return nil, fmt.Errorf("sandbox.active.count: %w", err)
	}
	return in, nil
}
