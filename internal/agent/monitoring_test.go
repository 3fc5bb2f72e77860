package agent

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
)

// servedMetrics returns the names of all series that a replica can serve.
func servedMetrics(t *testing.T) []string {
	t.Helper()
	telemetry, err := newTelemetry(t.Context(), hclog.NewNullLogger())
	must.NoError(t, err)
	makeMetrics(t, telemetry.meter)
	answer := httptest.NewRecorder()
	telemetry.handler.ServeHTTP(answer, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/v1/metrics", nil))
	must.Eq(t, http.StatusOK, answer.Code)
	var names []string
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (\S+) (\S+)$`).FindAllStringSubmatch(answer.Body.String(), -1) {
		if name, kind := m[1], m[2]; kind == "histogram" {
			names = append(names, name+"_bucket", name+"_count", name+"_sum")
		} else {
			names = append(names, name)
		}
	}
	return names
}

var (
	// The parts of an expression that name no metric: texts, labels, ranges and times.
	noMetric = regexp.MustCompile(`"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(?:by|without|on|ignoring)\s*\([^)]*\)|\boffset\s+\w+`)
	// A name, with "(" if it is that of a function.
	promName = regexp.MustCompile(`[a-zA-Z_:][\w:]*(?:\s*\()?`)
)

// metricsOf returns the names of the metrics in an expression of PromQL.
func metricsOf(expr string) []string {
	var names []string
	for _, name := range promName.FindAllString(noMetric.ReplaceAllString(expr, " "), -1) {
		if !strings.HasSuffix(name, "(") && !slices.Contains([]string{"and", "or", "unless"}, name) {
			names = append(names, name)
		}
	}
	return names
}

func TestMetricsOf(t *testing.T) {
	for expr, want := range map[string][]string{
		`up{job="a"} == 0`: {"up"},
		`time() - max by (pass, runtime) (last_seconds) > 600`:                {"last_seconds"},
		`sum(rate(a_total[5m])) / sum(rate(b_total{x=~"y|z"}[$__range]))`:     {"a_total", "b_total"},
		"histogram_quantile(0.95, sum by (le)\n  (rate(c_bucket[10m]))) > 10": {"c_bucket"},
		`sum(d unless d offset 1h) or vector(0)`:                              {"d", "d"},
	} {
		must.Eq(t, want, metricsOf(expr), must.Sprint(expr))
	}
}

// dashboard is the part of a Grafana dashboard that asks for metrics.
type dashboard struct {
	Panels []struct {
		Title   string
		Targets []struct{ Expr string }
	}
}

func TestDashboardAndAlertsAskForMetricsThatAReplicaServes(t *testing.T) {
	served := append(servedMetrics(t), "up") // Prometheus' own
	asked := map[string][]string{}           // expressions, by where they are

	text, err := os.ReadFile("../../examples/deploy/grafana.json")
	must.NoError(t, err)
	var d dashboard
	must.NoError(t, json.Unmarshal(text, &d))
	for _, panel := range d.Panels {
		for _, target := range panel.Targets {
			asked["the panel "+panel.Title] = append(asked["the panel "+panel.Title], target.Expr)
		}
	}
	must.Greater(t, 10, len(asked))

	text, err = os.ReadFile("../../examples/deploy/alerts.yml")
	must.NoError(t, err)
	rules := regexp.MustCompile(`(?s)- alert: (\w+)\n +expr: (.*?)\n +(?:for|labels):`).FindAllStringSubmatch(string(text), -1)
	must.Eq(t, strings.Count(string(text), "- alert:"), len(rules))
	for _, rule := range rules {
		asked["the alert "+rule[1]] = []string{rule[2]}
	}

	for where, exprs := range asked {
		for _, expr := range exprs {
			names := metricsOf(expr)
			must.SliceNotEmpty(t, names, must.Sprint(where))
			for _, name := range names {
				must.SliceContains(t, served, name, must.Sprint(where))
			}
		}
	}
}
