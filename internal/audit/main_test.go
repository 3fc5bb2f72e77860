package audit_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/bivouac/bivouac/internal/audit"
)

// TestMain runs the tests, or what a test needs a process of its own for.
func TestMain(m *testing.M) {
	path, limit := os.Getenv("TEST_AUDIT_FILE"), os.Getenv("TEST_FILE_LIMIT")
	var err error
	switch {
	case path == "":
		os.Exit(m.Run())
	case limit == "":
		err = writeForEver(path)
	default:
		err = outgrow(path, limit)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// operation is one whose lines tell which one it is.
func operation(n int) *audit.Operation {
	return &audit.Operation{RequestID: strconv.Itoa(n), Method: "PUT", Endpoint: "/v1/sessions/{chat_id}", Status: 200}
}

// writeForEver writes lines until the process is killed.
func writeForEver(path string) error {
	sink, err := audit.Open(audit.Settings{Name: "file", Path: path, Mode: 0o600, Enforced: true}, nil)
	if err != nil {
		return err
	}
	log := newLog(sink)
	for n := 0; ; n++ {
		if _, err := log.Begin(context.Background(), operation(n)); err != nil {
			return err
		}
	}
}

// outgrow writes lines until a file is as large as the system allows. Then it lets the
// file grow, and writes one more.
func outgrow(path, limit string) error {
	signal.Ignore(syscall.SIGXFSZ)
	size, err := strconv.ParseUint(limit, 10, 64)
	if err != nil {
		return err
	}
	sink, err := audit.Open(audit.Settings{Name: "file", Path: path, Mode: 0o600, Enforced: true}, nil)
	if err != nil {
		return err
	}
	var limits unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &limits); err != nil {
		return err
	}
	highest := limits.Cur
	limits.Cur = size
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &limits); err != nil {
		return err
	}
	log := newLog(sink)
	n := 0
	for ; err == nil; n++ {
		_, err = log.Begin(context.Background(), operation(n))
	}
	if !errors.Is(err, syscall.EFBIG) {
		return err
	}
	full, err := os.ReadFile(filepath.Clean(path))
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".full", full, 0o600); err != nil {
		return err
	}
	limits.Cur = highest
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &limits); err != nil {
		return err
	}
	_, err = log.Begin(context.Background(), operation(n))
	return err
}

func newLog(sinks ...*audit.Sink) *audit.Log {
	return audit.New(audit.Config{Sinks: sinks, Node: "node-1", Logger: hclog.NewNullLogger(), Lost: func(string) {}})
}
