package scheduler_test

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/shoenig/test/must"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// measured returns the points of a metric, sorted: each as its attributes, and the
// value of a gauge of whole numbers.
func (seen *telemetry) measured(t *testing.T, metric string) []string {
	t.Helper()
	var rm metricdata.ResourceMetrics
	must.NoError(t, seen.reader.Collect(context.Background(), &rm))
	var points []string
	add := func(set attribute.Set) {
		labels := map[string]string{}
		for _, kv := range set.ToSlice() {
			labels[string(kv.Key)] = kv.Value.String()
		}
		var pairs []string
		for _, k := range slices.Sorted(maps.Keys(labels)) {
			pairs = append(pairs, k+"="+labels[k])
		}
		points = append(points, strings.Join(pairs, " "))
	}
	for _, scope := range rm.ScopeMetrics {
		for _, m := range scope.Metrics {
			if m.Name != metric {
				continue
			}
			switch data := m.Data.(type) {
			case metricdata.Histogram[float64]:
				for _, p := range data.DataPoints {
					add(p.Attributes)
				}
			case metricdata.Gauge[int64]:
				for _, p := range data.DataPoints {
					points = append(points, itoa(int(p.Value)))
				}
			case metricdata.Gauge[float64]:
				for _, p := range data.DataPoints {
					add(p.Attributes)
				}
			}
		}
	}
	slices.Sort(points)
	return points
}

func TestMetrics(t *testing.T) {
	conflicting := createA
	conflicting.AgentID = "agent-2"
	create := func(cmd scheduler.CreateCommand) func(*world) {
		return func(w *world) { _, _ = w.Create(context.Background(), cmd) }
	}
	remove := func(w *world) { _, _ = w.Delete(context.Background(), chatA) }
	for _, tc := range []struct {
		name   string
		steps  []func(*world)
		metric string
		want   []string
	}{
		{"a create is measured by result and runtime", []func(*world){create(createA)},
			"sandbox.create.duration", []string{"result=created runtime=fake"}},
		{"a replacement is one", []func(*world){created(createA), later(defaultTTL), create(createA)},
			"sandbox.create.duration", []string{"result=created runtime=fake", "result=replaced runtime=fake"}},
		{"a conflict too", []func(*world){created(createA), create(conflicting)},
			"sandbox.create.duration", []string{"result=conflict runtime=fake", "result=created runtime=fake"}},
		{"a start that fails too", []func(*world){fails("driver.create", runtime.ErrNotReady), create(createA)},
			"sandbox.create.duration", []string{"result=error runtime=fake"}},
		{"what is refused at once has no runtime", []func(*world){create(scheduler.CreateCommand{})},
			"sandbox.create.duration", []string{"result=error runtime="}},
		{"a reuse is measured apart", []func(*world){created(createA), create(createA)},
			"sandbox.reuse.duration", []string{""}},
		{"a start is measured by stage", []func(*world){create(createA)},
			"sandbox.create.stage.duration", []string{"runtime=fake stage=placed", "runtime=fake stage=ready", "runtime=fake stage=started"}},
		{"a delete is measured by result", []func(*world){created(createA), remove, remove},
			"sandbox.delete.duration", []string{"result=deleted", "result=not_found"}},
		{"the wait for a lock is measured", []func(*world){create(createA)},
			"sandbox.lock.wait", []string{"result=taken"}},
		{"and a wait that fails", []func(*world){fails("lock", scheduler.ErrLockTimeout), create(createA)},
			"sandbox.lock.wait", []string{"result=lock_timeout"}},
		{"passes that succeed are noted", []func(*world){
			func(w *world) { _, _ = w.CleanupExpired(context.Background()) },
			func(w *world) { _ = w.SettleInFlight(context.Background()) },
		}, "sandbox.pass.last_success", []string{"pass=cleanup", "pass=settle"}},
		{"passes that fail are not", []func(*world){
			fails("list expired", scheduler.ErrUnavailable), fails("list in flight", scheduler.ErrUnavailable),
			func(w *world) { _, _ = w.CleanupExpired(context.Background()) },
			func(w *world) { _ = w.SettleInFlight(context.Background()) },
		}, "sandbox.pass.last_success", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			for _, step := range tc.steps {
				step(w)
			}
			must.Eq(t, tc.want, w.seen.measured(t, tc.metric))
		})
	}
}
