package agent

import (
	"context"
	"errors"
	"net/http"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/internal/store/consul"
)

// metrics are the metrics of the parts around the scheduler. The scheduler has its
// own. METRICS.md lists all of them.
type metrics struct {
	meter         metric.Meter
	consul, nomad metric.Float64Histogram // of requests
	refusals      metric.Int64Counter
	auditLosses   metric.Int64Counter
	reloads       metric.Int64Counter // that failed
	certificates  certificates        // whose expiry is observed
}

func newMetrics(meter metric.Meter) (*metrics, error) {
	m := &metrics{meter: meter}
	boundaries := metric.WithExplicitBucketBoundaries(.0005, .001, .002, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30)
	var consulErr, nomadErr, refusalsErr, auditErr, reloadsErr error
	m.consul, consulErr = meter.Float64Histogram("consul.request.duration", metric.WithUnit("s"), boundaries,
		metric.WithDescription("Time of a request to Consul until its answer begins."))
	m.nomad, nomadErr = meter.Float64Histogram("nomad.request.duration", metric.WithUnit("s"), boundaries,
		metric.WithDescription("Time of a request to Nomad."))
	m.refusals, refusalsErr = meter.Int64Counter("sandbox.refusal.total",
		metric.WithDescription("Requests refused because a limit was reached."))
	m.auditLosses, auditErr = meter.Int64Counter("audit.loss.total",
		metric.WithDescription("Lines that a sink of the audit log did not take."))
	m.reloads, reloadsErr = meter.Int64Counter("credential.reload.failure.total",
		metric.WithDescription("Reads of a token or certificate file that could not be used."))
	_, expiryErr := meter.Int64ObservableGauge("certificate.expiry", metric.WithUnit("s"),
		metric.WithDescription("Unix time at which a certificate of this server expires."),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			for name, expires := range m.certificates.all() {
				o.Observe(expires.Unix(), metric.WithAttributes(attribute.String("credential", name)))
			}
			return nil
		}))
	return m, errors.Join(consulErr, nomadErr, refusalsErr, auditErr, reloadsErr, expiryErr)
}

// refused counts a request that was refused.
func (m *metrics) refused(ctx context.Context, limit string) {
	m.refusals.Add(ctx, 1, metric.WithAttributes(attribute.String("limit", limit)))
}

// auditLost counts a line that a sink of the audit log did not take.
func (m *metrics) auditLost(sink string) {
	m.auditLosses.Add(context.Background(), 1, metric.WithAttributes(attribute.String("sink", sink)))
}

// reloadFailed counts a credential that could not be read again.
func (m *metrics) reloadFailed(credential string) {
	m.reloads.Add(context.Background(), 1, metric.WithAttributes(attribute.String("credential", credential)))
}

// requests returns an observer that records each request of a client.
func requests(duration metric.Float64Histogram) consul.Observer {
	return func(operation string, took time.Duration, status int, err error) {
		duration.Record(context.Background(), took.Seconds(), metric.WithAttributes(
			attribute.String("operation", operation), attribute.String("outcome", outcome(status, err))))
	}
}

// outcome classifies how a request ended. The status is 0 if there was none.
func outcome(status int, err error) string {
	switch {
	case status == http.StatusNotFound, status > 0 && status < http.StatusBadRequest, status == 0 && err == nil:
		return "ok" // "not found" is an answer
	case status == http.StatusTooManyRequests:
		return "busy"
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		return "denied"
	case status == http.StatusConflict:
		return "conflict"
	case status > 0:
		return "error"
	case errors.Is(err, context.Canceled):
		return "canceled"
	case errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	default:
		return "unreachable"
	}
}

// addPlugins counts how often plugins are started again.
func (m *metrics) addPlugins(host *pluginhost.Host) error {
	_, err := m.meter.Int64ObservableCounter("plugin.restart.total",
		metric.WithDescription("Starts of a plugin after its first."),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			for _, p := range host.Status() {
				o.Observe(int64(p.Restarts), metric.WithAttributes(attribute.String("plugin", p.Name)))
			}
			return nil
		}))
	return err
}
