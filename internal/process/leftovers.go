package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/runtime"
)

// A sandbox's files are named by its session ID and one of these extensions. The name of
// a log also has its stream.
const (
	recordExt = ".json" // a leader; exists while the sandbox may run
	logExt    = ".log"  // what the sandbox printed
)

// leader is the process that leads a sandbox's process group.
type leader struct {
	PID   int    `json:"pid"`
	Start string `json:"start"` // when it started; the PID alone may belong to another process by now
}

// members returns the running processes of the sandbox that l leads.
func (l leader) members(mark string) []member {
	start, ok := startOf(l.PID)
	return members(l.PID, ok && start == l.Start, mark)
}

// mark returns a variable for the environment of a sandbox's processes. It contains the
// path of the sandbox's record, so no sandbox of another driver has it.
func mark(dir, sessionID string) string {
	return "BIVOUAC_PROCESS_RECORD=" + filepath.Join(dir, sessionID+recordExt)
}

// save records which process leads a sandbox. The write is atomic. It is not synced to
// disk: a failure that loses the kernel's cache also ends the process.
func (d *Driver) save(sessionID string, l leader) error {
	text, err := json.Marshal(l)
	name := sessionID + recordExt
	if err == nil {
		err = d.folder.WriteFile(name+".new", text, 0o600)
	}
	if err == nil {
		err = d.folder.Rename(name+".new", name)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
	}
	return nil
}

// remove removes a file of the folder, if it exists.
func remove(folder *os.Root, name string) error {
	if err := folder.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// removeFiles removes what a sandbox leaves behind when it has ended. It follows no link,
// so a volume stays.
func removeFiles(folder *os.Root, sessionID string) error {
	return errors.Join(removeLogs(folder, sessionID), folder.RemoveAll(spareFolder(sessionID)))
}

// EndLeftovers ends the sandboxes that a killed driver left in this folder, and removes
// their files. No driver may use the folder at the same time.
func EndLeftovers(ctx context.Context, dir string) error {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	folder, err := openFolder(dir)
	if err != nil {
		return fmt.Errorf("process: %w", err)
	}
	defer func() { _ = folder.Close() }() // it was only read from
	entries, err := fs.ReadDir(folder.FS(), ".")
	if err != nil {
		return fmt.Errorf("process: %w", err)
	}
	var all errgroup.Group
	for _, entry := range entries {
		if id, isRecord := strings.CutSuffix(entry.Name(), recordExt); isRecord {
			all.Go(func() error {
				if err := endLeftover(ctx, dir, folder, id); err != nil {
					return fmt.Errorf("process: %s: %w", filepath.Join(dir, entry.Name()), err)
				}
				return nil
			})
		}
	}
	if err := all.Wait(); err != nil {
		return err
	}
	var errs []error
	for _, entry := range entries {
		// A sandbox has files before its record, and after it until it is deleted.
		if id, _, _ := strings.Cut(entry.Name(), "."); uuid.Validate(id) == nil {
			errs = append(errs, removeFiles(folder, id))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("process: %w", err)
	}
	return nil
}

func endLeftover(ctx context.Context, dir string, folder *os.Root, id string) error {
	text, err := readOwn(folder, id+recordExt)
	if err != nil {
		return err
	}
	var l leader
	if err := json.Unmarshal(text, &l); err != nil {
		return err
	}
	sig, grace := syscall.SIGTERM, time.After(stopGrace)
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for {
		left := l.members(mark(dir, id))
		if len(left) == 0 {
			return remove(folder, id+recordExt)
		}
		signal(left, sig)
		select {
		case <-look.C:
		case <-grace:
			sig = syscall.SIGKILL
		case <-ctx.Done():
			return fmt.Errorf("%w: %d processes still run: %w", runtime.ErrNotStopped, len(left), ctx.Err())
		}
	}
}
