package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	goruntime "runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/runtime"
)

// openRetries is how often a path is resolved again that changed meanwhile.
const openRetries = 8

// openVolume opens the folder of a volume below one of the roots. Roots may lead over
// symbolic links, since the operator names them. The path below a root may not.
func openVolume(roots []string, volume string) (*os.File, error) {
	for _, root := range roots {
		below, ok := strings.CutPrefix(volume, strings.TrimSuffix(root, "/")+"/")
		if !ok || below == "" {
			continue
		}
		folder, err := openFolder(unix.AT_FDCWD, root, 0)
		if err != nil {
			return nil, fmt.Errorf("%w: volume root %s: %w", runtime.ErrUnavailable, root, err)
		}
		f, err := openFolder(int(folder.Fd()), below, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS|unix.RESOLVE_NO_MAGICLINKS)
		_ = folder.Close() // it was only used to open another one
		switch {
		case err == nil:
			return f, nil
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.EXDEV):
			return nil, fmt.Errorf("%w: volume %s must be an existing folder, and no part of its path may be a symbolic link: %w", runtime.ErrInvalid, volume, err)
		default:
			return nil, fmt.Errorf("%w: volume %s: %w", runtime.ErrUnavailable, volume, err)
		}
	}
	return nil, fmt.Errorf("%w: volume %s is below none of the helper's volume roots (%s)", runtime.ErrInvalid, volume, strings.Join(roots, ", "))
}

// openFolder opens a folder as a place, without the right to read it.
func openFolder(dir int, name string, resolve uint64) (*os.File, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: resolve}
	for try := 0; ; try++ {
		fd, err := unix.Openat2(dir, name, &how)
		if (errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR)) && try < openRetries {
			continue
		}
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), name), nil
	}
}

// cloneMount returns a copy of the mount of a folder that is mounted nowhere yet, with
// what is mounted below it. It is private: mounts spread neither into it nor from it.
func cloneMount(folder *os.File) (*os.File, error) {
	fd, err := unix.OpenTree(int(folder.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("%w: clone the mount of the volume: %w", runtime.ErrUnavailable, err)
	}
	tree := os.NewFile(uintptr(fd), "volume")
	err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV,
		Propagation: unix.MS_PRIVATE,
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%w: restrict the mount of the volume: %w", runtime.ErrUnavailable, err), tree.Close())
	}
	return tree, nil
}

// newSessionMount returns a read-only file system in memory that contains only the
// session file, and that is mounted nowhere yet.
func newSessionMount(session runtime.SessionFile) (*os.File, error) {
	wrap := func(err error) error {
		return fmt.Errorf("%w: make the file system of the session file: %w", runtime.ErrUnavailable, err)
	}
	const private = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, wrap(err)
	}
	defer func() { _ = unix.Close(fs) }() // the mount keeps what is needed
	for _, option := range [][2]string{{"source", nodeapi.Service}, {"size", "16k"}, {"nr_inodes", "4"}, {"mode", "0755"}} {
		if err := unix.FsconfigSetString(fs, option[0], option[1]); err != nil {
			return nil, wrap(err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, wrap(err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, private)
	if err != nil {
		return nil, wrap(err)
	}
	mount := os.NewFile(uintptr(fd), "session")
	if err := writeSession(fd, session); err != nil {
		return nil, errors.Join(wrap(err), mount.Close())
	}
	err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | private})
	if err != nil {
		return nil, errors.Join(wrap(err), mount.Close())
	}
	return mount, nil
}

// writeSession writes the session file into a folder in which there is none.
func writeSession(dir int, session runtime.SessionFile) error {
	text, err := json.Marshal(session)
	if err != nil {
		return err
	}
	fd, err := unix.Openat(dir, nodeapi.SessionFile, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o444)
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), nodeapi.SessionFile)
	_, err = file.Write(append(text, '\n'))
	return errors.Join(err, file.Chmod(0o444), file.Close()) // whatever the umask
}

// places are the two places in a sandbox where mounts go.
type places struct {
	target, session *os.File
}

// openPlaces opens the two places below the root of the process. It makes the folder of the
// session file if the sandbox has none. It follows no symbolic links: a sandbox that makes
// some only keeps itself from being bound.
func openPlaces(p *process, target string) (r places, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
			r = places{}
		}
	}()
	root, err := p.open("root", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return r, err
	}
	defer root.Close() //nolint:errcheck // it was only used to open others
	if r.target, err = openInside(root, target); err != nil {
		return r, err
	}
	r.session, err = openInside(root, nodeapi.SessionDir)
	if errors.Is(err, unix.ENOENT) {
		if err := makeInside(root, nodeapi.SessionDir); err != nil {
			return r, err
		}
		r.session, err = openInside(root, nodeapi.SessionDir)
	}
	if err != nil {
		return r, err
	}
	shared, err := p.sharedMounts()
	if err != nil {
		return r, err
	}
	for _, place := range []*os.File{r.target, r.session} {
		var stat unix.Statx_t
		if err := unix.Statx(int(place.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &stat); err != nil {
			return r, fmt.Errorf("%w: %s in the sandbox: %w", runtime.ErrUnavailable, place.Name(), err)
		}
		// The volume would appear elsewhere, too, maybe on the node below the folder of the
		// allocation. Nomad would then remove the files in the volume.
		if stat.Mask&unix.STATX_MNT_ID == 0 || shared[stat.Mnt_id] {
			return r, fmt.Errorf("%w: %s in the sandbox is on a shared mount", runtime.ErrInvalid, place.Name())
		}
	}
	return r, nil
}

// Close closes the places.
func (r places) Close() error {
	var errs []error
	for _, f := range []*os.File{r.target, r.session} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// openInside opens a folder of a sandbox.
func openInside(root *os.File, name string) (*os.File, error) {
	f, err := openFolder(int(root.Fd()), name, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_SYMLINKS|unix.RESOLVE_NO_MAGICLINKS)
	if err != nil {
		return nil, fmt.Errorf("%w: %s in the sandbox must be a folder, and no part of its path may be a symbolic link: %w", runtime.ErrInvalid, name, err)
	}
	return f, nil
}

// makeInside makes a folder of a sandbox, with its parents.
func makeInside(root *os.File, name string) error {
	parent := path.Dir(name)
	if parent == name {
		return nil
	}
	if err := makeInside(root, parent); err != nil {
		return err
	}
	folder, err := openInside(root, parent)
	if err != nil {
		return err
	}
	defer folder.Close() //nolint:errcheck // it was only used to make another one
	err = unix.Mkdirat(int(folder.Fd()), path.Base(name), 0o755)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%w: make %s in the sandbox: %w", runtime.ErrInvalid, name, err)
	}
	return nil
}

// hasSession reports whether the file system of a session file is mounted at a folder. It
// does not read the file, because what is written down outside of the sandbox decides.
func hasSession(folder *os.File) (bool, error) {
	file, err := unix.Openat2(int(folder.Fd()), nodeapi.SessionFile, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return false, nil
	}
	defer func() { _ = unix.Close(file) }() // it was only looked at
	var fs unix.Statfs_t
	if err := unix.Fstatfs(file, &fs); err != nil {
		return false, fmt.Errorf("%w: the session file: %w", runtime.ErrUnavailable, err)
	}
	return fs.Type == unix.TMPFS_MAGIC && fs.Flags&unix.ST_RDONLY != 0, nil
}

// moveMount mounts what is mounted nowhere at a place of the current mount namespace.
func moveMount(mount, place *os.File) error {
	err := unix.MoveMount(int(mount.Fd()), "", int(place.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("%w: mount at %s in the sandbox: %w", runtime.ErrUnavailable, place.Name(), err)
	}
	return nil
}

// inNamespace runs f in a mount namespace, in a thread that does nothing else and ends
// afterwards.
func inNamespace(ns *os.File, f func() error) error {
	done := make(chan error, 1)
	go func() {
		goruntime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The first thread never ends, and /proc/self shows its namespace. It is held here
			// while another thread does the work.
			done <- inNamespace(ns, f)
			goruntime.UnlockOSThread()
			return
		}
		// The thread is not unlocked, so it ends with the goroutine.
		done <- enterAndRun(ns, f)
	}()
	return <-done
}

func enterAndRun(ns *os.File, f func() error) error {
	// A thread that shares its root and its working directory with others cannot change
	// its mount namespace.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("%w: unshare: %w", runtime.ErrUnavailable, err)
	}
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("%w: enter the mount namespace of the sandbox: %w", runtime.ErrUnavailable, err)
	}
	return f()
}
