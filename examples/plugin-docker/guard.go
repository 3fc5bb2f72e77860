package main

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/bivouac/bivouac/runtime"
)

// A guard is a process that kills one command. It is this program again, with the command's
// mark as its argument, and reads from a pipe. If the pipe ends without a word, the guard
// kills every process that has the mark in its environment. The pipe also ends if the
// plugin is killed.
//
// A guard needs to see the container's processes and to be allowed to kill them: the
// plugin must run on the engine's machine, as root, and not in a container of its own. It
// does not find a child that was started with an environment without the mark; that one
// lives as long as its container.
type guard struct {
	mark string
	pipe io.WriteCloser
}

const (
	guardArg  = "guard"
	guardMark = "BIVOUAC_EXEC=" // and a random word, in the environment of the command
	// guardTime is how long a guard looks for processes. The engine may be about to start
	// the command when it is to be killed.
	guardTime = 10 * time.Second
)

func startGuard() (*guard, error) {
	g := &guard{mark: guardMark + rand.Text()}
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	process := exec.Command(program, guardArg, g.mark) //nolint:noctx // it outlives the call, and the plugin
	process.Env = []string{}
	process.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // the host kills the plugin's own process group with it
	if g.pipe, err = process.StdinPipe(); err != nil {
		return nil, err
	}
	if err := process.Start(); err != nil {
		return nil, err
	}
	go func() { _ = process.Wait() }() // it ends by itself
	return g, nil
}

// dismiss ends the guard without killing anything.
func (g *guard) dismiss() { _, _ = g.pipe.Write([]byte{1}) }

// close has the guard kill the command, unless it was dismissed.
func (g *guard) close() { _ = g.pipe.Close() }

// runGuard is the guard's process.
func runGuard(mark string) {
	if n, _ := os.Stdin.Read(make([]byte, 1)); n > 0 {
		return
	}
	for end := time.Now().Add(guardTime); time.Now().Before(end); <-time.After(50 * time.Millisecond) {
		environs, _ := filepath.Glob("/proc/[0-9]*/environ") // the pattern is well formed
		for _, environ := range environs {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(environ)))
			if err == nil && hasMark(pid, mark) {
				_ = syscall.Kill(pid, syscall.SIGKILL) // it fails if the process has ended
			}
		}
	}
}

// hasMark reports whether a process has a variable in its environment.
func hasMark(pid int, mark string) bool {
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	return err == nil && bytes.Contains(append([]byte{0}, environ...), []byte("\x00"+mark+"\x00"))
}

// canKill refuses to run a command that a guard could not kill: the guard must see the
// first process of the container.
func canKill(pid int, sessionID string) error {
	if !hasMark(pid, "BIVOUAC_SESSION_ID="+sessionID) {
		return fmt.Errorf("%w: the plugin could not kill the command: it must run as root on the engine's machine", runtime.ErrInvalid)
	}
	return nil
}
