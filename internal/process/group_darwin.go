package process

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// zombie is SZOMB of <sys/proc.h>.
const zombie = 5

// startOf tells when the process was started, in a form that is good for
// comparing alone: no other process has the same PID and the same start. It
// returns false where there is no such process, or only a zombie of it.
func startOf(pid int) (string, bool) {
	info, err := unix.SysctlKinfoProc("kern.proc.pid", pid)
	if err != nil || info.Proc.P_stat == zombie {
		return "", false
	}
	start := info.Proc.P_starttime
	return fmt.Sprintf("%d.%06d", start.Sec, start.Usec), true
}

// groupRuns says whether a process of the group runs. Zombies do not count.
func groupRuns(pgid int) bool {
	members, err := unix.SysctlKinfoProcSlice("kern.proc.pgrp", pgid)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(members, func(p unix.KinfoProc) bool { return p.Proc.P_stat != zombie })
}

// groupCarries says whether a process of the group is known to be of the
// session. Here environments cannot be read, so none is: what an agent left
// behind whose sandbox has lost its leader is not touched.
func groupCarries(int, string) bool { return false }
