package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	goruntime "runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/demosandbox"
	"github.com/bivouac/bivouac/runtime"
)

// endFirstThread is the argument for a sandbox whose first thread ends, while the
// others serve on.
const endFirstThread = "end-first-thread"

func init() { //nolint:gochecknoinits // later it is too late to choose the thread
	if slices.Contains(os.Args, endFirstThread) {
		goruntime.LockOSThread() // main runs on the first thread
	}
}

// The test binary is also the sandbox that the tests run, and the server
// that they kill.
func TestMain(m *testing.M) {
	var err error
	switch {
	case slices.Contains(os.Args, endFirstThread):
		go func() { _ = demosandbox.Run(context.Background(), demosandbox.FromEnv(os.Getenv)) }() // until it is killed
		_, _, err = syscall.Syscall(syscall.SYS_EXIT, 0, 0, 0)
	case os.Getenv("BIVOUAC_SESSION_ID") != "":
		os.Exit(demosandbox.Main(os.Args[1:], func() error {
			return demosandbox.Run(context.Background(), demosandbox.FromEnv(os.Getenv))
		}))
	case os.Getenv("TEST_EXEC") != "":
		err = execUntilKilled(os.Getenv("TEST_DIR"), os.Getenv("TEST_SESSION_ID"), os.Getenv("TEST_EXEC"))
	case os.Getenv("TEST_CLAIM_ID") != "":
		err = claimAndDie(os.Getenv("TEST_DIR"), os.Getenv("TEST_SPARE_ID"), os.Getenv("TEST_CLAIM_ID"), os.Getenv("TEST_VOLUME"))
	case os.Getenv("TEST_DIR") != "":
		err = createAndDie(os.Getenv("TEST_DIR"), os.Getenv("TEST_SESSION_ID"), runtime.Stage(os.Getenv("TEST_STAGE")))
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// createAndDie is a server that is killed when a create has reached a stage.
func createAndDie(dir, sessionID string, stage runtime.Stage) error {
	d, err := New(Config{Dir: dir, Command: []string{os.Args[0]}, Logger: hclog.NewNullLogger()})
	if err != nil {
		return err
	}
	spec := runtime.Spec{SessionID: sessionID, VolumeHostPath: dir, CreatedAt: time.Unix(1, 0)}
	_, err = d.Create(context.Background(), spec, func(reached runtime.Stage) {
		if reached == stage {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	return errors.Join(err, errors.New("the stage was not reached"))
}

// claimAndDie is a server that is killed when it has a spare and a claimed one.
func claimAndDie(dir, spareID, claimID, volume string) error {
	d, err := New(Config{Dir: dir, Command: []string{os.Args[0]}, Logger: hclog.NewNullLogger()})
	if err != nil {
		return err
	}
	for _, id := range []string{spareID, claimID} {
		spec := runtime.Spec{SessionID: id, Pool: "pool", CreatedAt: time.Unix(1, 0)}
		if _, err := d.Create(context.Background(), spec, func(runtime.Stage) {}); err != nil {
			return err
		}
	}
	spec := runtime.Spec{SessionID: claimID, ChatID: spareID, AgentID: "agent-1", VolumeHostPath: volume}
	if _, err := d.Claim(context.Background(), spec); err != nil {
		return err
	}
	return errors.Join(syscall.Kill(os.Getpid(), syscall.SIGKILL), errors.New("it survived"))
}

// execUntilKilled is a server that runs a command in a sandbox. The test kills it.
func execUntilKilled(dir, sessionID, marker string) error {
	d, err := New(Config{Dir: dir, Command: []string{os.Args[0]}, Logger: hclog.NewNullLogger()})
	if err != nil {
		return err
	}
	spec := runtime.Spec{SessionID: sessionID, VolumeHostPath: dir, CreatedAt: time.Unix(1, 0)}
	if _, err := d.Create(context.Background(), spec, func(runtime.Stage) {}); err != nil {
		return err
	}
	command := runtime.Command{Args: []string{"sh", "-c", `echo started; exec sleep "$1"`, "sh", marker}}
	_, err = d.Exec(context.Background(), sessionID, command, runtime.Streams{Stdout: os.Stdout})
	return errors.Join(err, errors.New("the command ended"))
}
