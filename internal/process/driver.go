// Package process is the runtime driver for -dev. It runs each sandbox as a process on
// this machine, without isolation, so that you can try out Bivouac.
//
// The driver finds a sandbox's processes by their process group, their parents, and a
// variable in their environment. macOS does not show environments. The driver does not
// find a process that has shed all of these, and such a process outlives its sandbox.
//
// Unlike other drivers, this one does not find its sandboxes again after a restart:
// their records are in memory too. It writes down which processes run, and
// [EndLeftovers] ends those of a driver that was killed.
//
// The package does not know the scheduler, or what runs inside a sandbox.
package process

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/version"
	"github.com/bivouac/bivouac/runtime"
)

// Name is the driver's name. Sessions use it as their runtime.
const Name = "process"

const (
	readyLimit = 30 * time.Second // from the start of the process to its first answer
	stopGrace  = 5 * time.Second  // from SIGTERM to SIGKILL
	goneLife   = time.Hour        // how long the ID of a deleted sandbox is refused; no Create takes that long
)

// Config is the configuration of a Driver. All fields except VolumeRoots are required.
type Config struct {
	// Dir is the absolute path of the folder for the driver's files. It is created if it
	// does not exist.
	// Only one driver may use it at a time, and only this user may be able to write to
	// it.
	Dir string
	// Command is run for each sandbox: a program and its arguments, without a shell. It
	// must answer GET /healthz on 127.0.0.1:$PORT with the value of $BIVOUAC_SESSION_ID
	// in the body.
	Command []string
	// VolumeRoots are the folders that must contain each volume directly, after
	// symbolic links are resolved. If it is empty, any volume is allowed.
	VolumeRoots []string
	Logger      hclog.Logger
}

// Driver is a runtime.Driver, a runtime.Watcher, a runtime.LogReader, a runtime.Execer, a
// runtime.ChatFinder, a runtime.Explainer and a runtime.Claimer.
type Driver struct {
	dir     string   // the folder's path
	folder  *os.Root // the folder itself; holds all files
	command []string
	roots   []string
	log     hclog.Logger
	grace   time.Duration
	closing chan struct{} // ends cutLogs
	cutting sync.WaitGroup

	closed atomic.Bool

	mu        sync.Mutex // lock it before a sandbox's mu
	sandboxes map[string]*sandbox
	gone      map[string]past     // session IDs that no Create may use
	ports     map[uint16]struct{} // ports of sandboxes that are not deleted
	watchers  map[*watcher]struct{}
}

// past is what is remembered of a session ID that was deleted.
type past struct {
	since    time.Time
	happened []runtime.Happening // nil if there was no sandbox
}

// New returns a driver without sandboxes. Call Close when done.
func New(config Config) (*Driver, error) {
	if len(config.Command) == 0 {
		return nil, errors.New("process: no command")
	}
	if err := os.MkdirAll(filepath.Dir(config.Dir), 0o700); err != nil {
		return nil, fmt.Errorf("process: %w", err)
	}
	folder, err := openFolder(config.Dir)
	if err != nil {
		return nil, fmt.Errorf("process: %w", err)
	}
	d := &Driver{
		dir:       config.Dir,
		command:   slices.Clone(config.Command),
		roots:     slices.Clone(config.VolumeRoots),
		log:       config.Logger,
		grace:     stopGrace,
		folder:    folder,
		closing:   make(chan struct{}),
		sandboxes: map[string]*sandbox{},
		gone:      map[string]past{},
		ports:     map[uint16]struct{}{},
		watchers:  map[*watcher]struct{}{},
	}
	d.cutting.Go(d.cutLogs)
	return d, nil
}

// Close releases the folder. Sandboxes keep running: to end them, delete them first.
func (d *Driver) Close() error {
	if d.closed.Swap(true) {
		return nil
	}
	close(d.closing)
	d.cutting.Wait()
	return d.folder.Close()
}

// Info returns the driver's name and version. Its variant is a hash of the command.
func (d *Driver) Info(context.Context) (runtime.Info, error) {
	variant := sha256.Sum256([]byte(strings.Join(d.command, "\x00"))) // no argument has a NUL
	return runtime.Info{Name: Name, Version: version.Get().Version, Variant: hex.EncodeToString(variant[:])}, nil
}

// Inspect returns the current state of a sandbox.
func (d *Driver) Inspect(_ context.Context, sessionID string) (runtime.Sandbox, error) {
	d.mu.Lock()
	sb, ok := d.sandboxes[sessionID]
	d.mu.Unlock()
	if !ok {
		return runtime.Sandbox{}, fmt.Errorf("process: inspect %s: %w", sessionID, runtime.ErrNotFound)
	}
	return sb.view(), nil
}

// List yields the sandboxes that are not deleted. It forgets the IDs of sandboxes that
// were deleted long ago.
func (d *Driver) List(context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		d.mu.Lock()
		maps.DeleteFunc(d.gone, func(_ string, p past) bool { return time.Since(p.since) >= goneLife })
		d.mu.Unlock()
		for _, sb := range d.snapshot() {
			if !yield(sb.view(), nil) {
				return
			}
		}
	}
}

// FindChat returns the sandboxes of a chat that are not dead, except the one of session
// except.
func (d *Driver) FindChat(_ context.Context, chatID, except string) ([]runtime.Sandbox, error) {
	var found []runtime.Sandbox
	for _, sb := range d.snapshot() {
		if view := sb.view(); view.ChatID == chatID && view.SessionID != except && view.State != runtime.StateDead {
			found = append(found, view)
		}
	}
	return found, nil
}

func (d *Driver) snapshot() []*sandbox {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := make([]*sandbox, 0, len(d.sandboxes))
	for _, sb := range d.sandboxes {
		all = append(all, sb)
	}
	return all
}

// checkSpec refuses a spec that can never work on this machine.
func (d *Driver) checkSpec(spec runtime.Spec) error {
	if err := uuid.Validate(spec.SessionID); err != nil {
		return fmt.Errorf("%w: session ID %q: %w", runtime.ErrInvalid, spec.SessionID, err)
	}
	if spec.Pool != "" {
		if err := spec.Validate(); err != nil {
			return fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
		}
		return nil
	}
	if !filepath.IsAbs(spec.VolumeHostPath) {
		return fmt.Errorf("%w: volume %q is not an absolute path", runtime.ErrInvalid, spec.VolumeHostPath)
	}
	info, err := os.Stat(spec.VolumeHostPath)
	if err != nil {
		return fmt.Errorf("%w: volume: %w", runtime.ErrInvalid, err)
	}
	if !info.IsDir() {
		return fmt.Errorf("%w: volume %s is not a folder", runtime.ErrInvalid, spec.VolumeHostPath)
	}
	return d.checkRoots(spec.VolumeHostPath)
}

// checkRoots refuses a volume that a symbolic link leads out of the roots. Links on the
// way to a root are allowed, because the operator made them.
func (d *Driver) checkRoots(volume string) error {
	if len(d.roots) == 0 {
		return nil
	}
	resolved, err := filepath.EvalSymlinks(volume)
	if err != nil {
		return fmt.Errorf("%w: volume: %w", runtime.ErrInvalid, err)
	}
	for _, root := range d.roots {
		if to, err := filepath.EvalSymlinks(root); err == nil && to != resolved && filepath.Dir(resolved) == to {
			return nil
		}
	}
	return fmt.Errorf("%w: volume %s leads to %s, which is not directly below a volume root (%s)",
		runtime.ErrInvalid, volume, resolved, strings.Join(d.roots, ", "))
}

// sameSpec reports whether two specs describe the same sandbox. It ignores the times,
// because the host decides when a sandbox ends.
func sameSpec(a, b runtime.Spec) bool {
	a.CreatedAt, a.ExpiresAt = b.CreatedAt, b.ExpiresAt
	return reflect.DeepEqual(a, b)
}
