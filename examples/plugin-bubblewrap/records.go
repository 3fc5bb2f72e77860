package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/bivouac/bivouac/runtime"
	"golang.org/x/sys/unix"
)

// record is what is known about a session ID. Its file outlives the plugin.
type record struct {
	Spec     runtime.Spec
	Process  process // zero until its command may run
	Endpoint runtime.Endpoint
	Ready    bool
	Ended    bool   // Stop or Delete was called
	Deleted  bool   // only the record is left, so that the ID is not used again
	Reason   string // why it is dead
}

// deletedLife is how long the record of a deleted sandbox is kept. No call takes that long.
const deletedLife = time.Hour

// records keeps one file for each session ID.
type records struct {
	dir  string
	life time.Duration // how long the record of a deleted sandbox is kept
}

func (r records) path(sessionID string) (string, error) {
	if sessionID == "" || strings.ContainsAny(sessionID, "/.") {
		return "", fmt.Errorf("%w: session ID %q", runtime.ErrInvalid, sessionID)
	}
	return filepath.Join(r.dir, sessionID), nil
}

// lock locks a session ID against other goroutines and processes. It waits until ctx ends.
func (r records) lock(ctx context.Context, sessionID string) (unlock func(), err error) {
	path, err := r.path(sessionID)
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { _ = file.Close() }, nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			return nil, errors.Join(err, file.Close())
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), file.Close())
		}
	}
}

// load returns a session ID's record, or zero if there is none.
func (r records) load(sessionID string) (record, error) {
	path, err := r.path(sessionID)
	if err != nil {
		return record{}, err
	}
	content, err := os.ReadFile(path + ".json")
	if errors.Is(err, fs.ErrNotExist) {
		return record{}, nil
	}
	if err != nil {
		return record{}, err
	}
	var found record
	if err := json.Unmarshal(content, &found); err != nil {
		return record{}, fmt.Errorf("record of session %s: %w", sessionID, err)
	}
	return found, nil
}

// save replaces a record atomically, and returns once it is on disk. The caller holds the
// lock.
func (r records) save(sessionID string, changed record) error {
	path, err := r.path(sessionID)
	if err != nil {
		return err
	}
	content, err := json.Marshal(changed)
	if err != nil {
		return err
	}
	file, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		return err
	}
	return os.Rename(path+".new", path+".json")
}

// all returns the session IDs of all records.
func (r records) all() ([]string, error) {
	files, err := filepath.Glob(filepath.Join(r.dir, "*.json"))
	for i, file := range files {
		files[i] = strings.TrimSuffix(filepath.Base(file), ".json")
	}
	return files, err
}

// expire removes the record of a sandbox that was deleted long ago.
func (r records) expire(sessionID string) error {
	path, err := r.path(sessionID)
	if err != nil {
		return err
	}
	info, err := os.Stat(path + ".json")
	if errors.Is(err, fs.ErrNotExist) {
		return nil // another List has already removed it
	}
	if err != nil || time.Since(info.ModTime()) < r.life {
		return err
	}
	// Remove the record last: once it is gone, everything else is too.
	for _, file := range []string{path + ".lock", path + ".json"} {
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
