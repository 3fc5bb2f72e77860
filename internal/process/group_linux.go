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
		environ, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "environ"))
		if err != nil {
			return false
		}
		return slices.ContainsFunc(bytes.Split(environ, []byte{0}), func(v []byte) bool {
			return bytes.Equal(v, variable)
		})
	})
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
func readStat(pid int) (stat, bool) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return stat{}, false
	}
	// The second field is the program's name in parentheses. It may hold
	// anything, so the others are counted from its end.
	_, rest, _ := strings.Cut(string(text[bytes.LastIndexByte(text, ')')+1:]), " ")
	const state, pgrp, starttime = 0, 2, 19
	fields := strings.Fields(rest)
	if len(fields) <= starttime || fields[state] == "Z" || fields[state] == "X" {
		return stat{}, false
	}
	pgid, err := strconv.Atoi(fields[pgrp])
	if err != nil {
		return stat{}, false
	}
	return stat{pgid: pgid, start: fields[starttime]}, true
}
