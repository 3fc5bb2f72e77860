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

// startOf returns when the process was started, as text that is useful only for
// comparing: no other process has the same PID and the same start. It returns false if
// the process does not exist or is a zombie.
func startOf(pid int) (string, bool) {
	found, ok := statOf(pid)
	if !ok {
		return "", false
	}
	// The start time counts from boot, so the boot ID is part of the result.
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", false
	}
	return strings.TrimSpace(string(boot)) + "/" + found.start, true
}

// allProcesses returns the running processes, without zombies. Zombies stay forever if
// the machine's first process does not collect them.
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

// carries reports whether a process was given this variable in its environment.
func carries(pid int, variable string) bool {
	return slices.ContainsFunc(bytes.Split(environ(pid), []byte{0}), func(v []byte) bool {
		return string(v) == variable
	})
}

// environ returns a process's environment, or nil if it cannot be read. A main thread
// that has ended has no environment any more, but the other threads have one.
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

// statOf returns false if the process does not run: it does not exist or is a zombie.
// If only the main thread has ended, the process also shows as a zombie, but it runs as
// long as it has other threads.
func statOf(pid int) (stat, bool) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return stat{}, false
	}
	// The second field is the program's name in parentheses. It may contain anything,
	// so count the fields after its closing parenthesis.
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

// awaitExit returns once the process has ended. It does not collect the process. Until
// it is collected, no other process can get its PID, and so no other group can get its
// group ID.
func awaitExit(cmd *exec.Cmd) {
	for {
		err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, syscall.EINTR) {
			return
		}
	}
}

// freeBeginning frees the space of a file's first bytes. They become zeros, and all
// others keep their place. Some file systems cannot do this.
func freeBeginning(file *os.File, length int64) error {
	return unix.Fallocate(int(file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, length)
}
