package httpserver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// Socket describes the file of a unix socket.
type Socket struct {
	Mode  fs.FileMode // its permissions: who may write to it may connect
	User  string      // name or ID of its owner; empty: the user of this process
	Group string      // name or ID of its group; empty: the group of this process
}

// connectLimit is how long a server that has the socket may take to accept a connection.
const connectLimit = 5 * time.Second

// unixListener removes its socket when it is closed, unless another server has replaced
// it.
type unixListener struct {
	net.Listener
	path string
	made fs.FileInfo
}

func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

func (l *unixListener) Close() error {
	if found, err := os.Lstat(l.path); err == nil && os.SameFile(found, l.made) {
		_ = os.Remove(l.path) // the next server replaces a socket that is left
	}
	return l.Listener.Close()
}

// listenUnix replaces a socket that nobody listens on. It makes the new one in a folder
// that no other user can enter, and moves it to its path when its permissions are set.
func listenUnix(ctx context.Context, path string, socket Socket) (net.Listener, error) {
	if err := checkUnused(ctx, path); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), ".bivouac")
	if err != nil {
		return nil, fmt.Errorf("make a unix socket: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }() // empty by now
	temporary := filepath.Join(dir, "s")
	listener, err := new(net.ListenConfig).Listen(ctx, "unix", temporary)
	if err != nil {
		return nil, err
	}
	if inner, ok := listener.(*net.UnixListener); ok {
		inner.SetUnlinkOnClose(false) // it would remove temporary
	}
	made, err := socket.publish(temporary, path)
	if err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return &unixListener{listener, path, made}, nil
}

// checkUnused refuses a path if a server listens there, or if it is not a socket.
func checkUnused(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at the unix socket: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is not a socket", path)
	}
	ctx, cancel := context.WithTimeout(ctx, connectLimit)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		return errors.Join(fmt.Errorf("listen unix %s: %w", path, syscall.EADDRINUSE), conn.Close())
	case errors.Is(err, syscall.ECONNREFUSED): // its server is gone
		return nil
	default:
		return fmt.Errorf("is there a server at the unix socket? %w", err)
	}
}

// publish sets owner, group and mode of the socket at from, and moves it to path.
func (s Socket) publish(from, path string) (fs.FileInfo, error) {
	uid, err := idOf(s.User, func(name string) (string, error) {
		found, err := user.Lookup(name)
		if err != nil {
			return "", err
		}
		return found.Uid, nil
	})
	if err != nil {
		return nil, err
	}
	gid, err := idOf(s.Group, func(name string) (string, error) {
		found, err := user.LookupGroup(name)
		if err != nil {
			return "", err
		}
		return found.Gid, nil
	})
	if err != nil {
		return nil, err
	}
	if uid != unchanged || gid != unchanged {
		if err := os.Lchown(from, uid, gid); err != nil {
			return nil, fmt.Errorf("set the owner of the unix socket %s: %w", path, err)
		}
	}
	if err := os.Chmod(from, s.Mode); err != nil {
		return nil, fmt.Errorf("set the mode of the unix socket %s: %w", path, err)
	}
	made, err := os.Lstat(from)
	if err == nil {
		err = os.Rename(from, path)
	}
	if err != nil {
		return nil, fmt.Errorf("make the unix socket %s: %w", path, err)
	}
	return made, nil
}

// unchanged is the ID that makes chown leave an owner or group as it is.
const unchanged = -1

// idOf returns the ID of a user or group, which may be given as its name or as its ID.
func idOf(name string, lookup func(name string) (string, error)) (int, error) {
	if name == "" {
		return unchanged, nil
	}
	if id, err := strconv.ParseUint(name, 10, 31); err == nil {
		return int(id), nil
	}
	text, err := lookup(name)
	if err != nil {
		return 0, fmt.Errorf("the owner of the unix socket: %w", err)
	}
	id, err := strconv.Atoi(text)
	if err != nil {
		return 0, fmt.Errorf("the owner of the unix socket: the ID of %q: %w", name, err)
	}
	return id, nil
}
