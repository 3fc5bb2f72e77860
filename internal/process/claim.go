package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/bivouac/bivouac/runtime"
)

// A spare has a folder, named by its session ID and an extension. Its workspace is a
// symbolic link there, which leads to an empty folder, and to the chat's volume once the
// spare is claimed.
const (
	spareExt = ".spare"

	workspaceLink = "workspace"
	emptyFolder   = "empty"
	sessionFile   = "session.json" // exists once the spare is claimed
)

// isSpare reports whether the sandbox was started as a spare. It stays one when it is
// claimed, because its environment does.
func (sb *sandbox) isSpare() bool { return sb.spec.Pool != "" }

func spareFolder(sessionID string) string { return sessionID + spareExt }

// sparePath returns the path of a file in a spare's folder.
func (d *Driver) sparePath(sb *sandbox, name string) string {
	return filepath.Join(d.dir, spareFolder(sb.spec.SessionID), name)
}

// workspace returns the path at which the sandbox finds its volume.
func (d *Driver) workspace(sb *sandbox) string {
	if sb.isSpare() {
		return d.sparePath(sb, workspaceLink)
	}
	return sb.spec.VolumeHostPath
}

// makeSpareFolder makes the folder of a spare that is about to be started. Some of it may
// be there already.
func (d *Driver) makeSpareFolder(sb *sandbox) error {
	folder := spareFolder(sb.spec.SessionID)
	for _, err := range []error{
		d.folder.Mkdir(folder, 0o700),
		d.folder.Mkdir(filepath.Join(folder, emptyFolder), 0o700),
		d.folder.Symlink(emptyFolder, filepath.Join(folder, workspaceLink)),
	} {
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// Claim gives a spare to a chat. It writes the session file, and then replaces the link
// that is the spare's workspace. A process keeps its working directory, so what was
// started in the workspace has to change to it once more.
func (d *Driver) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	sb, err := d.claim(ctx, spec)
	return handOut("claim", spec, sb, err)
}

func (d *Driver) claim(ctx context.Context, spec runtime.Spec) (*sandbox, error) {
	if spec.Pool != "" {
		return nil, fmt.Errorf("%w: it is for pool %q, and a claim is for a chat", runtime.ErrInvalid, spec.Pool)
	}
	if err := spec.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	if err := d.checkSpec(spec); err != nil {
		return nil, err
	}
	d.mu.Lock()
	sb, ok := d.sandboxes[spec.SessionID]
	d.mu.Unlock()
	switch {
	case !ok:
		return nil, runtime.ErrNotFound
	case !sb.isSpare():
		return nil, fmt.Errorf("%w: it is not a spare", runtime.ErrConflict)
	case sb.spec.AccessToken != spec.AccessToken:
		return nil, fmt.Errorf("%w: it has another access token", runtime.ErrConflict)
	}
	sb.mu.Lock()
	err := sb.canServe(spec)
	sb.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if err := readyCheck().Once(ctx, sb.endpoint(), spec.SessionID); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("%w: %w", runtime.ErrNotReady, err)
	}
	if err := d.bind(sb, spec); err != nil {
		return nil, err
	}
	d.notify(spec.SessionID)
	return sb, nil
}

// canServe returns an error if a chat cannot have the spare. The caller must hold sb.mu.
func (sb *sandbox) canServe(spec runtime.Spec) error {
	switch {
	case sb.stopped:
		return errStopped
	case sb.claim != nil && !sameSpec(*sb.claim, spec):
		return fmt.Errorf("%w: it was claimed with another spec", runtime.ErrConflict)
	case sb.ended:
		return fmt.Errorf("%w: it has ended: %s", runtime.ErrNotReady, sb.reason)
	case !sb.ready:
		return fmt.Errorf("%w: it has not answered yet", runtime.ErrNotReady)
	}
	return nil
}

// bind gives a spare to its chat, unless it has one. The spare keeps its lock, so that a
// Stop cannot come between, and no file appears after a Delete.
func (d *Driver) bind(sb *sandbox, spec runtime.Spec) error {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if err := sb.canServe(spec); err != nil || sb.claim != nil {
		return err
	}
	text, err := json.Marshal(spec.SessionFile())
	replace := func(name string, write func(name string) error) {
		name = filepath.Join(spareFolder(spec.SessionID), name)
		if err == nil {
			err = remove(d.folder, name+".new") // left by a claim that failed
		}
		if err == nil {
			err = write(name + ".new")
		}
		if err == nil {
			err = d.folder.Rename(name+".new", name)
		}
	}
	replace(sessionFile, func(name string) error { return d.folder.WriteFile(name, text, 0o600) })
	replace(workspaceLink, func(name string) error { return d.folder.Symlink(spec.VolumeHostPath, name) })
	if err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
	}
	sb.claim = &spec
	sb.note("claimed by chat %s", spec.ChatID)
	return nil
}
