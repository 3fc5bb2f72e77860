package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/bivouac/bivouac/internal/version"
)

const (
	scope = "github.com/bivouac/bivouac"
	// flushLimit bounds the time to send the last spans.
	flushLimit = 5 * time.Second
)

// telemetry serves metrics as Prometheus text, and sends spans to where OpenTelemetry's
// environment variables say.
type telemetry struct {
	meter   metric.Meter
	tracer  trace.Tracer
	handler http.Handler
	flush   []func(context.Context) error
}

func newTelemetry(ctx context.Context, log hclog.Logger) (*telemetry, error) {
	// OpenTelemetry reports here what it cannot send. It has no other way.
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("telemetry_failed", "error", err) }))
	about, err := resource.New(ctx,
		resource.WithAttributes(
			attribute.String("service.name", "bivouac"),
			attribute.String("service.version", version.Get().Version)),
		resource.WithTelemetrySDK(),
		resource.WithFromEnv()) // last, so that it overrides the others
	if err != nil {
		return nil, fmt.Errorf("agent: telemetry: %w", err)
	}
	t := &telemetry{}
	if err := t.addMetrics(about, log); err != nil {
		return nil, fmt.Errorf("agent: metrics: %w", err)
	}
	if err := t.addTraces(ctx, about); err != nil {
		return nil, fmt.Errorf("agent: traces: %w", err)
	}
	return t, nil
}

func (t *telemetry) addMetrics(about *resource.Resource, log hclog.Logger) error {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	exporter, err := otelprometheus.New(otelprometheus.WithRegisterer(registry), otelprometheus.WithoutScopeInfo())
	if err != nil {
		return err
	}
	provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(exporter), sdkmetric.WithResource(about))
	t.flush = append(t.flush, provider.Shutdown)
	t.meter = provider.Meter(scope)
	t.handler = promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog: log.Named("metrics").StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Warn}),
		// If the store does not answer, the number of sessions is missing and the other
		// metrics are still served. The store limits how long that takes: promhttp's own
		// limit would answer in plain text.
		ErrorHandling: promhttp.ContinueOnError,
	})
	return nil
}

func (t *telemetry) addTraces(ctx context.Context, about *resource.Resource) error {
	t.tracer = noop.NewTracerProvider().Tracer(scope)
	exporter, err := newSpanExporter(ctx)
	if err != nil || exporter == nil {
		return err
	}
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(about))
	t.flush = append(t.flush, provider.Shutdown)
	t.tracer = provider.Tracer(scope)
	return nil
}

// newSpanExporter returns an exporter as OpenTelemetry's environment variables describe
// it. It returns nil if they are not set or ask for none. By OpenTelemetry's rules, spans
// would go to a collector on this machine if nothing is set.
//
// OpenTelemetry's own autoexport contains every exporter and would make each build of
// Bivouac some ten percent longer.
func newSpanExporter(ctx context.Context) (sdktrace.SpanExporter, error) {
	name := os.Getenv("OTEL_TRACES_EXPORTER")
	said := cmp.Or(name, os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT"), os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))
	switch {
	case said == "", name == "none", os.Getenv("OTEL_SDK_DISABLED") == "true":
		return nil, nil //nolint:nilnil // there are no spans to send
	case name != "" && name != "otlp":
		return nil, fmt.Errorf("OTEL_TRACES_EXPORTER is %q, but must be otlp or none", name)
	}
	switch protocol := cmp.Or(os.Getenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"), os.Getenv("OTEL_EXPORTER_OTLP_PROTOCOL")); protocol {
	case "http/protobuf", "":
		return otlptracehttp.New(ctx)
	case "grpc":
		return otlptracegrpc.New(ctx)
	default:
		return nil, fmt.Errorf("OTEL_EXPORTER_OTLP_PROTOCOL is %q, but must be http/protobuf or grpc", protocol)
	}
}

// run waits until ctx ends, and then sends the remaining spans.
func (t *telemetry) run(ctx context.Context) error {
	<-ctx.Done()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushLimit)
	defer cancel()
	var errs []error
	for _, flush := range t.flush {
		errs = append(errs, flush(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		// If spans cannot be sent, the server has not failed.
		otel.Handle(err)
	}
	return nil
}
