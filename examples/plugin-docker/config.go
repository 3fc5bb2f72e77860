package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/ready"
	"github.com/moby/moby/client"
)

// config is what the plugin's block in Bivouac's configuration may say.
type config struct {
	Host      string   `json:"host"`       // of the engine; empty: the local socket
	Image     string   `json:"image"`      // must exist: the plugin does not pull
	Command   []string `json:"command"`    // empty: the image's own
	Port      uint16   `json:"port"`       // the port that the container listens on
	ReadyPath string   `json:"ready_path"` // returns the session ID once the sandbox is ready; empty: a TCP connection is enough
	MemoryMiB int64    `json:"memory_mib"`
	CPUs      float64  `json:"cpus"`
	PIDs      int64    `json:"pids"`
	Network   string   `json:"network"` // a Docker network of driver "bridge"
}

// configSchema describes config to people: "bivouac plugin inspect" shows it.
const configSchema = `{
  "$schema": "https://json-schema.org/draft/2020-12/schema",
  "type": "object",
  "additionalProperties": false,
  "required": ["image"],
  "properties": {
    "host":       {"type": "string", "description": "engine, as in DOCKER_HOST"},
    "image":      {"type": "string", "minLength": 1},
    "command":    {"type": "array", "items": {"type": "string"}},
    "port":       {"type": "integer", "minimum": 1, "maximum": 65535, "default": 8080},
    "ready_path": {"type": "string", "pattern": "^/", "description": "HTTP path whose answer holds the session ID"},
    "memory_mib": {"type": "integer", "minimum": 6, "default": 512},
    "cpus":       {"type": "number", "exclusiveMinimum": 0, "default": 1},
    "pids":       {"type": "integer", "minimum": 1, "default": 256},
    "network":    {"type": "string", "default": "bridge"}
  }
}`

const version = "0.1.0"

// Info describes the driver.
func (d *driver) Info(context.Context) (runtime.Info, error) {
	text, err := json.Marshal(d.config)
	if err != nil {
		return runtime.Info{}, err
	}
	// A spare is made from all of the configuration, and by this version.
	return runtime.Info{
		Name: "docker", Version: version, ConfigSchema: json.RawMessage(configSchema),
		Variant: fmt.Sprintf("%x", sha256.Sum256(append(text, version...))),
	}, nil
}

// Configure sets the configuration and makes a client. It does not check whether the
// engine answers; Health does.
func (d *driver) Configure(_ context.Context, given runtime.Config) error {
	c := config{Port: 8080, MemoryMiB: 512, CPUs: 1, PIDs: 256, Network: "bridge"}
	decoder := json.NewDecoder(bytes.NewReader(given.JSON))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&c); err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	switch {
	case c.Image == "":
		return fmt.Errorf("%w: image is missing", runtime.ErrInvalid)
	case c.Port == 0 || c.MemoryMiB < 6 || c.CPUs <= 0 || c.PIDs < 1:
		return fmt.Errorf("%w: port, cpus and pids must be greater than 0, and memory_mib at least 6", runtime.ErrInvalid)
	case c.ReadyPath != "" && c.ReadyPath[0] != '/':
		return fmt.Errorf("%w: ready_path %q does not begin with /", runtime.ErrInvalid, c.ReadyPath)
	}
	options := []client.Opt{client.WithHostFromEnv()}
	if c.Host != "" {
		options = []client.Opt{client.WithHost(c.Host)}
	}
	engine, err := client.New(options...)
	if err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	d.config, d.instance, d.engine = c, given.Instance, engine
	if d.markLife = deletedLife; given.DropMarks {
		d.markLife = 0
	}
	d.ready = ready.Check{HTTPPath: c.ReadyPath, WantSessionID: c.ReadyPath != ""}
	return nil
}

// Health checks whether the engine answers and has the image.
func (d *driver) Health(ctx context.Context) error {
	_, err := d.engine.ImageInspect(ctx, d.config.Image)
	return known(err)
}
