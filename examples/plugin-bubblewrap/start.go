package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"github.com/bivouac/bivouac/runtime"
	"golang.org/x/sys/unix"
)

// Inside a sandbox.
const (
	workspace = "/workspace"
	initPath  = "/run/bivouac/init" // this program
	innerPort = 8080                // the command's port, if the sandbox has its own network
)

// The file descriptors that a sandbox's first process inherits, beside the usual three.
const (
	infoFD = iota + 3 // bwrap writes the first process's PID
	gateFD            // the first process reads its permission to go on
	portFD            // the socket of the sandbox's endpoint, not listening yet
	earFD             // the other end of infoFD, which nobody reads
)

// gated is a sandbox that is set up, but whose command waits for permission. If the plugin
// ends before it gives the permission, the sandbox ends by itself. So the command never
// runs without a record of its process.
type gated struct {
	process  process
	endpoint runtime.Endpoint
	gate     *os.File
}

func (g *gated) letRun() error {
	_, err := g.gate.Write([]byte{1})
	return err
}

func (g *gated) close() { _ = g.gate.Close() }

// start sets up a sandbox, up to the gate.
func (d *driver) start(ctx context.Context, spec runtime.Spec) (_ *gated, err error) {
	socket, endpoint, err := reserve()
	if err != nil {
		return nil, err
	}
	defer func() { _ = socket.Close() }()
	port := innerPort
	if d.config.Network {
		// The command needs a port of this machine. The port is released here, so another
		// program may take it before the command does.
		inner, free, err := reserve()
		if err != nil {
			return nil, err
		}
		port = int(free.Port)
		_ = inner.Close()
	}
	info, tellInfo, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer func() { _ = info.Close() }()
	gate, openGate, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, tellInfo.Close())
	}
	output, err := d.records.openOutput(ctx, spec.SessionID)
	if err != nil {
		return nil, errors.Join(err, tellInfo.Close(), gate.Close(), openGate.Close())
	}
	cmd := exec.Command("bwrap", d.arguments(spec, port)...) //nolint:noctx // it outlives the call that starts it
	cmd.Stderr = output
	// In the order of the constants. bwrap gets both ends of info: if nobody is left to
	// read, its write would kill it, and its child would wait for it for ever.
	cmd.ExtraFiles = []*os.File{tellInfo, gate, socket, info}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // the host ends the plugin's own group with it
	err = cmd.Start()
	err = errors.Join(err, tellInfo.Close(), gate.Close(), output.Close())
	if err != nil {
		return nil, errors.Join(err, openGate.Close())
	}

	// The session's lock is held during this, so a bwrap that hangs is ended when the
	// caller has gone. Its process group cannot be reused until it has been waited for.
	spare := context.AfterFunc(ctx, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	var told struct {
		PID int `json:"child-pid"`
	}
	content, err := io.ReadAll(info) // bwrap closes its end after that
	spare()
	go func() { _ = cmd.Wait() }() // ignore the exit code: it would be lost after a restart anyway
	if err == nil {
		err = json.Unmarshal(content, &told)
	}
	var first process
	if err == nil {
		first, err = find(told.PID)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("bwrap: %w: %s", err, d.records.lastWords(spec.SessionID)), openGate.Close())
	}
	return &gated{process: first, endpoint: endpoint, gate: openGate}, nil
}

// reserve returns a socket with a free port on loopback. It does not listen yet, so nobody
// can connect.
func reserve() (*os.File, runtime.Endpoint, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, runtime.Endpoint{}, err
	}
	socket := os.NewFile(uintptr(fd), "endpoint")
	loopback := [4]byte{127, 0, 0, 1}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: loopback}); err != nil {
		return nil, runtime.Endpoint{}, errors.Join(err, socket.Close())
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return nil, runtime.Endpoint{}, errors.Join(err, socket.Close())
	}
	bound, ok := name.(*unix.SockaddrInet4)
	if !ok {
		return nil, runtime.Endpoint{}, errors.Join(errors.New("not an IPv4 socket"), socket.Close())
	}
	return socket, runtime.Endpoint{IP: netip.AddrFrom4(loopback), Port: uint16(bound.Port)}, nil //nolint:gosec // a port fits
}

// arguments returns bwrap's arguments for a sandbox with its own namespaces, no
// capabilities, a read-only root with the system's programs, and the volume.
func (d *driver) arguments(spec runtime.Spec, port int) []string {
	args := []string{
		"--unshare-all", "--as-pid-1", "--cap-drop", "ALL", "--hostname", "sandbox",
		"--info-fd", strconv.Itoa(infoFD),
		"--ro-bind", "/usr", "/usr",
		"--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", "/run",
		"--ro-bind", d.self, initPath,
		"--bind", spec.VolumeHostPath, workspace,
		"--chdir", workspace,
		"--clearenv",
	}
	if d.config.Network {
		args = append(args, "--share-net", "--ro-bind-try", "/etc/resolv.conf", "/etc/resolv.conf", "--ro-bind-try", "/etc/ssl", "/etc/ssl")
	}
	for _, folder := range []string{"/bin", "/sbin", "/lib", "/lib64"} { // links into /usr on most systems
		if target, err := os.Readlink(folder); err == nil {
			args = append(args, "--symlink", target, folder)
		} else {
			args = append(args, "--ro-bind-try", folder, folder)
		}
	}
	for _, path := range d.config.ReadOnly {
		args = append(args, "--ro-bind", path, path)
	}
	for name, value := range map[string]string{
		"PATH":               "/usr/local/bin:/usr/bin:/bin",
		"PORT":               strconv.Itoa(port),
		"BIVOUAC_SESSION_ID": spec.SessionID,
		"BIVOUAC_CHAT_ID":    spec.ChatID,
		"BIVOUAC_AGENT_ID":   spec.AgentID,
		"BIVOUAC_WORKSPACE":  workspace,
	} {
		args = append(args, "--setenv", name, value)
	}
	args = append(args, "--remount-ro", "/", "--", initPath, initArg)
	return append(args, d.config.Command...)
}
