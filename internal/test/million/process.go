package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// memory is what a process uses, in bytes.
type memory struct{ now, most int64 }

// memoryOf returns the resident memory of a process, now and at most since it began.
func memoryOf(pid int) (memory, error) {
	var m memory
	for field, target := range map[string]*int64{"VmRSS:": &m.now, "VmHWM:": &m.most} {
		text, err := statusOf(strconv.Itoa(pid), field)
		if err != nil {
			return m, err
		}
		kb, err := strconv.ParseInt(strings.TrimSuffix(text, " kB"), 10, 64)
		if err != nil {
			return m, err
		}
		*target = kb << 10
	}
	return m, nil
}

// childOf returns the only child of a process.
func childOf(pid int) (int, error) {
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, err
	}
	for _, folder := range all {
		child := filepath.Base(folder)
		if parent, err := statusOf(child, "PPid:"); err == nil && parent == strconv.Itoa(pid) { // else it has ended
			return strconv.Atoi(child)
		}
	}
	return 0, fmt.Errorf("process %d has no child", pid)
}

// statusOf returns a field of a process's status.
func statusOf(pid, field string) (string, error) {
	text, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, field); ok {
			return strings.TrimSpace(value), nil
		}
	}
	return "", fmt.Errorf("process %s: no %s", pid, field)
}
