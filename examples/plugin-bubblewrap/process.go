package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// process is the first process of a sandbox's PID namespace. When it ends, the kernel first
// ends all other processes of the sandbox, and then reports its end.
type process struct {
	PID   int
	Start string // when it was started, because a PID may be used again
}

// find returns the process with that PID.
func find(pid int) (process, error) {
	start, err := startOf(pid)
	return process{PID: pid, Start: start}, err
}

// startOf returns the boot and the clock tick in which a process was started.
func startOf(pid int) (string, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	// The second field is a name in parentheses, which may contain anything.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const starttime = 19
	if len(fields) <= starttime {
		return "", fmt.Errorf("/proc/%d/stat: %q", pid, stat)
	}
	return strings.TrimSpace(string(boot)) + "/" + fields[starttime], nil
}

// runs reports whether the process is alive, or may be.
func (p process) runs() bool {
	fd, err := p.open()
	switch {
	case err != nil:
		return true
	case fd < 0:
		return false
	}
	defer func() { _ = unix.Close(fd) }()
	return !ended(fd, 0)
}

// open returns a pidfd, which refers to this process even if its PID is used again. It
// returns -1 if the process is gone.
func (p process) open() (int, error) {
	if p.PID == 0 {
		return -1, nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, nil
	}
	if err != nil {
		return -1, err
	}
	start, err := startOf(p.PID)
	switch {
	case err == nil && start == p.Start:
		return fd, nil
	case err == nil || errors.Is(err, os.ErrNotExist):
		return -1, unix.Close(fd)
	}
	return -1, errors.Join(err, unix.Close(fd))
}

// ended reports whether the process ends within some milliseconds. It has ended once its
// last thread has. A process in state "zombie" may still have other threads, and with them
// its sockets.
func ended(pidfd, limit int) bool {
	fd := unix.PollFd{Fd: int32(pidfd), Events: unix.POLLIN} //nolint:gosec // the kernel's own are no larger
	n, _ := unix.Poll([]unix.PollFd{fd}, limit)              // if interrupted, the process counts as running
	return n == 1
}

// end asks the process to end, kills it after grace, and returns once it is gone.
func (p process) end(ctx context.Context, grace time.Duration) error {
	fd, err := p.open()
	if err != nil || fd < 0 {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	for began := time.Now(); time.Since(began) < grace && ctx.Err() == nil; {
		// Ask repeatedly: a sandbox that is still being set up misses the signal.
		if err := send(fd, unix.SIGTERM); err != nil {
			return err
		}
		polite, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		err := awaitEnd(polite, fd)
		cancel()
		if err == nil {
			return nil
		}
	}
	if err := send(fd, unix.SIGKILL); err != nil {
		return err
	}
	return awaitEnd(ctx, fd)
}

func send(pidfd int, sig unix.Signal) error {
	err := unix.PidfdSendSignal(pidfd, sig, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// awaitEnd returns nil once the process has ended.
func awaitEnd(ctx context.Context, pidfd int) error {
	for !ended(pidfd, 50) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}
