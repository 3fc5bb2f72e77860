package agent

import (
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
	"go.opentelemetry.io/contrib/exporters/autoexport"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
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
	// flushLimit is how long the last spans may take to be sent.
	flushLimit = 5 * time.Second
	// scrapeLimit bounds one scrape: it asks the store for a count.
	scrapeLimit = 10 * time.Second
)

// telemetry is where metrics and spans go: metrics are served as Prometheus
// text, spans are sent where OpenTelemetry's environment variables say.
type telemetry struct {
	meter   metric.Meter
	tracer  trace.Tracer
	handler http.Handler
	flush   []func(context.Context) error
}

func newTelemetry(ctx context.Context, log hclog.Logger) (*telemetry, error) {
	// Here OpenTelemetry reports what it cannot send. It has no other way.
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("telemetry_failed", "error", err) }))
	about, err := resource.New(ctx,
		resource.WithAttributes(
			attribute.String("service.name", "bivouac"),
			attribute.String("service.version", version.Get().Version)),
		resource.WithTelemetrySDK(),
		resource.WithFromEnv()) // last, so that it counts
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
		// What can be told is told: where the store does not answer, the
		// count of sessions is missing and the rest is there.
		ErrorHandling: promhttp.ContinueOnError,
		Timeout:       scrapeLimit,
	})
	return nil
}

func (t *telemetry) addTraces(ctx context.Context, about *resource.Resource) error {
	t.tracer = noop.NewTracerProvider().Tracer(scope)
	if !tracesWanted() {
		return nil
	}
	exporter, err := autoexport.NewSpanExporter(ctx)
	if err != nil {
		return err
	}
	if autoexport.IsNoneSpanExporter(exporter) {
		return nil
	}
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(about))
	t.flush = append(t.flush, provider.Shutdown)
	t.tracer = provider.Tracer(scope)
	return nil
}

// tracesWanted says whether the environment asks for traces. By OpenTelemetry's
// own rules they would go to a collector on this machine where nothing is said.
func tracesWanted() bool {
	if os.Getenv("OTEL_SDK_DISABLED") == "true" {
		return false
	}
	for _, name := range []string{"OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"} {
		if os.Getenv(name) != "" {
			return true
		}
	}
	return false
}

// run waits until ctx ends and then sends what is left.
func (t *telemetry) run(ctx context.Context) error {
	<-ctx.Done()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushLimit)
	defer cancel()
	var errs []error
	for _, flush := range t.flush {
		errs = append(errs, flush(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		// Where spans cannot be sent, that is no failure of the agent.
		otel.Handle(err)
	}
	return nil
}
