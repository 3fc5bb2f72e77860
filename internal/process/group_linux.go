package process

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// startOf tells when the process was started, in a form that is good for
// comparing alone: no other process has the same PID and the same start. It
// returns false where there is no such process, or only a zombie of it.
func startOf(pid int) (string, bool) {
	stat, ok := readStat(pid)
	if !ok {
		return "", false
	}
	// The time is counted from the boot, so it takes the boot's name with it.
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", false
	}
	return strings.TrimSpace(string(boot)) + "/" + stat.start, true
}

// groupRuns says whether a process of the group runs. Zombies do not count:
// where the machine's first process does not collect them they stay for ever.
func groupRuns(pgid int) bool {
	if errors.Is(syscall.Kill(-pgid, 0), syscall.ESRCH) {
		return false
	}
	return len(groupMembers(pgid)) > 0
}

// groupCarries says whether a process of the group runs that was given the
// session ID in its environment.
func groupCarries(pgid int, sessionID string) bool {
	variable := []byte("BIVOUAC_SESSION_ID=" + sessionID)
	return slices.ContainsFunc(groupMembers(pgid), func(pid int) bool {
		return slices.ContainsFunc(bytes.Split(environ(pid), []byte{0}), func(v []byte) bool {
			return bytes.Equal(v, variable)
		})
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

func groupMembers(pgid int) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var members []int
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if stat, ok := readStat(pid); ok && stat.pgid == pgid {
			members = append(members, pid)
		}
	}
	return members
}

type stat struct {
	pgid  int
	start string // clock ticks since the boot
}

// readStat returns false where the process does not run: it is gone or a zombie.
// One whose first thread alone has ended shows as a zombie too, and runs for as
// long as it has others.
func readStat(pid int) (stat, bool) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return stat{}, false
	}
	// The second field is the program's name in parentheses. It may hold
	// anything, so the others are counted from its end.
	_, rest, _ := strings.Cut(string(text[bytes.LastIndexByte(text, ')')+1:]), " ")
	const state, pgrp, numThreads, starttime = 0, 2, 17, 19
	fields := strings.Fields(rest)
	if len(fields) <= starttime {
		return stat{}, false
	}
	pgid, pgidErr := strconv.Atoi(fields[pgrp])
	threads, threadsErr := strconv.Atoi(fields[numThreads])
	if pgidErr != nil || threadsErr != nil || fields[state] == "X" || fields[state] == "Z" && threads <= 1 {
		return stat{}, false
	}
	return stat{pgid: pgid, start: fields[starttime]}, true
}
