package agent

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// end sends what is left, as at the end of an agent.
func end(t *testing.T, telemetry *telemetry) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	must.NoError(t, telemetry.run(ctx))
}

func TestMetricsKeepTheirNames(t *testing.T) {
	telemetry, err := newTelemetry(t.Context(), hclog.NewNullLogger())
	must.NoError(t, err)
	defer end(t, telemetry)
	for name, attrs := range map[string][]attribute.KeyValue{
		"sandbox.create.total":        {attribute.String("result", "conflict"), attribute.String("reason", "agent_id,volume_host_path")},
		"sandbox.delete.total":        {attribute.String("result", "deleted")},
		"sandbox.cleanup.total":       {attribute.String("result", "cleaned")},
		"sandbox.cleanup.error.total": {attribute.String("error.type", "not_placed")},
	} {
		counter, err := telemetry.meter.Int64Counter(name)
		must.NoError(t, err)
		counter.Add(t.Context(), 1, metric.WithAttributes(attrs...))
	}
	_, err = telemetry.meter.Int64ObservableGauge("sandbox.active.count",
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error { o.Observe(7); return nil }))
	must.NoError(t, err)

	answer := httptest.NewRecorder()
	telemetry.handler.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/v1/metrics", nil))
	lines := strings.Split(answer.Body.String(), "\n")
	for _, want := range []string{
		`sandbox_create_total{reason="agent_id,volume_host_path",result="conflict"} 1`,
		`sandbox_delete_total{result="deleted"} 1`,
		`sandbox_cleanup_total{result="cleaned"} 1`,
		`sandbox_cleanup_error_total{error_type="not_placed"} 1`,
		`sandbox_active_count 7`,
	} {
		must.SliceContains(t, lines, want)
	}
	must.StrContains(t, answer.Body.String(), `service_name="bivouac"`)
}

func TestTracesGoWhereTheEnvironmentSays(t *testing.T) {
	var sent atomic.Int32
	collector := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/traces" {
			sent.Add(1)
		}
	}))
	defer collector.Close()
	for _, test := range []struct {
		name string
		env  map[string]string
		want int32
	}{
		{"nowhere, if it says nothing", nil, 0},
		{"to a collector", map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": collector.URL}, 1},
		{"to a collector of traces", map[string]string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": collector.URL + "/v1/traces"}, 1},
		{"nowhere, if it says so", map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": collector.URL, "OTEL_TRACES_EXPORTER": "none"}, 0},
		{"nowhere, if all is off", map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": collector.URL, "OTEL_SDK_DISABLED": "true"}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, name := range []string{"OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"} {
				t.Setenv(name, test.env[name])
			}
			sent.Store(0)
			telemetry, err := newTelemetry(t.Context(), hclog.NewNullLogger())
			must.NoError(t, err)
			_, span := telemetry.tracer.Start(t.Context(), "usecase.create_sandbox")
			span.End()
			end(t, telemetry)
			must.Eq(t, test.want, sent.Load())
		})
	}
}
