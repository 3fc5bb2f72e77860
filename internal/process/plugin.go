package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/runtime"
)

// Plugin is a Driver as a plugin serves it: what it works with it is told by
// Configure. Until then only Info may be called.
type Plugin struct {
	*Driver
	logger hclog.Logger
}

// NewPlugin returns a Plugin that is not configured yet.
func NewPlugin(logger hclog.Logger) *Plugin { return &Plugin{logger: logger} }

const configSchema = `{
  "$schema": "https://json-schema.org/draft/2020-12/schema",
  "type": "object",
  "additionalProperties": false,
  "required": ["dir", "command"],
  "properties": {
    "dir":     {"type": "string", "pattern": "^/", "description": "Where the driver keeps its files"},
    "command": {"type": "array", "minItems": 1, "items": {"type": "string"}, "description": "What is run for each sandbox"},
    "volume_roots": {"type": "array", "items": {"type": "string", "pattern": "^/"}, "description": "Folders below which volumes must be, once symbolic links are followed"}
  }
}`

// Info says who the driver is, and how it is configured.
func (p *Plugin) Info(ctx context.Context) (runtime.Info, error) {
	info, err := p.Driver.Info(ctx)
	info.ConfigSchema = json.RawMessage(configSchema)
	return info, err
}

// Configure opens the folder of the given instance.
func (p *Plugin) Configure(_ context.Context, given runtime.Config) error {
	var c struct {
		Dir         string   `json:"dir"`
		Command     []string `json:"command"`
		VolumeRoots []string `json:"volume_roots"`
	}
	if err := json.Unmarshal(given.JSON, &c); err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	d, err := New(Config{
		Dir: filepath.Join(c.Dir, given.Instance), Command: c.Command, VolumeRoots: c.VolumeRoots, Logger: p.logger,
	})
	if err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	if given.DropMarks {
		if err := d.dropMarks(); err != nil {
			return errors.Join(err, d.Close())
		}
	}
	p.Driver = d
	return nil
}
