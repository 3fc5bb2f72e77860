package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/process"
)

// The sandboxes of a -dev server end with the server, even if it is killed. Each server
// starts a helper, which waits until the server is gone and then ends what it left. Each
// server also does that when it starts, in case a helper was killed too. A server locks
// its folder as long as it lives, so the server is gone if its folder is not locked.

// DevCleanup is the command that a -dev server runs as its helper. Its argument is the
// folder of all -dev servers. It calls EndAbandoned when its standard input ends.
const DevCleanup = "dev-cleanup"

// devLock is the file in a -dev server's folder that the server locks.
const devLock = "agent.lock"

// lockDev locks the folder of the -dev server at this address until the file is closed.
// It waits for a process that still ends what an earlier server left.
func lockDev(ctx context.Context, addr string) (*os.File, error) {
	dir, err := makeDevDir(addr)
	if err != nil {
		return nil, err
	}
	lock, err := awaitLockDev(ctx, dir, endLimit)
	if lock == nil && err == nil {
		err = fmt.Errorf("agent: %s is locked by another process", dir)
	}
	return lock, err
}

// awaitLockDev locks a folder. It returns nil if another process still holds the lock
// after patience.
func awaitLockDev(ctx context.Context, dir string, patience time.Duration) (*os.File, error) {
	limit := time.After(patience)
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		lock, err := tryLockDev(dir)
		if lock != nil || err != nil {
			return lock, err
		}
		select {
		case <-again.C:
		case <-limit:
			return nil, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// tryLockDev returns nil if another process holds the folder's lock.
func tryLockDev(dir string) (*os.File, error) {
	lock, err := os.OpenFile(filepath.Join(dir, devLock), os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	switch err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); {
	case err == nil:
		return lock, nil
	case errors.Is(err, syscall.EWOULDBLOCK):
		return nil, lock.Close()
	default:
		return nil, errors.Join(fmt.Errorf("agent: lock %s: %w", dir, err), lock.Close())
	}
}

// EndAbandoned ends the sandboxes of all -dev servers that are gone, at any address.
// root is the folder of all -dev servers. A killed server loses its lock only some
// moments later, so EndAbandoned waits up to patience for each lock.
func EndAbandoned(ctx context.Context, root string, patience time.Duration) error {
	entries, err := os.ReadDir(root)
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	var problems []error
	for _, entry := range entries {
		if entry.IsDir() {
			problems = append(problems, endAbandonedOf(ctx, filepath.Join(root, entry.Name()), patience))
		}
	}
	return errors.Join(problems...)
}

// endAbandonedOf ends the sandboxes of the -dev server with this folder, unless that
// server still runs.
func endAbandonedOf(ctx context.Context, dir string, patience time.Duration) (err error) {
	if err := process.MakeFolder(dir); err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	lock, err := awaitLockDev(ctx, dir, patience)
	if lock == nil || err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	ctx, cancel := context.WithTimeout(ctx, endLimit)
	defer cancel()
	return process.EndLeftovers(ctx, filepath.Join(dir, sandboxFolder))
}

// startDevCleanup starts the helper that ends this server's sandboxes if the server is
// killed. The server calls the returned function when it ends. That function returns
// once the helper has ended too.
func startDevCleanup(ctx context.Context, log hclog.Logger, stderr io.Writer) (end func() error, err error) {
	root, err := devRoot()
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("agent: find this program: %w", err)
	}
	cmd := exec.CommandContext(context.WithoutCancel(ctx), self, DevCleanup, root)
	for name, value := range process.Environment() {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Stderr = stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // it gets no signals to the server's group or terminal
	alive, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("agent: start the helper that cleans up: %w", err)
	}
	log.Debug("dev_cleanup_started", "pid", cmd.Process.Pid)
	return func() error {
		if err := errors.Join(alive.Close(), cmd.Wait()); err != nil {
			return fmt.Errorf("agent: the helper that cleans up: %w", err)
		}
		return nil
	}, nil
}
