package demosandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"time"
)

// What a sandbox may be ordered to do by a file of its workspace, so that a
// runtime can be tried with sandboxes that fail.
const (
	orderExit = "exit" // end at once, with an error
	orderHang = "hang" // run and never listen, or, with a duration after it, only then
)

var (
	errToldToExit = errors.New("told to exit")
	errSecond     = errors.New("another sandbox of the same session runs")
)

// Obey does what the workspace's file ".demo-sandbox-<session ID>" says: nothing
// more where it is empty, and nothing at all where there is none. Until release
// is called the file bears an exclusive lock of flock(2), by which whoever can
// open the file sees that the sandbox runs. Obey fails where another one has the
// lock, and where it is told to.
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
