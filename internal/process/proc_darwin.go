package process

import (
	"fmt"
	"os/exec"

	"golang.org/x/sys/unix"
)

// zombie is SZOMB of <sys/proc.h>.
const zombie = 5

// startOf tells when the process was started, in a form that is good for
// comparing alone: no other process has the same PID and the same start. It
// returns false where there is no such process, or only a zombie of it.
func startOf(pid int) (string, bool) {
	found, ok := statOf(pid)
	return found.start, ok
}

// statOf returns false where the process does not run: it is gone or a zombie.
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

// allProcesses returns the processes that run. Zombies do not count.
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

// carries says whether a process is known to have been given this variable in its
// environment. Here environments cannot be read, so none is.
func carries(int, string) bool { return false }

// awaitExit returns once the process has ended.
func awaitExit(cmd *exec.Cmd) { _ = cmd.Wait() } // how it ended is in its state
