//go:build unix && !linux

package pluginhost

import (
	"os/exec"
	"syscall"
)

// ownGroup gives a process a group of its own. Only Linux can also end it when the host
// is killed.
func ownGroup() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

// collect waits until the process ends, collects it, and ends what is left of its
// group.
func collect(cmd *exec.Cmd) error {
	err := cmd.Wait()
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // fails if the group is empty
	return err
}
