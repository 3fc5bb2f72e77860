package process

import (
	"os"
	"syscall"
)

// stat is what the kernel tells of a process that runs.
type stat struct {
	parent, group int
	start         string // with the PID it names one process of this boot
}

// member is a process of a sandbox.
type member struct {
	pid   int
	start string
}

// members finds the processes of a sandbox that run:
//
//   - those that were given its mark in their environment, whatever group and
//     session they are in now;
//   - those of the group of its leader. A group whose leader has ended is the
//     sandbox's if owned says so or one of the former is in it, since the kernel
//     may have given its number to somebody else;
//   - what descends from any of these.
//
// Only a process that has both left its parent and cleared its environment is not
// found.
func members(leader int, owned bool, mark string) []member {
	all := allProcesses()
	found := map[int]bool{}
	for pid, s := range all {
		if carries(pid, mark) {
			found[pid] = true
			owned = owned || s.group == leader
		}
	}
	for pid, s := range all {
		if owned && s.group == leader {
			found[pid] = true
		}
	}
	for grown := true; grown; {
		grown = false
		for pid, s := range all {
			if !found[pid] && found[s.parent] {
				found[pid], grown = true, true
			}
		}
	}
	sandbox := make([]member, 0, len(found))
	for pid := range found {
		sandbox = append(sandbox, member{pid, all[pid].start})
	}
	return sandbox
}

// signal sends sig to each member that still runs. It fails only where a member
// is gone, which is then seen.
func signal(sandbox []member, sig syscall.Signal) {
	for _, m := range sandbox {
		handle, err := os.FindProcess(m.pid)
		if err != nil {
			continue
		}
		// The handle holds on to one process. That it is the right one is seen now.
		if s, ok := statOf(m.pid); ok && s.start == m.start {
			_ = handle.Signal(sig)
		}
		_ = handle.Release()
	}
}
