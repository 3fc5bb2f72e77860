package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	goruntime "runtime"
	"strconv"
	"strings"

	"github.com/bivouac/bivouac/runtime"
	"github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"
)

// bind mounts the volume and the session's file into a container. What an earlier call has
// mounted stays.
func bind(spare container.InspectResponse, spec runtime.Spec) error {
	// As in a container's own bind mount, what is mounted below the volume is there too, and
	// what is mounted there later is not.
	volume, err := unix.OpenTree(unix.AT_FDCWD, spec.VolumeHostPath, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("%w: open volume %s: %w", runtime.ErrInvalid, spec.VolumeHostPath, err)
	}
	defer func() { _ = unix.Close(volume) }()
	if err := unix.MountSetattr(volume, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{Propagation: unix.MS_PRIVATE}); err != nil {
		return fmt.Errorf("make volume private: %w", err)
	}
	session, err := mountOf(spec)
	if err != nil {
		return fmt.Errorf("make session file: %w", err)
	}
	defer func() { _ = unix.Close(session) }()
	return inside(spare, func(mounts string) error {
		return errors.Join(cover(mounts, workspace, volume), cover(mounts, sessionFolder, session))
	})
}

// cover mounts a detached mount over a folder of a spare, which is a mount itself. mounts
// are those of the container; if there are two at the folder, it is covered.
func cover(mounts, folder string, mount int) error {
	if strings.Count(mounts, " "+folder+" ") > 1 {
		return nil
	}
	if err := unix.MoveMount(mount, "", unix.AT_FDCWD, folder, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("%w: mount at %s: %w", runtime.ErrInvalid, folder, err)
	}
	return nil
}

// mountOf makes a read-only mount, which is nowhere yet, with the session's file.
func mountOf(spec runtime.Spec) (mount int, err error) {
	text, err := json.Marshal(spec.SessionFile())
	if err != nil {
		return 0, err
	}
	tmpfs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(tmpfs) }()
	if err := errors.Join(unix.FsconfigSetString(tmpfs, "mode", "0755"), unix.FsconfigCreate(tmpfs)); err != nil {
		return 0, err
	}
	mount, err = unix.Fsmount(tmpfs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return 0, err
	}
	path := fmt.Sprintf("/proc/self/fd/%d/%s", mount, sessionName)
	err = os.WriteFile(path, text, 0o600)
	if err == nil {
		err = os.Chmod(path, 0o444) //nolint:gosec // all users of the container may read it
	}
	if err == nil {
		err = unix.MountSetattr(mount, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	}
	if err != nil {
		return 0, errors.Join(err, unix.Close(mount))
	}
	return mount, nil
}

// inside calls f in the mount namespace of a container, with the list of its mounts, which
// is as in proc_pid_mountinfo(5).
func inside(of container.InspectResponse, f func(mounts string) error) error {
	process, err := os.Open("/proc/" + strconv.Itoa(of.State.Pid))
	if err != nil {
		return err
	}
	defer func() { _ = process.Close() }()
	// Below this path there is only this process, even if its ID is used again. Its cgroup
	// shows that it is the container's. The engine makes the cgroup, and a sandbox cannot
	// change it.
	path := fmt.Sprintf("/proc/self/fd/%d/", process.Fd())
	cgroup, err := os.ReadFile(path + "cgroup")
	if err != nil {
		return err
	}
	if !strings.Contains(string(cgroup), of.ID) {
		return fmt.Errorf("process %d is not of container %s", of.State.Pid, of.ID)
	}
	mounts, err := os.ReadFile(path + "mountinfo")
	if err != nil {
		return err
	}
	namespace, err := os.Open(path + "ns/mnt")
	if err != nil {
		return err
	}
	defer func() { _ = namespace.Close() }()
	done := make(chan error, 1)
	go func() {
		goruntime.LockOSThread() // and no unlock: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNS)
		}
		if err == nil {
			err = f(string(mounts))
		}
		done <- err
	}()
	return <-done
}
