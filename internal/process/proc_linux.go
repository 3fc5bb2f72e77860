package process

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// startOf tells when the process was started, in a form that is good for
// comparing alone: no other process has the same PID and the same start. It
// returns false where there is no such process, or only a zombie of it.
func startOf(pid int) (string, bool) {
	found, ok := statOf(pid)
	if !ok {
		return "", false
	}
	// The time is counted from the boot, so it takes the boot's name with it.
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", false
	}
	return strings.TrimSpace(string(boot)) + "/" + found.start, true
}

// allProcesses returns the processes that run. Zombies do not count: where the
// machine's first process does not collect them they stay for ever.
func allProcesses() map[int]stat {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	all := make(map[int]stat, len(entries))
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if found, ok := statOf(pid); ok {
			all[pid] = found
		}
	}
	return all
}

// carries says whether a process was given this variable in its environment.
func carries(pid int, variable string) bool {
	return slices.ContainsFunc(bytes.Split(environ(pid), []byte{0}), func(v []byte) bool {
		return string(v) == variable
	})
}

// environ returns a process's environment, nil where it cannot be read. A first
// thread that has ended has none any more; the others have.
func environ(pid int) []byte {
	threads, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(pid), "task"))
	if err != nil {
		return nil
	}
	for _, thread := range threads {
		text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "task", thread.Name(), "environ"))
		if err == nil && len(text) > 0 {
			return text
		}
	}
	return nil
}

// statOf returns false where the process does not run: it is gone or a zombie.
// One whose first thread alone has ended shows as a zombie too, and runs for as
// long as it has others.
func statOf(pid int) (stat, bool) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return stat{}, false
	}
	// The second field is the program's name in parentheses. It may hold
	// anything, so the others are counted from its end.
	_, rest, _ := strings.Cut(string(text[bytes.LastIndexByte(text, ')')+1:]), " ")
	const state, ppid, pgrp, numThreads, starttime = 0, 1, 2, 17, 19
	fields := strings.Fields(rest)
	if len(fields) <= starttime {
		return stat{}, false
	}
	parent, parentErr := strconv.Atoi(fields[ppid])
	group, groupErr := strconv.Atoi(fields[pgrp])
	threads, threadsErr := strconv.Atoi(fields[numThreads])
	if errors.Join(parentErr, groupErr, threadsErr) != nil || fields[state] == "X" || fields[state] == "Z" && threads <= 1 {
		return stat{}, false
	}
	return stat{parent: parent, group: group, start: fields[starttime]}, true
}

// awaitExit returns once the process has ended. It is not collected: until then
// its PID, and so its group's, is nobody else's.
func awaitExit(cmd *exec.Cmd) {
	for {
		err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, syscall.EINTR) {
			return
		}
	}
}
