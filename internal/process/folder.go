package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// MakeFolder creates a folder that only this user can write to, if it does not exist.
// It refuses a folder that others can write to or that another user owns, and a
// symbolic link. A user who can write to the folder could make Bivouac end any process
// of this user, or write to any of this user's files.
func MakeFolder(path string) error {
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return &fs.PathError{Op: "open", Path: path, Err: syscall.ENOTDIR}
	}
	return checkOwn(path, info)
}

// openFolder makes a folder as MakeFolder does and opens it. All operations on the root
// affect this folder, even if something else takes its path.
func openFolder(path string) (*os.Root, error) {
	if err := MakeFolder(path); err != nil {
		return nil, err
	}
	seen, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	opened, err := root.Stat(".")
	if err == nil && !os.SameFile(seen, opened) {
		err = fmt.Errorf("%s was replaced while it was opened", path)
	}
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return root, nil
}

// checkOwn refuses a file or folder that another user owns or that others can write to.
func checkOwn(path string, info fs.FileInfo) error {
	owner, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !ok || int64(owner.Uid) != int64(os.Geteuid()):
		return fmt.Errorf("%s belongs to another user, who could have this one's processes ended: remove it, or use another folder", path)
	case info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("others can write to %s, and so could have this user's processes ended: run chmod go-w, or use another folder", path)
	}
	return nil
}

// readOwn reads a file of the folder. It refuses a file that is not a regular file or
// that fails checkOwn.
func readOwn(root *os.Root, name string) ([]byte, error) {
	info, err := root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("it is not a regular file")
	}
	if err := checkOwn(name, info); err != nil {
		return nil, err
	}
	return root.ReadFile(name)
}
