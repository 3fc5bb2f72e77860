package conformance_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/ready"
)

// prepare makes the folder of a spare.
func (s *running) prepare() (err error) {
	if s.spec.Pool == "" {
		return nil
	}
	s.dir, err = os.MkdirTemp("", "bivouac-conformance-spare-")
	return errors.Join(err, os.Mkdir(filepath.Join(s.dir, "empty"), 0o700), os.Symlink("empty", s.workspace()))
}

func (s *running) workspace() string {
	if s.dir == "" {
		return s.spec.VolumeHostPath
	}
	return filepath.Join(s.dir, "workspace")
}

func (s *running) sessionFile() string {
	if s.dir == "" {
		return ""
	}
	return filepath.Join(s.dir, "session.json")
}

func (d sound) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	s, err := d.find(spec.SessionID)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	if err := d.mayClaim(s, spec); err != nil {
		return runtime.Sandbox{}, err
	}
	if err := (ready.Check{HTTPPath: "/healthz", WantSessionID: true}).Once(ctx, s.Endpoint, spec.SessionID); err != nil {
		return runtime.Sandbox{}, errors.Join(runtime.ErrNotReady, err)
	}
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if err := s.mayBeClaimed(spec, d.m.ended[spec.SessionID]); err != nil {
		return runtime.Sandbox{}, err
	}
	if s.claim != nil {
		return s.Sandbox, nil
	}
	s.claim = &spec
	s.ChatID = spec.ChatID
	return s.Sandbox, errors.Join(s.tell(spec), s.bind(spec.VolumeHostPath))
}

func (d sound) mayClaim(s *running, spec runtime.Spec) error {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	return s.mayBeClaimed(spec, d.m.ended[spec.SessionID])
}

func (s *running) mayBeClaimed(spec runtime.Spec, stopped bool) error {
	switch {
	case stopped, s.dir == "", s.claim != nil && !reflect.DeepEqual(*s.claim, spec):
		return runtime.ErrConflict
	case s.State != runtime.StateRunning:
		return runtime.ErrNotReady
	}
	return nil
}

// tell writes the session file.
func (s *running) tell(spec runtime.Spec) error {
	text, err := json.Marshal(map[string]string{"session_id": spec.SessionID, "chat_id": spec.ChatID, "agent_id": spec.AgentID})
	return errors.Join(err, os.WriteFile(s.sessionFile(), text, 0o600))
}

// bind gives a spare its volume.
func (s *running) bind(volume string) error {
	return errors.Join(os.Remove(s.workspace()), os.Symlink(volume, s.workspace()))
}
