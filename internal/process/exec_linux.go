package process

import "syscall"

// attributes makes the kernel kill a command when the server dies.
func attributes(a *syscall.SysProcAttr) *syscall.SysProcAttr {
	a.Pdeathsig = syscall.SIGKILL
	return a
}
