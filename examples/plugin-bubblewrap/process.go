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

// process is the first process of a sandbox's PID namespace. When it ends, the
// kernel ends all others of the sandbox, and only then tells of its end.
type process struct {
	PID   int
	Start string // when it was started: a PID may be used again
}

// find returns the process of that PID.
func find(pid int) (process, error) {
	start, err := startOf(pid)
	return process{PID: pid, Start: start}, err
}

// startOf is the boot and the tick in which a process was started.
func startOf(pid int) (string, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	// The second field is a name in parentheses, which may hold anything.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const state, starttime = 0, 19
	if len(fields) <= starttime || fields[state] == "Z" || fields[state] == "X" {
		return "", os.ErrProcessDone
	}
	return strings.TrimSpace(string(boot)) + "/" + fields[starttime], nil
}

// runs says whether the process is alive.
func (p process) runs() bool {
	start, err := startOf(p.PID)
	return p.PID != 0 && err == nil && start == p.Start
}

// end asks the process to end, kills it after grace, and returns once it is
// seen to be gone.
func (p process) end(ctx context.Context, grace time.Duration) error {
	if p.PID == 0 {
		return nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if !p.runs() { // looked at after the PID was pinned down
		return nil
	}
	for began := time.Now(); time.Since(began) < grace && ctx.Err() == nil; {
		// Asked again and again: a sandbox that is still being set up does not
		// hear it.
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
	const lookAtContext = 50 // milliseconds
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, lookAtContext)
		switch {
		case n == 1:
			return nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return err
		case ctx.Err() != nil:
			return ctx.Err()
		}
	}
}
