package stack

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// markName is the environment variable that marks what a group's agents started.
const markName = "BIVOUAC_STACK"

// sweep removes what stopped agents leave behind: processes with the mark of dir, mounts
// below dir, and dir itself. A killed agent of Nomad leaves all of these.
func sweep(dir string) error {
	if err := killMarked(dir); err != nil {
		return err
	}
	// Unmount before anything is removed: a mount below dir may lead to somebody else's
	// directory.
	if err := unmountBelow(dir); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// killMarked kills processes until none is left, because a process may start another before
// it is killed.
func killMarked(dir string) error {
	limit := time.After(stopLimit)
	again := time.NewTicker(askEvery)
	defer again.Stop()
	for {
		pids, err := ProcessesWith(markName + "=" + dir)
		if err != nil || len(pids) == 0 {
			return err
		}
		for _, pid := range pids {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("stack: kill %d: %w", pid, err)
			}
		}
		select {
		case <-again.C:
		case <-limit:
			return fmt.Errorf("stack: processes %v do not end", pids)
		}
	}
}

// ProcessesWith returns the processes whose environment has a variable, "NAME=value". It
// shows what runs, whatever any record says.
func ProcessesWith(variable string) ([]int, error) {
	environs, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, path := range environs {
		// An unreadable process is gone or belongs to another user. A zombie's is empty.
		env, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(append([]byte{0}, env...), []byte("\x00"+variable+"\x00")) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// unmountBelow unmounts everything below dir, the deepest first.
func unmountBelow(dir string) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var points []string
	for line := range strings.Lines(string(mounts)) {
		// See proc_pid_mountinfo(5): the fifth field is the mount point.
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			points = append(points, f[4])
		}
	}
	for _, point := range slices.Backward(points) {
		if err := unix.Unmount(point, unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("stack: unmount %s: %w", point, err)
		}
	}
	return nil
}
