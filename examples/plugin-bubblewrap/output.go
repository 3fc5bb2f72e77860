package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A sandbox's output is the file to which bwrap and the sandbox's first process write their
// errors. They inherit the open file with a lock, which lasts as long as one of them has the
// file open. So the lock shows whether they run, even if a plugin had no time to record them.

func (r records) output(sessionID string) (string, error) {
	path, err := r.path(sessionID)
	return path + ".stderr", err
}

// openOutput returns an empty output for a sandbox that is about to start. It waits until no
// process of an earlier try has the file open. The caller holds the session's lock.
func (r records) openOutput(ctx context.Context, sessionID string) (*os.File, error) {
	path, err := r.output(sessionID)
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(lockFile(ctx, file), file.Truncate(0)); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// awaitSilence returns nil once no process has the output open. The caller holds
// the session's lock.
func (r records) awaitSilence(ctx context.Context, sessionID string) error {
	path, err := r.output(sessionID)
	if err != nil {
		return err
	}
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(lockFile(ctx, file), file.Close())
}

// lockFile waits until the caller has the only lock on the file.
func lockFile(ctx context.Context, file *os.File) error {
	again := time.NewTicker(2 * time.Millisecond)
	defer again.Stop()
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// lastWords returns the end of the output.
func (r records) lastWords(sessionID string) string {
	path, err := r.output(sessionID)
	if err != nil {
		return err.Error()
	}
	content, err := os.ReadFile(path)
	if err != nil || len(content) == 0 {
		return "it said nothing"
	}
	return strings.TrimSpace(string(content[max(0, len(content)-1000):]))
}

func (r records) removeOutput(sessionID string) error {
	path, err := r.output(sessionID)
	if err != nil {
		return err
	}
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
