package scheduler_test

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/hashicorp/go-hclog"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
)

// attrs are a span's attributes, as text.
type attrs map[string]string

// span is what a test compares of a span.
type span struct {
	Name  string
	Attrs attrs
	Error string // the status's description where it is Error; the error is recorded too then
}

// telemetry catches what a scheduler tells its operators.
type telemetry struct {
	spans  *tracetest.SpanRecorder
	tracer trace.Tracer
	reader *sdkmetric.ManualReader
	meter  metric.Meter
	logger hclog.Logger

	mu     sync.Mutex
	events []event
}

type event struct {
	level hclog.Level
	name  string
	args  []any
}

func newTelemetry() *telemetry {
	seen := &telemetry{
		spans: tracetest.NewSpanRecorder(),
		// What was counted since the last look is what a test asks about.
		reader: sdkmetric.NewManualReader(sdkmetric.WithTemporalitySelector(
			func(sdkmetric.InstrumentKind) metricdata.Temporality { return metricdata.DeltaTemporality })),
	}
	seen.tracer = sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(seen.spans)).Tracer("bivouac")
	seen.meter = sdkmetric.NewMeterProvider(sdkmetric.WithReader(seen.reader)).Meter("bivouac")
	logger := hclog.NewInterceptLogger(&hclog.LoggerOptions{Output: io.Discard, Level: hclog.Trace})
	logger.RegisterSink(seen)
	seen.logger = logger
	return seen
}

// Accept implements [hclog.SinkAdapter].
func (seen *telemetry) Accept(_ string, level hclog.Level, msg string, args ...any) {
	seen.mu.Lock()
	defer seen.mu.Unlock()
	seen.events = append(seen.events, event{level, msg, args})
}

// takeLogs returns the log events since the last look, each as a line. An
// error's words are free, so of the argument "detail" only its lack is shown.
func (seen *telemetry) takeLogs() []string {
	seen.mu.Lock()
	defer seen.mu.Unlock()
	var lines []string
	for _, e := range seen.events {
		line := fmt.Sprintf("%s %s", e.level, e.name)
		var failed, explained bool
		for pair := range slices.Chunk(e.args, 2) {
			if len(pair) < 2 {
				line += fmt.Sprintf(" MISSING VALUE OF %v", pair[0])
				continue
			}
			failed = failed || pair[0] == "error"
			if pair[0] == "detail" {
				explained = fmt.Sprint(pair[1]) != ""
				continue
			}
			line += fmt.Sprintf(" %v=%v", pair[0], pair[1])
		}
		if failed != explained {
			line += " error WITHOUT detail"
		}
		lines = append(lines, line)
	}
	seen.events = nil
	return lines
}

// takeSpans returns the spans that ended since the last look.
func (seen *telemetry) takeSpans() []span {
	var spans []span
	for _, s := range seen.spans.Ended() {
		found := span{Name: s.Name(), Attrs: attrs{}}
		for _, kv := range s.Attributes() {
			found.Attrs[string(kv.Key)] = kv.Value.String()
		}
		recorded := slices.ContainsFunc(s.Events(), func(e sdktrace.Event) bool { return e.Name == "exception" })
		switch failed := s.Status().Code == codes.Error; {
		case failed != recorded:
			found.Error = fmt.Sprintf("status %v, but error recorded: %t", s.Status(), recorded)
		case failed:
			found.Error = s.Status().Description
		}
		spans = append(spans, found)
	}
	seen.spans.Reset()
	return spans
}

// takeMetrics scrapes: it returns what was counted since the last look, and how
// many sessions there are, each point as a line.
func (seen *telemetry) takeMetrics() ([]string, error) {
	var rm metricdata.ResourceMetrics
	err := seen.reader.Collect(context.Background(), &rm)
	var lines []string
	for _, scope := range rm.ScopeMetrics {
		for _, m := range scope.Metrics {
			if !strings.HasSuffix(m.Name, ".total") && m.Name != "sandbox.active.count" {
				continue // see metrics_test.go
			}
			var points []metricdata.DataPoint[int64]
			switch data := m.Data.(type) {
			case metricdata.Sum[int64]:
				points = data.DataPoints
			case metricdata.Gauge[int64]:
				points = data.DataPoints
			}
			for _, p := range points {
				labels := make(map[string]string)
				for _, kv := range p.Attributes.ToSlice() {
					labels[string(kv.Key)] = kv.Value.String()
				}
				lines = append(lines, point(m.Name, labels, p.Value))
			}
		}
	}
	slices.Sort(lines)
	return lines, err
}

// point writes a point of a metric down, as Prometheus would.
func point(name string, labels map[string]string, value int64) string {
	var pairs []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		pairs = append(pairs, k+"="+labels[k])
	}
	if len(pairs) > 0 {
		name += "{" + strings.Join(pairs, " ") + "}"
	}
	return fmt.Sprintf("%s %d", name, value)
}
