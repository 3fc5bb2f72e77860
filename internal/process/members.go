package process

import (
	"os"
	"syscall"
)

// stat is what the kernel reports about a running process.
type stat struct {
	parent, group int
	start         string // together with the PID it identifies one process of this boot
}

// member is a process of a sandbox.
type member struct {
	pid   int
	start string
}

// members returns the running processes of a sandbox:
//
//   - processes that were given the sandbox's mark in their environment, in any group
//     and session;
//   - processes in the group of its leader. If the leader has ended, the kernel may have
//     reused the group's number. The group then counts only if owned is true or one of
//     its processes has the mark;
//   - descendants of any of these.
//
// It does not find a process that has both left its parent and cleared its environment.
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

// signal sends sig to each member that still runs. It ignores errors: sending fails
// only if a member is gone, which the next look at the members shows.
func signal(sandbox []member, sig syscall.Signal) {
	for _, m := range sandbox {
		handle, err := os.FindProcess(m.pid)
		if err != nil {
			continue
		}
		// The handle refers to one process. Check now that it is the right one.
		if s, ok := statOf(m.pid); ok && s.start == m.start {
			_ = handle.Signal(sig)
		}
		_ = handle.Release()
	}
}
