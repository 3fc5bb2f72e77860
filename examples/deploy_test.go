package examples_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	nomadapi "github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/stack"
)

// promtool runs promtool in a copy of the deploy folder in which the secrets exist.
func promtool(t *testing.T, files map[string]string, args ...string) {
	t.Helper()
	program, err := exec.LookPath("promtool")
	if err != nil && os.Getenv("CI") == "" {
		t.Skip("needs promtool, which is in Debian's package prometheus")
	}
	must.NoError(t, err)
	dir := t.TempDir()
	must.NoError(t, os.CopyFS(dir, os.DirFS("deploy")))
	for name, text := range files {
		must.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	must.NoError(t, err, must.Sprintf("%s", out))
}

func TestMonitoring(t *testing.T) {
	t.Run("the alerts are valid", func(t *testing.T) { promtool(t, nil, "check", "rules", "alerts.yml") })
	t.Run("the alerts fire as their tests say", func(t *testing.T) { promtool(t, nil, "test", "rules", "alerts_test.yml") })
	t.Run("Prometheus accepts the scrape configuration", func(t *testing.T) {
		promtool(t, map[string]string{"bivouac.token": "secret"}, "check", "config", "prometheus.yml")
	})
	t.Run("the expressions of the dashboard are valid", func(t *testing.T) {
		// promtool checks no dashboards, but it checks rules with the same expressions.
		text, err := os.ReadFile("deploy/grafana.json")
		must.NoError(t, err)
		var dashboard struct {
			Panels []struct{ Targets []struct{ Expr string } }
		}
		must.NoError(t, json.Unmarshal(text, &dashboard))
		rules := "groups:\n- name: dashboard\n  rules:\n"
		for i, panel := range dashboard.Panels {
			for j, target := range panel.Targets {
				expr := strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*").Replace(target.Expr)
				rules += fmt.Sprintf("  - {record: 'panel:%d:%d', expr: '%s'}\n", i, j, expr)
			}
		}
		promtool(t, map[string]string{"dashboard.yml": rules}, "check", "rules", "dashboard.yml")
	})
	t.Run("each alert is tested and explained", func(t *testing.T) {
		alerts, err := os.ReadFile("deploy/alerts.yml")
		must.NoError(t, err)
		tests, err := os.ReadFile("deploy/alerts_test.yml")
		must.NoError(t, err)
		page, err := os.ReadFile("deploy/PRODUCTION.md")
		must.NoError(t, err)
		names := regexp.MustCompile(`(?m)- alert: (\w+)$`).FindAllSubmatch(alerts, -1)
		must.SliceNotEmpty(t, names)
		for _, name := range names {
			fires := regexp.MustCompile(`alertname: ` + string(name[1]) + `\n +exp_alerts:`)
			must.True(t, fires.Match(tests), must.Sprintf("no test lets %s fire", name[1]))
			must.StrContains(t, string(page), "`"+string(name[1])+"`")
		}
	})
}

func TestNomadAcceptsTheJobs(t *testing.T) {
	nomad := stack.NomadForTest(t)
	client, err := nomad.Client()
	must.NoError(t, err)
	program, err := stack.NomadBinary(t.Context())
	must.NoError(t, err)
	_, err = client.NodePools().Register(&nomadapi.NodePool{Name: "sandboxes"}, nil) // that of the page
	must.NoError(t, err)
	for namespace, args := range map[string][]string{
		"bivouac":      {"-var=image=bivouac:dev", "deploy/bivouac.nomad.hcl"},
		"bivouac-node": {"deploy/bivouac-node.nomad.hcl"},
	} {
		_, err = client.Namespaces().Register(&nomadapi.Namespace{Name: namespace}, nil)
		must.NoError(t, err)
		args = append([]string{"job", "validate", "-address=http://" + nomad.Addr()}, args...)
		out, err := exec.CommandContext(t.Context(), program, args...).CombinedOutput()
		must.NoError(t, err, must.Sprintf("%s", out))
	}
}
