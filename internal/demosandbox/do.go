package demosandbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// doFlag is the argument with which the program of a sandbox does something instead of
// serving.
const doFlag = "-do="

// Main is the main function of a program that is a sandbox for tests: it does what an
// argument -do=ACTIONS says, or else runs the sandbox that the environment describes. It
// returns the exit code.
func Main(args []string, run func() error) int {
	for _, arg := range args {
		if actions, ok := strings.CutPrefix(arg, doFlag); ok {
			return Do(actions)
		}
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// Do does things that show how a runtime runs commands in a sandbox, and returns the exit
// code. The actions are words, done in order:
//
//	out=TEXT err=TEXT  write TEXT to standard output or standard error
//	copy               copy standard input to standard output until its end
//	env=NAME           write the value of a variable to standard output
//	dir                write the working directory to standard output
//	size=ROWSxCOLUMNS  wait until the terminal on standard output has this size
//	lock=FILE          lock a file of the workspace with flock(2) while the process runs
//	leave=FILE         leave a process in the background that has a file locked
//	stubborn           ignore SIGHUP, SIGINT and SIGTERM
//	wait               wait until the process is killed, for two minutes at most
//	kill               end by SIGKILL
//	exit=CODE          exit
//
// The locks show without the runtime whether something still runs.
func Do(actions string) int {
	for action := range strings.FieldsSeq(actions) {
		name, value, _ := strings.Cut(action, "=")
		if name == "exit" {
			code, err := strconv.Atoi(value)
			if err != nil {
				code = 1
			}
			return code
		}
		if err := do(name, value); err != nil {
			fmt.Fprintf(os.Stderr, "demo-sandbox: %s: %v\n", action, err)
			return 1
		}
	}
	return 0
}

func do(name, value string) (err error) {
	switch name {
	case "out":
		_, err = fmt.Fprintln(os.Stdout, value)
	case "err":
		_, err = fmt.Fprintln(os.Stderr, value)
	case "copy":
		_, err = io.Copy(os.Stdout, os.Stdin)
	case "env":
		_, err = fmt.Fprintln(os.Stdout, os.Getenv(value))
	case "dir":
		var dir string
		if dir, err = os.Getwd(); err == nil {
			_, err = fmt.Fprintln(os.Stdout, dir)
		}
	case "size":
		return awaitSize(value)
	case "lock":
		_, err = lock(value) // the file stays open until the process ends
	case "leave":
		return leave(value)
	case "stubborn":
		signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM)
	case "wait":
		<-time.After(2 * time.Minute)
	case "kill":
		err = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		<-time.After(time.Minute) // until the signal is there
	default:
		err = errors.New("unknown action")
	}
	return err
}

// awaitSize waits until the terminal has a size.
func awaitSize(want string) error {
	for {
		size, err := unix.IoctlGetWinsize(int(os.Stdout.Fd()), unix.TIOCGWINSZ)
		if err != nil {
			return err
		}
		if fmt.Sprintf("%dx%d", size.Row, size.Col) == want {
			return nil
		}
		<-time.After(10 * time.Millisecond)
	}
}

func lock(name string) (*os.File, error) {
	file, err := os.Open(filepath.Join(FromEnv(os.Getenv).Workspace, name))
	if err != nil {
		return nil, err
	}
	return file, syscall.Flock(int(file.Fd()), syscall.LOCK_EX)
}

// leave starts a process that inherits the lock of a file.
func leave(name string) error {
	file, err := lock(name)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }() // the process has its own copy
	command, err := ownCommand()
	if err != nil {
		return err
	}
	child := exec.Command(command[0], append(command[1:], doFlag+"wait")...) //nolint:noctx // it outlives this process
	child.ExtraFiles = []*os.File{file}
	return child.Start()
}

// ownCommand returns the command line that this process was started with, without
// actions.
func ownCommand() ([]string, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	args := slices.DeleteFunc(slices.Clone(os.Args[1:]), func(arg string) bool { return strings.HasPrefix(arg, doFlag) })
	return append([]string{program}, args...), nil
}
