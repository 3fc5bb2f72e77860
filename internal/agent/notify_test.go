package agent

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	"golang.org/x/sys/unix"
)

// listenAsManager listens as a service manager does. It returns what receives the next
// datagram.
func listenAsManager(t *testing.T, socket string) (next func() string) {
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, conn.Close()) })
	return func() string {
		must.NoError(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
		datagram := make([]byte, 4096)
		n, err := conn.Read(datagram)
		must.NoError(t, err)
		return string(datagram[:n])
	}
}

// socketPath returns a path that is short enough for a socket.
func socketPath(t *testing.T) string {
	dir, err := os.MkdirTemp("", "notify-") //nolint:usetesting // t.TempDir is too long for a socket
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, os.RemoveAll(dir)) })
	return filepath.Join(dir, "s")
}

func TestServiceManager(t *testing.T) {
	for name, socket := range map[string]string{
		"with a socket in a folder":  socketPath(t),
		"with a socket in no folder": "@bivouac-notify-" + strconv.Itoa(os.Getpid()),
	} {
		t.Run("is told the server's life "+name, func(t *testing.T) {
			if socket[0] == '@' && runtime.GOOS != "linux" {
				return // only Linux has abstract sockets
			}
			next := listenAsManager(t, socket)
			manager := serviceManager{socket: socket, log: hclog.NewNullLogger()}
			ctx, stop := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- manager.run(ctx) }()
			must.Eq(t, "READY=1", next())
			stop()
			must.Eq(t, "STOPPING=1", next())
			must.NoError(t, <-done)
		})
	}

	t.Run("is told of a reload with the time of the clock that it compares", func(t *testing.T) {
		socket := socketPath(t)
		next := listenAsManager(t, socket)
		hangups := make(chan os.Signal, 1)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		manager := serviceManager{socket: socket, log: hclog.NewNullLogger()}
		reload := make(chan struct{})
		go func() { done <- manager.reloadOnHangup(ctx, hangups, func() { <-reload }) }()

		before := monotonic(t)
		hangups <- unix.SIGHUP
		told := regexp.MustCompile(`^RELOADING=1\nMONOTONIC_USEC=(\d+)$`).FindStringSubmatch(next())
		must.Len(t, 2, told)
		at, err := strconv.ParseInt(told[1], 10, 64)
		must.NoError(t, err)
		must.Between(t, before, at, monotonic(t))
		close(reload)
		must.Eq(t, "READY=1", next())
		stop()
		must.NoError(t, <-done)
	})

	t.Run("need not exist", func(t *testing.T) {
		var log bytes.Buffer
		logger := hclog.New(&hclog.LoggerOptions{Output: &log})
		serviceManager{log: logger}.ready(t.Context())
		must.Eq(t, "", log.String())
		serviceManager{socket: socketPath(t), log: logger}.ready(t.Context())
		must.StrContains(t, log.String(), "notify_failed")
	})
}

// monotonic returns the monotonic clock in microseconds.
func monotonic(t *testing.T) int64 {
	var now unix.Timespec
	must.NoError(t, unix.ClockGettime(unix.CLOCK_MONOTONIC, &now))
	return now.Nano() / 1000
}
