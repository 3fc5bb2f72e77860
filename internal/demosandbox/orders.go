package demosandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// The orders that a file in the workspace can give to a sandbox, to test a runtime
// with sandboxes that fail.
const (
	orderExit   = "exit"   // exit at once with an error
	orderHang   = "hang"   // never listen, or only after the duration that follows
	orderMemory = "memory" // use memory until the limit of the sandbox is reached
)

var (
	errToldToExit = errors.New("exited on request")
	errSecond     = errors.New("another sandbox of the same session is running")
	errNoLimit    = errors.New("nothing limits the sandbox's memory")
)

// Obey follows the order in the workspace's file ".demo-sandbox-<session ID>". It
// does nothing if there is no such file. If there is one, even an empty one, Obey
// locks it with flock(2) until release is called, so that a test can see that the
// sandbox runs. Obey returns an error if another sandbox has the lock, or if the
// order is to exit.
func Obey(ctx context.Context, workspace *os.Root, sessionID string) (release func(), err error) {
	file, err := workspace.Open(".demo-sandbox-" + sessionID)
	if errors.Is(err, fs.ErrNotExist) {
		return func() {}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open orders: %w", err)
	}
	if err := follow(ctx, file); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return func() { _ = file.Close() }, nil
}

func follow(ctx context.Context, file *os.File) error {
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return fmt.Errorf("%w: lock orders: %w", errSecond, err)
	}
	order, err := io.ReadAll(io.LimitReader(file, 64))
	if err != nil {
		return fmt.Errorf("read orders: %w", err)
	}
	switch order, duration, _ := strings.Cut(strings.TrimSpace(string(order)), " "); order {
	case "":
		return nil
	case orderExit:
		return errToldToExit
	case orderHang:
		return hang(ctx, duration)
	case orderMemory:
		return useMemory()
	default:
		return fmt.Errorf("unknown order %q", order)
	}
}

// hang waits for a duration, or without one until ctx ends.
func hang(ctx context.Context, duration string) error {
	var over <-chan time.Time
	if duration != "" {
		wait, err := time.ParseDuration(duration)
		if err != nil {
			return fmt.Errorf("hang: %w", err)
		}
		over = time.After(wait)
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-over:
		return nil
	}
}

// maxMemory bounds useMemory, in case that there is no limit.
const maxMemory = 512 // MiB

// useMemory uses memory until the kernel kills the process. If that does not happen, it
// returns an error.
func useMemory() error {
	var used [][]byte
	for range maxMemory {
		block := make([]byte, 1<<20)
		for i := 0; i < len(block); i += os.Getpagesize() {
			block[i] = 1
		}
		used = append(used, block)
	}
	runtime.KeepAlive(used)
	return errNoLimit
}
