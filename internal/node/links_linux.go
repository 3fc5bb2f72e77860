package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/runtime"
)

// links has a folder for each claimed sandbox of raw_exec, with a symbolic link to its
// volume and its session file.
type links struct {
	folder string // nodeapi.SandboxesDir
}

// prepare makes the folder if it does not exist. A process that knows a session ID may
// enter what is in it, but none may list it.
func (l links) prepare() error {
	for _, dir := range []string{filepath.Dir(l.folder), l.folder} {
		if err := os.Mkdir(dir, 0o711); err != nil && !errors.Is(err, fs.ErrExist) { //nolint:gosec // sandboxes of all users enter it
			return unavailable("make the folder of raw_exec sandboxes", err)
		}
	}
	if err := onlyRootWrites(l.folder); err != nil {
		return fmt.Errorf("%w: raw_exec: %w", runtime.ErrInvalid, err)
	}
	return nil
}

// make makes the folder of a sandbox in one step, if it does not exist. prepare comes
// before.
func (l links) make(order nodeapi.Order) error {
	final, temporary := l.paths(order.SessionID)
	if volume, err := os.Readlink(filepath.Join(final, nodeapi.Workspace)); err == nil {
		if volume != order.VolumeHostPath { // the session had another allocation
			return fmt.Errorf("%w: the session was given the volume %s", runtime.ErrConflict, volume)
		}
		return nil
	}
	err := removeLinks(temporary) // of a helper that was killed
	if err == nil {
		err = os.Mkdir(temporary, 0o755) //nolint:gosec // the user of the sandbox reads it
	}
	if err == nil {
		err = os.Symlink(order.VolumeHostPath, filepath.Join(temporary, nodeapi.Workspace))
	}
	if err == nil {
		err = writeSessionIn(temporary, sessionOf(order))
	}
	if err == nil {
		err = os.Rename(temporary, final)
	}
	return unavailable("make the folder of the sandbox", err)
}

// remove removes the folder of a sandbox that has ended.
func (l links) remove(sessionID string) error {
	final, temporary := l.paths(sessionID)
	return errors.Join(removeLinks(final), removeLinks(temporary))
}

func (l links) paths(sessionID string) (final, temporary string) {
	return filepath.Join(l.folder, sessionID), filepath.Join(l.folder, sessionID+".new")
}

// removeLinks removes a folder of a sandbox, if it exists. It names each thing that it
// removes, so that nothing of a volume can be among them.
func removeLinks(folder string) error {
	for _, name := range []string{nodeapi.Workspace, nodeapi.SessionFile, ""} {
		if err := os.Remove(filepath.Join(folder, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func writeSessionIn(folder string, session runtime.SessionFile) error {
	dir, err := os.Open(folder)
	if err != nil {
		return err
	}
	return errors.Join(writeSession(int(dir.Fd()), session), dir.Close())
}

func sessionOf(order nodeapi.Order) runtime.SessionFile {
	return runtime.SessionFile{SessionID: order.SessionID, ChatID: order.ChatID, AgentID: order.AgentID}
}
