package process

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/bivouac/bivouac/runtime"
)

// The files of a session ID, each named by it and one of these.
const (
	recordExt = ".json" // what is known of its sandbox
	logExt    = ".log"  // what its sandbox wrote
	goneExt   = ".gone" // it is deleted; where this stands, the others do not count
)

// goneFor is how long a session ID stays refused after its sandbox was deleted.
// A Create that was overtaken is given up by its caller long before.
const goneFor = time.Hour

// record is a sandbox as its file tells of it. It is written first without a
// PID, as an intent.
type record struct {
	Spec    runtime.Spec `json:"spec"`
	Port    uint16       `json:"port"`
	PID     int          `json:"pid,omitempty"`   // of the process that leads its group; 0 before it was started
	Start   string       `json:"start,omitempty"` // when that process started: the PID alone may name another one by now
	Ready   bool         `json:"ready"`
	Stopped bool         `json:"stopped"` // Stop or Delete was called
	Ended   bool         `json:"ended"`   // nothing of it runs
	Reason  string       `json:"reason,omitempty"`
}

func (r record) endpoint() runtime.Endpoint {
	return runtime.Endpoint{IP: netip.AddrFrom4([4]byte{127, 0, 0, 1}), Port: r.Port}
}

func (r record) view() runtime.Sandbox {
	view := runtime.Sandbox{
		SessionID: r.Spec.SessionID,
		ChatID:    r.Spec.ChatID,
		Endpoint:  r.endpoint(),
		State:     runtime.StateStarting,

		AgentID:        r.Spec.AgentID,
		VolumeHostPath: r.Spec.VolumeHostPath,
		CreatedAt:      r.Spec.CreatedAt,
		ExpiresAt:      r.Spec.ExpiresAt,
		Owner:          r.Spec.Owner,
		Labels:         r.Spec.Labels,
	}
	if r.PID != 0 {
		view.ContainerID = strconv.Itoa(r.PID)
	}
	switch {
	case r.Ended:
		view.State, view.Reason = runtime.StateDead, r.Reason
	case r.Ready:
		view.State = runtime.StateRunning
	}
	return view
}

// path is that of a file, for what is said of it.
func (d *Driver) path(sessionID, ext string) string {
	return filepath.Join(d.dir, sessionID+ext)
}

// save replaces the record's file in one step: a reader finds the old one or
// the new one. It does not wait for the disk, since no process outlives a
// failure that loses what the kernel holds.
func (d *Driver) save(r record) error {
	text, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
	}
	name := r.Spec.SessionID + recordExt
	if err := d.folder.WriteFile(name+".new", text, 0o600); err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
	}
	if err := d.folder.Rename(name+".new", name); err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
	}
	return nil
}

// load reads the folder, when nobody else uses the driver yet.
func (d *Driver) load() error {
	entries, err := fs.ReadDir(d.folder.FS(), ".") // sorted: .gone comes before .json
	if err != nil {
		return fmt.Errorf("process: %w", err)
	}
	for _, entry := range entries {
		id, isGone := strings.CutSuffix(entry.Name(), goneExt)
		if isGone {
			info, err := entry.Info()
			if err != nil {
				return fmt.Errorf("process: %w", err)
			}
			d.gone[id] = info.ModTime()
			if err := d.removeFiles(id); err != nil {
				return fmt.Errorf("process: %w", err)
			}
			continue
		}
		id, isRecord := strings.CutSuffix(entry.Name(), recordExt)
		if _, gone := d.gone[id]; gone || !isRecord {
			continue
		}
		if err := d.loadRecord(id); err != nil {
			return fmt.Errorf("process: read %s: %w", d.path(id, recordExt), err)
		}
	}
	return d.sweep(time.Now())
}

func (d *Driver) loadRecord(id string) error {
	text, err := readOwn(d.folder, id+recordExt)
	if err != nil {
		return err
	}
	var r record
	if err := json.Unmarshal(text, &r); err != nil {
		return err
	}
	if r.Spec.SessionID != id {
		return fmt.Errorf("it tells of session %q", r.Spec.SessionID)
	}
	sb := newSandbox(r)
	d.sandboxes[id] = sb
	d.ports[r.Port] = struct{}{}
	switch {
	case r.Ended:
		sb.end()
	case r.PID == 0:
		// The gate (see launch) lets nothing start whose PID is not recorded.
		d.ended(sb, "the agent ended before the sandbox was started")
	default:
		sb.adopted = true
		d.tendAdopted(sb)
	}
	return nil
}

// removeFiles removes what a session ID had, apart from the mark that it is gone.
func (d *Driver) removeFiles(id string) error {
	for _, ext := range []string{logExt, recordExt} {
		if err := d.folder.Remove(id + ext); err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
		}
	}
	return nil
}

// markGone makes a session ID refused from now on. The caller holds d.mu.
func (d *Driver) markGone(id string, now time.Time) error {
	if err := d.folder.WriteFile(id+goneExt, nil, 0o600); err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
	}
	d.gone[id] = now
	if now.Sub(d.swept) < goneFor {
		return nil
	}
	return d.sweep(now)
}

// sweep forgets the session IDs that were refused for long enough. The caller
// holds d.mu.
func (d *Driver) sweep(now time.Time) error {
	d.swept = now
	for id, since := range d.gone {
		if now.Sub(since) < goneFor {
			continue
		}
		if err := d.folder.Remove(id + goneExt); err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
		}
		delete(d.gone, id)
	}
	return nil
}

// dropMarks forgets all session IDs that were deleted.
func (d *Driver) dropMarks() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	for id := range d.gone {
		d.gone[id] = now.Add(-goneFor)
	}
	return d.sweep(now)
}
