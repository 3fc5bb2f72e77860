package process

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// zombie is SZOMB from <sys/proc.h>.
const zombie = 5

// startOf returns when the process was started, as text that is useful only for
// comparing: no other process has the same PID and the same start. It returns false if
// the process does not exist or is a zombie.
func startOf(pid int) (string, bool) {
	found, ok := statOf(pid)
	return found.start, ok
}

// statOf returns false if the process does not run: it does not exist or is a zombie.
func statOf(pid int) (stat, bool) {
	info, err := unix.SysctlKinfoProc("kern.proc.pid", pid)
	if err != nil || info.Proc.P_stat == zombie {
		return stat{}, false
	}
	return statFrom(info), true
}

func statFrom(info *unix.KinfoProc) stat {
	start := info.Proc.P_starttime
	return stat{
		parent: int(info.Eproc.Ppid),
		group:  int(info.Eproc.Pgid),
		start:  fmt.Sprintf("%d.%06d", start.Sec, start.Usec),
	}
}

// allProcesses returns the running processes, without zombies.
func allProcesses() map[int]stat {
	infos, err := unix.SysctlKinfoProcSlice("kern.proc.all")
	if err != nil {
		return nil
	}
	all := make(map[int]stat, len(infos))
	for i := range infos {
		if infos[i].Proc.P_stat != zombie {
			all[int(infos[i].Proc.P_pid)] = statFrom(&infos[i])
		}
	}
	return all
}

// carries reports whether a process is known to have been given this variable in its
// environment. macOS does not show environments, so it is always false.
func carries(int, string) bool { return false }

// awaitExit returns once the process has ended.
func awaitExit(cmd *exec.Cmd) { _ = cmd.Wait() } // the result is in cmd.ProcessState

// freeBeginning frees the space of a file's first bytes. On macOS it always fails.
func freeBeginning(*os.File, int64) error { return errors.ErrUnsupported }
