package agent

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
)

// notifyLimit is how long a message to the service manager may take.
const notifyLimit = time.Second

// serviceManager receives the state of the server. It is systemd, or another program
// that understands the messages of sd_notify(3).
type serviceManager struct {
	// socket is the address of its datagram socket: a path, or "@" and an abstract
	// name. If it is empty, nobody wants to know.
	socket string
	log    hclog.Logger
}

// run reports that the server serves, and then waits until ctx ends and reports that
// the server stops.
func (m serviceManager) run(ctx context.Context) error {
	m.ready(ctx)
	<-ctx.Done()
	m.notify(context.WithoutCancel(ctx), "STOPPING=1")
	return nil
}

// reloadOnHangup calls reload on each SIGHUP until ctx ends, and reports when that begins
// and when it is done.
func (m serviceManager) reloadOnHangup(ctx context.Context, hangups <-chan os.Signal, reload func()) error {
	for {
		select {
		case <-hangups:
			m.reloading(ctx)
			reload()
			m.ready(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

// ready reports that the server serves, or that a reload is done.
func (m serviceManager) ready(ctx context.Context) { m.notify(ctx, "READY=1") }

// reloading reports that a reload begins. Call ready when it is done.
func (m serviceManager) reloading(ctx context.Context) {
	// The manager compares this time with that of its own request to reload.
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		m.log.Warn("notify_failed", "error", err)
		return
	}
	m.notify(ctx, fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", now.Nano()/int64(time.Microsecond)))
}

// notify sends a state in one datagram. A server whose manager does not listen goes on.
func (m serviceManager) notify(ctx context.Context, state string) {
	if m.socket == "" {
		return
	}
	if err := m.send(ctx, state); err != nil {
		m.log.Warn("notify_failed", "state", state, "error", err)
	}
}

func (m serviceManager) send(ctx context.Context, state string) error {
	ctx, cancel := context.WithTimeout(ctx, notifyLimit)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unixgram", m.socket)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // the datagram has been sent, or the write failed
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return err
		}
	}
	_, err = conn.Write([]byte(state))
	return err
}
