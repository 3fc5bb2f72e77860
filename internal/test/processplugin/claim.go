package processplugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/ready"
)

// A spare has a folder. Its workspace is a symbolic link there, which leads to an empty
// folder until the spare is claimed. The file with the session exists from then on.
const (
	spareExt      = ".spare"
	workspaceLink = "workspace"
	emptyFolder   = "empty"
	sessionFile   = "session.json"
	claimFile     = "claim.json" // the spec of the claim

	claimLimit = 3 * time.Second // from the claim to the sandbox's answer
)

// inSpare returns the path of a file in the folder of a spare.
func (p *Plugin) inSpare(sessionID, name string) string {
	return filepath.Join(p.path(sessionID, spareExt), name)
}

// workspace returns where a sandbox finds its volume.
func (p *Plugin) workspace(spec runtime.Spec) string {
	if spec.Pool == "" {
		return spec.VolumeHostPath
	}
	return p.inSpare(spec.SessionID, workspaceLink)
}

// makeFolder makes the folder of a spare. Some of it may be there already.
func (p *Plugin) makeFolder(sessionID string) error {
	if err := os.MkdirAll(p.inSpare(sessionID, emptyFolder), 0o700); err != nil {
		return err
	}
	if err := os.Symlink(emptyFolder, p.inSpare(sessionID, workspaceLink)); !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// Claim points the spare's workspace at the volume, and writes its session file.
func (p *Plugin) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	r, err := p.claim(spec)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, claimLimit)
	defer cancel()
	if err := (ready.Check{HTTPPath: "/healthz", WantSessionID: true}).Wait(ctx, p.view(r).Endpoint, spec.SessionID); err != nil {
		return runtime.Sandbox{}, fmt.Errorf("%w: %w", runtime.ErrNotReady, err)
	}
	claimed := p.view(r)
	claimed.ChatID = spec.ChatID
	return claimed, nil
}

func (p *Plugin) claim(spec runtime.Spec) (record, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r, err := p.load(spec.SessionID)
	switch {
	case err != nil:
		return record{}, err
	case r.Spec.Pool == "":
		return record{}, fmt.Errorf("%w: it is not a spare", runtime.ErrConflict)
	case p.stopped(spec.SessionID):
		return record{}, fmt.Errorf("%w: it was stopped", runtime.ErrConflict)
	case !p.runs(r):
		return record{}, fmt.Errorf("%w: it has ended", runtime.ErrNotReady)
	}
	if info, err := os.Stat(spec.VolumeHostPath); err != nil || !info.IsDir() {
		return record{}, fmt.Errorf("%w: volume %s is not a folder", runtime.ErrInvalid, spec.VolumeHostPath)
	}
	if err := p.take(spec); err != nil {
		return record{}, err
	}
	session, err := json.Marshal(spec.SessionFile())
	if err == nil {
		err = replace(p.inSpare(spec.SessionID, sessionFile), func(path string) error { return os.WriteFile(path, session, 0o600) })
	}
	if err == nil {
		err = replace(p.workspace(r.Spec), func(path string) error { return os.Symlink(spec.VolumeHostPath, path) })
	}
	return r, err
}

// take writes down what the spare was claimed with, unless it was claimed before.
func (p *Plugin) take(spec runtime.Spec) error {
	path := p.inSpare(spec.SessionID, claimFile)
	text, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	next, err := os.CreateTemp(filepath.Dir(path), claimFile+".*") // once linked, it must not be written to again
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(next.Name()) }()
	if _, err := next.Write(text); err != nil {
		return errors.Join(err, next.Close())
	}
	if err := next.Close(); err != nil {
		return err
	}
	if err := os.Link(next.Name(), path); !errors.Is(err, fs.ErrExist) {
		return err
	}
	var taken runtime.Spec
	text, err = os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &taken)
	}
	if err == nil && (taken.ChatID != spec.ChatID || taken.AgentID != spec.AgentID || taken.VolumeHostPath != spec.VolumeHostPath) {
		err = fmt.Errorf("%w: it was claimed with another spec", runtime.ErrConflict)
	}
	return err
}

// replace makes a file beside path and puts it there.
func replace(path string, create func(path string) error) error {
	next := path + ".new"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) { // left by a plugin that was killed
		return err
	}
	if err := create(next); err != nil {
		return err
	}
	return os.Rename(next, path)
}
