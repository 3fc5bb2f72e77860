package agent

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	nooptrace "go.opentelemetry.io/otel/trace/noop"

	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/scheduler"
)

// listingMeter notes the names of the metrics that are made, and records each of them
// once. Without that, they would not be served.
type listingMeter struct {
	metric.Meter
	names map[string]bool
}

func (m listingMeter) Int64Counter(name string, options ...metric.Int64CounterOption) (metric.Int64Counter, error) {
	m.names[name] = true
	c, err := m.Meter.Int64Counter(name, options...)
	c.Add(context.Background(), 1)
	return c, err
}

func (m listingMeter) Int64UpDownCounter(name string, options ...metric.Int64UpDownCounterOption) (metric.Int64UpDownCounter, error) {
	m.names[name] = true
	c, err := m.Meter.Int64UpDownCounter(name, options...)
	c.Add(context.Background(), 1)
	return c, err
}

func (m listingMeter) Int64Gauge(name string, options ...metric.Int64GaugeOption) (metric.Int64Gauge, error) {
	m.names[name] = true
	g, err := m.Meter.Int64Gauge(name, options...)
	g.Record(context.Background(), 1)
	return g, err
}

func (m listingMeter) Float64Gauge(name string, options ...metric.Float64GaugeOption) (metric.Float64Gauge, error) {
	m.names[name] = true
	g, err := m.Meter.Float64Gauge(name, options...)
	g.Record(context.Background(), 1)
	return g, err
}

func (m listingMeter) Float64Histogram(name string, options ...metric.Float64HistogramOption) (metric.Float64Histogram, error) {
	m.names[name] = true
	h, err := m.Meter.Float64Histogram(name, options...)
	h.Record(context.Background(), 1)
	return h, err
}

func (m listingMeter) Int64ObservableCounter(name string, options ...metric.Int64ObservableCounterOption) (metric.Int64ObservableCounter, error) {
	m.names[name] = true
	return m.Meter.Int64ObservableCounter(name, append(options, metric.WithInt64Callback(observeOne))...)
}

func (m listingMeter) Int64ObservableGauge(name string, options ...metric.Int64ObservableGaugeOption) (metric.Int64ObservableGauge, error) {
	m.names[name] = true
	return m.Meter.Int64ObservableGauge(name, append(options, metric.WithInt64Callback(observeOne))...)
}

func observeOne(_ context.Context, o metric.Int64Observer) error {
	o.Observe(1)
	return nil
}

// makeMetrics makes all metrics of a replica and returns their names.
func makeMetrics(t *testing.T, meter metric.Meter) []string {
	t.Helper()
	listing := listingMeter{Meter: meter, names: map[string]bool{}}
	metrics, err := newMetrics(listing)
	must.NoError(t, err)
	c := config.Default()
	c.Consul.Address = "127.0.0.1:1" // where nothing listens
	base, err := newBase(c, metrics, hclog.NewNullLogger())
	must.NoError(t, err)
	_, err = scheduler.New(scheduler.Config{
		Store: base.store, Locker: base.locker, Drivers: base.drivers, DefaultRuntime: c.Runtime,
		TTL: c.TTL, MaxTTL: c.MaxTTL, CleanupInterval: c.CleanupInterval, Now: base.now,
		Logger: hclog.NewNullLogger(), Meter: listing, Tracer: nooptrace.NewTracerProvider().Tracer(""),
	})
	must.NoError(t, err)
	return slices.Sorted(maps.Keys(listing.names))
}

func TestMetricsAreThoseOfTheirDocument(t *testing.T) {
	document, err := os.ReadFile("METRICS.md")
	must.NoError(t, err)
	var documented []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z._]+)` \\|").FindAllSubmatch(document, -1) {
		documented = append(documented, string(row[1]))
	}
	slices.Sort(documented)
	must.Eq(t, documented, makeMetrics(t, noop.Meter{}))
}

func TestMetricsOfRequestsSayHowTheyCameOut(t *testing.T) {
	for want, requests := range map[string][]struct {
		status int
		err    error
	}{
		"ok":          {{0, nil}, {http.StatusOK, nil}, {http.StatusNotFound, errors.New("404")}},
		"busy":        {{http.StatusTooManyRequests, nil}},
		"denied":      {{http.StatusForbidden, nil}, {http.StatusUnauthorized, errors.New("401")}},
		"conflict":    {{http.StatusConflict, nil}},
		"error":       {{http.StatusInternalServerError, nil}, {http.StatusBadRequest, errors.New("400")}},
		"canceled":    {{0, context.Canceled}},
		"timeout":     {{0, context.DeadlineExceeded}},
		"unreachable": {{0, errors.New("connection refused")}},
	} {
		for _, r := range requests {
			must.Eq(t, want, outcome(r.status, r.err))
		}
	}
}

func TestMetricsOfRequestsAreThoseOfTheirClient(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	metrics, err := newMetrics(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)).Meter(scope))
	must.NoError(t, err)
	c := config.Default()
	c.Consul.Address = "127.0.0.1:1" // where nothing listens
	base, err := newBase(c, metrics, hclog.NewNullLogger())
	must.NoError(t, err)

	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	must.Error(t, base.checks[0].Run(ctx)) // Consul's

	var all metricdata.ResourceMetrics
	must.NoError(t, reader.Collect(t.Context(), &all))
	for _, m := range all.ScopeMetrics[0].Metrics {
		if m.Name == "consul.request.duration" {
			points := m.Data.(metricdata.Histogram[float64]).DataPoints
			result, _ := points[0].Attributes.Value("outcome")
			must.Eq(t, "unreachable", result.AsString())
			return
		}
	}
	t.Fatal("no request was measured")
}
