package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/audit"
	"github.com/bivouac/bivouac/internal/config"
)

// openAudit opens the audit log. Without audit blocks it has no sinks.
func openAudit(c config.Config, stdout io.Writer, metrics *metrics, log hclog.Logger) (*audit.Log, error) {
	node, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	settings := audit.Config{Node: node, Logger: log.Named("audit"), Lost: metrics.auditLost}
	for _, a := range c.Audits {
		sink, err := audit.Open(a.Settings(), stdout)
		if err != nil {
			return nil, errors.Join(c.Wrong("audit."+a.Name, err), closeSinks(settings.Sinks))
		}
		settings.Sinks = append(settings.Sinks, sink)
	}
	return audit.New(settings), nil
}

func closeSinks(sinks []*audit.Sink) error {
	var errs []error
	for _, sink := range sinks {
		errs = append(errs, sink.Close())
	}
	return errors.Join(errs...)
}

// auditChecks returns a health check for each sink. The server is healthy without a sink
// that is not enforced.
func auditChecks(log *audit.Log) []api.Check {
	var checks []api.Check
	for _, sink := range log.Sinks {
		checks = append(checks, api.Check{
			Name: "audit." + sink.Name(), Run: func(context.Context) error { return log.Health(sink) }, Optional: !sink.Enforced(),
		})
	}
	return checks
}
