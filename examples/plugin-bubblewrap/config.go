package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/ready"
)

// config is the config block of the plugin in Bivouac's configuration. The schema below
// describes the same fields.
type config struct {
	Command   []string `json:"command"`    // the command to run inside; must listen on 127.0.0.1:$PORT
	ReadyPath string   `json:"ready_path"` // returns the session ID once the sandbox is ready; empty: a TCP connection is enough
	ReadOnly  []string `json:"read_only"`  // files and directories of this machine that are visible inside, beside the system's programs
	Network   bool     `json:"network"`    // share this machine's network; otherwise the sandbox has none
	StateDir  string   `json:"state_dir"`  // directory of the plugin's records
}

const configSchema = `{
  "$schema": "https://json-schema.org/draft/2020-12/schema",
  "type": "object",
  "additionalProperties": false,
  "required": ["command"],
  "properties": {
    "command":    {"type": "array", "minItems": 1, "items": {"type": "string"}},
    "ready_path": {"type": "string", "pattern": "^/", "description": "HTTP path whose answer holds the session ID"},
    "read_only":  {"type": "array", "items": {"type": "string", "pattern": "^/"}},
    "network":    {"type": "boolean", "default": false},
    "state_dir":  {"type": "string", "pattern": "^/", "default": "/var/tmp/bivouac-bubblewrap"}
  }
}`

// Info describes the driver.
func (d *driver) Info(context.Context) (runtime.Info, error) {
	return runtime.Info{Name: "bubblewrap", Version: "0.1.0", ConfigSchema: json.RawMessage(configSchema)}, nil
}

// Configure sets the configuration and opens the directory of the records.
func (d *driver) Configure(_ context.Context, given runtime.Config) error {
	c := config{StateDir: "/var/tmp/bivouac-bubblewrap"}
	if err := json.Unmarshal(given.JSON, &c); err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir := filepath.Join(c.StateDir, given.Instance)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("%w: state_dir: %w", runtime.ErrInvalid, err)
	}
	for _, folder := range []string{c.StateDir, dir} {
		if err := checkOwn(folder); err != nil {
			return fmt.Errorf("%w: state_dir: %w", runtime.ErrInvalid, err)
		}
	}
	d.config, d.self, d.records = c, self, records{dir: dir, life: deletedLife}
	if given.DropMarks {
		d.records.life = 0
	}
	d.ready = ready.Check{HTTPPath: c.ReadyPath, WantSessionID: c.ReadyPath != ""}
	return nil
}

// checkOwn returns an error unless only this user can write to the directory. The records
// decide which processes are killed, so nobody else may write them.
func checkOwn(folder string) error {
	info, err := os.Lstat(folder)
	if err != nil {
		return err
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.IsDir() || owner.Uid != uint32(os.Geteuid()) || info.Mode().Perm()&0o022 != 0 { //nolint:gosec // a user ID fits
		return fmt.Errorf("%s must be a directory that only this user can write to", folder)
	}
	return nil
}

// Health checks whether bwrap is installed and can create namespaces.
func (d *driver) Health(ctx context.Context) error {
	try := exec.CommandContext(ctx, "bwrap", "--unshare-all", "--ro-bind", "/", "/", "true")
	if out, err := try.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: bwrap: %w: %s", runtime.ErrUnavailable, err, out)
	}
	return nil
}
