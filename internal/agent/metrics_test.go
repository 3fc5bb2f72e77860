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

// listingMeter notes the names of the metrics that are made.
type listingMeter struct {
	noop.Meter
	names map[string]bool
}

func (m listingMeter) Int64Counter(name string, _ ...metric.Int64CounterOption) (metric.Int64Counter, error) {
	m.names[name] = true
	return noop.Int64Counter{}, nil
}

func (m listingMeter) Int64UpDownCounter(name string, _ ...metric.Int64UpDownCounterOption) (metric.Int64UpDownCounter, error) {
	m.names[name] = true
	return noop.Int64UpDownCounter{}, nil
}

func (m listingMeter) Int64Gauge(name string, _ ...metric.Int64GaugeOption) (metric.Int64Gauge, error) {
	m.names[name] = true
	return noop.Int64Gauge{}, nil
}

func (m listingMeter) Float64Gauge(name string, _ ...metric.Float64GaugeOption) (metric.Float64Gauge, error) {
	m.names[name] = true
	return noop.Float64Gauge{}, nil
}

func (m listingMeter) Float64Histogram(name string, _ ...metric.Float64HistogramOption) (metric.Float64Histogram, error) {
	m.names[name] = true
	return noop.Float64Histogram{}, nil
}

func (m listingMeter) Int64ObservableCounter(name string, _ ...metric.Int64ObservableCounterOption) (metric.Int64ObservableCounter, error) {
	m.names[name] = true
	return noop.Int64ObservableCounter{}, nil
}

func (m listingMeter) Int64ObservableGauge(name string, _ ...metric.Int64ObservableGaugeOption) (metric.Int64ObservableGauge, error) {
	m.names[name] = true
	return noop.Int64ObservableGauge{}, nil
}

func TestMetricsAreThoseOfTheirDocument(t *testing.T) {
	document, err := os.ReadFile("METRICS.md")
	must.NoError(t, err)
	var documented []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z._]+)` \\|").FindAllSubmatch(document, -1) {
		documented = append(documented, string(row[1]))
	}
	slices.Sort(documented)

	meter := listingMeter{names: map[string]bool{}}
	metrics, err := newMetrics(meter)
	must.NoError(t, err)
	c := config.Default()
	base, err := newBase(c, metrics, hclog.NewNullLogger())
	must.NoError(t, err)
	_, err = scheduler.New(scheduler.Config{
		Store: base.store, Locker: base.locker, Drivers: base.drivers, DefaultRuntime: c.Runtime,
		TTL: c.TTL, MaxTTL: c.MaxTTL, CleanupInterval: c.CleanupInterval, Now: base.now,
		Logger: hclog.NewNullLogger(), Meter: meter, Tracer: nooptrace.NewTracerProvider().Tracer(""),
	})
	must.NoError(t, err)
	must.Eq(t, documented, slices.Sorted(maps.Keys(meter.names)))
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
