package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// initArg makes this program the first process of a sandbox.
const initArg = "sandbox-init"

// maxConnections is the maximum number of open connections to a sandbox.
const maxConnections = 256

// runInit is the first process of a sandbox. It waits for permission, runs the command,
// forwards connections and SIGTERM to it, and ends with it. The sandbox has no network, but
// this process has a socket from outside.
func runInit(command []string) int {
	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, syscall.SIGTERM)
	gate := os.NewFile(gateFD, "gate")
	if n, _ := gate.Read(make([]byte, 1)); n != 1 {
		fmt.Fprintln(os.Stderr, "the plugin ended before it let the sandbox run")
		return 1
	}
	_ = gate.Close()
	_ = unix.Close(earFD)
	unix.CloseOnExec(portFD)

	path, err := exec.LookPath(command[0])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 127
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	child, err := syscall.ForkExec(path, command, &syscall.ProcAttr{
		Env:   os.Environ(),
		Files: []uintptr{null.Fd(), null.Fd(), null.Fd()},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, path, err)
		return 126
	}
	go func() {
		for range terminate {
			_ = syscall.Kill(child, syscall.SIGTERM)
		}
	}()
	port, err := strconv.Atoi(os.Getenv("PORT"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	go forward(net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
	return reap(child)
}

// reap waits for all processes that end, as the first process of a namespace must, and
// returns the exit code of the command.
func reap(child int) int {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return 1
		case pid == child && status.Exited():
			return status.ExitStatus()
		case pid == child && status.Signaled():
			return 128 + int(status.Signal())
		}
	}
}

// forward listens as soon as the command does, and forwards connections to it.
func forward(command net.TCPAddr) {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		conn, err := net.DialTCP("tcp", nil, &command)
		if err == nil {
			_ = conn.Close()
			break
		}
		<-time.After(wait)
	}
	if err := unix.Listen(portFD, maxConnections); err != nil {
		fmt.Fprintln(os.Stderr, "listen:", err)
		return
	}
	listener, err := net.FileListener(os.NewFile(portFD, "endpoint"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "listen:", err)
		return
	}
	room := make(chan struct{}, maxConnections)
	for {
		room <- struct{}{}
		outer, err := listener.Accept()
		if err != nil {
			fmt.Fprintln(os.Stderr, "accept:", err)
			return
		}
		go func() {
			defer func() { <-room }()
			lead(outer, command)
		}()
	}
}

// lead copies in both directions until both sides have ended.
func lead(outer net.Conn, command net.TCPAddr) {
	defer func() { _ = outer.Close() }()
	inner, err := net.DialTCP("tcp", nil, &command)
	if err != nil {
		return
	}
	defer func() { _ = inner.Close() }()
	done := make(chan struct{})
	go func() {
		defer close(done)
		pass(inner, outer)
	}()
	pass(outer, inner)
	<-done
}

func pass(to, from net.Conn) {
	_, _ = io.Copy(to, from)
	if half, ok := to.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
}
