package agent

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
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

func TestMetricsDoWithoutTheStore(t *testing.T) {
	telemetry, err := newTelemetry(t.Context(), hclog.NewNullLogger())
	must.NoError(t, err)
	defer end(t, telemetry)
	counter, err := telemetry.meter.Int64Counter("sandbox.delete.total")
	must.NoError(t, err)
	counter.Add(t.Context(), 1)
	_, err = telemetry.meter.Int64ObservableGauge("sandbox.active.count",
		metric.WithInt64Callback(func(context.Context, metric.Int64Observer) error { return errors.New("no store") }))
	must.NoError(t, err)

	answer := httptest.NewRecorder()
	telemetry.handler.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/v1/metrics", nil))
	must.Eq(t, http.StatusOK, answer.Code)
	must.StrContains(t, answer.Body.String(), "sandbox_delete_total 1")
	must.StrNotContains(t, answer.Body.String(), "sandbox_active_count")
}

func TestTracesGoWhereTheEnvironmentSays(t *testing.T) {
	var sent, sentByGRPC atomic.Int32
	collector := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/traces" {
			sent.Add(1)
		}
	}))
	defer collector.Close()
	grpcCollector := startGRPCCollector(t, &sentByGRPC)
	for _, test := range []struct {
		name                         string
		endpoint, tracesEndpoint     string
		exporter, protocol, disabled string
		wantSent, wantByGRPC         int32
		wantErr                      string
	}{
		{name: "nowhere, if it says nothing"},
		{name: "to a collector", endpoint: collector.URL, wantSent: 1},
		{name: "to a collector of traces", tracesEndpoint: collector.URL + "/v1/traces", wantSent: 1},
		{name: "to a collector that speaks gRPC", endpoint: grpcCollector, protocol: "grpc", wantByGRPC: 1},
		{name: "nowhere, if it says so", endpoint: collector.URL, exporter: "none"},
		{name: "nowhere, if all is off", endpoint: collector.URL, disabled: "true"},
		{name: "not by what is unknown", exporter: "console", wantErr: `OTEL_TRACES_EXPORTER is "console"`},
		{name: "not in a way that is unknown", endpoint: collector.URL, protocol: "http/json", wantErr: `OTEL_EXPORTER_OTLP_PROTOCOL is "http/json"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Setenv("OTEL_SDK_DISABLED", test.disabled)
			t.Setenv("OTEL_TRACES_EXPORTER", test.exporter)
			t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", test.endpoint)
			t.Setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", test.tracesEndpoint)
			t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", test.protocol)
			t.Setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "")
			sent.Store(0)
			sentByGRPC.Store(0)
			telemetry, err := newTelemetry(t.Context(), hclog.NewNullLogger())
			if test.wantErr != "" {
				must.ErrorContains(t, err, test.wantErr)
				return
			}
			must.NoError(t, err)
			_, span := telemetry.tracer.Start(t.Context(), "usecase.create_sandbox")
			span.End()
			end(t, telemetry)
			must.Eq(t, test.wantSent, sent.Load())
			must.Eq(t, test.wantByGRPC, sentByGRPC.Load())
		})
	}
}

// startGRPCCollector starts a collector that counts how often it gets spans,
// and returns its URL.
func startGRPCCollector(t *testing.T, sent *atomic.Int32) string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must.NoError(t, err)
	server := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		if method, _ := grpc.MethodFromServerStream(stream); method == "/opentelemetry.proto.collector.trace.v1.TraceService/Export" {
			sent.Add(1)
		}
		// An empty message takes any other in, and is one of any kind.
		return errors.Join(stream.RecvMsg(&emptypb.Empty{}), stream.SendMsg(&emptypb.Empty{}))
	}))
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listener) }) // until it is stopped
	t.Cleanup(func() {
		server.Stop()
		serving.Wait()
	})
	return "http://" + listener.Addr().String()
}
