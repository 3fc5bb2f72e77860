package conformance_test

import (
	"context"
	"errors"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/bivouac/bivouac/runtime"
)

// Each wrong driver is a sound one with one fault in what it does with spares.
type (
	unvaried       struct{ sound }
	unpools        struct{ sound }
	predicts       struct{ sound }
	anonymous      struct{ sound }
	confuses       struct{ sound }
	unbound        struct{ sound }
	untold         struct{ sound }
	tellsEarly     struct{ sound }
	tellsCommands  struct{ sound }
	hidesTheFile   struct{ sound }
	claimsFirst    struct{ sound }
	bindsFirst     struct{ sound }
	claimsStopped  struct{ sound }
	claimsAny      struct{ sound }
	claimsPrefixes struct{ sound }
	claimsDead     struct{ sound }
	keepsClaimed   struct{ sound }
	removesVolumes struct{ sound }
	moody          struct {
		sound
		asked *atomic.Int64
	}
	passesOn struct {
		sound
		claiming *sync.Mutex
	}
	races struct {
		sound
		claiming *sync.Mutex
	}
	forgetsClaims struct {
		sound
		known *sync.Map // session IDs
	}
)

// edit changes a sandbox, if there is one.
func (d sound) edit(sessionID string, change func(*running)) {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if s, ok := d.m.sandboxes[sessionID]; ok {
		change(s)
	}
}

func (unvaried) Info(context.Context) (runtime.Info, error) {
	return runtime.Info{Name: "sound", Version: "1"}, nil
}

func (d moody) Info(context.Context) (runtime.Info, error) {
	return runtime.Info{Name: "sound", Version: "1", Variant: strconv.FormatInt(d.asked.Add(1), 10)}, nil
}

func (d unpools) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	made, err := d.sound.Create(ctx, spec, progress)
	d.edit(spec.SessionID, func(s *running) { s.Pool = "" })
	made.Pool = ""
	return made, err
}

func (d predicts) List(ctx context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		for s, err := range d.sound.List(ctx) {
			if s.ChatID == "" {
				s.ChatID = s.SessionID
			}
			if !yield(s, err) {
				return
			}
		}
	}
}

func (d anonymous) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	claimed, err := d.sound.Claim(ctx, spec)
	claimed.ChatID = ""
	return claimed, err
}

func (d confuses) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	claimed, err := d.sound.Claim(ctx, spec)
	if err == nil {
		d.edit(spec.SessionID, func(s *running) { s.ChatID = s.SessionID })
		claimed.ChatID = spec.ChatID
	}
	return claimed, err
}

func (d unbound) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	claimed, err := d.sound.Claim(ctx, spec)
	if err == nil {
		d.edit(spec.SessionID, func(s *running) { err = s.bind("empty") })
	}
	return claimed, err
}

func (d untold) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	claimed, err := d.sound.Claim(ctx, spec)
	if err == nil {
		d.edit(spec.SessionID, func(s *running) { err = os.RemoveAll(s.sessionFile()) })
	}
	return claimed, err
}

// Create writes the session file of a spare for a chat that does not come.
func (d tellsEarly) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	made, err := d.sound.Create(ctx, spec, progress)
	if err == nil && spec.Pool != "" {
		spec.ChatID = spec.SessionID
		d.edit(spec.SessionID, func(s *running) { err = s.tell(spec) })
	}
	return made, err
}

// with returns the command with one more variable.
func with(command runtime.Command, name, value string) runtime.Command {
	command.Env = maps.Clone(command.Env)
	if command.Env == nil {
		command.Env = map[string]string{}
	}
	command.Env[name] = value
	return command
}

func (d tellsCommands) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	d.edit(sessionID, func(s *running) { command = with(command, "BIVOUAC_CHAT_ID", s.ChatID) })
	return d.sound.Exec(ctx, sessionID, command, streams)
}

func (d hidesTheFile) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	return d.sound.Exec(ctx, sessionID, with(command, "BIVOUAC_SESSION_FILE", ""), streams)
}

func (d claimsFirst) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	claimed := false
	d.edit(spec.SessionID, func(s *running) { claimed = s.claim != nil })
	if claimed {
		return runtime.Sandbox{}, runtime.ErrConflict
	}
	return d.sound.Claim(ctx, spec)
}

// reclaim claims a sandbox, whoever has it.
func (d sound) reclaim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	d.edit(spec.SessionID, func(s *running) { s.claim = nil })
	return d.Claim(ctx, spec)
}

func (d passesOn) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	d.claiming.Lock()
	defer d.claiming.Unlock()
	return d.reclaim(ctx, spec)
}

// Claim refuses another chat after it has given that its volume.
func (d bindsFirst) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	claimed, err := d.sound.Claim(ctx, spec)
	if errors.Is(err, runtime.ErrConflict) {
		d.edit(spec.SessionID, func(s *running) {
			if s.claim != nil {
				err = errors.Join(err, s.bind(spec.VolumeHostPath))
			}
		})
	}
	return claimed, err
}

// Claim looks whether the spare is free, and takes it a little later.
func (d races) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	s, err := d.find(spec.SessionID)
	if err == nil {
		err = d.mayClaim(s, spec)
	}
	if err != nil {
		return runtime.Sandbox{}, err
	}
	<-time.After(200 * time.Millisecond)
	d.claiming.Lock()
	defer d.claiming.Unlock()
	return d.reclaim(ctx, spec)
}

func (d claimsStopped) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	claimed, err := d.sound.Claim(ctx, spec)
	d.edit(spec.SessionID, func(s *running) {
		if d.m.ended[spec.SessionID] {
			claimed, err = s.Sandbox, nil
		}
	})
	return claimed, err
}

func (d claimsAny) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	claimed, err := d.sound.Claim(ctx, spec)
	d.edit(spec.SessionID, func(s *running) {
		if s.dir == "" {
			claimed, err = s.Sandbox, nil
		}
	})
	return claimed, err
}

func (d claimsPrefixes) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	spec.SessionID = d.m.resolve(spec.SessionID)
	return d.sound.Claim(ctx, spec)
}

func (d claimsDead) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	claimed, err := d.sound.Claim(ctx, spec)
	d.edit(spec.SessionID, func(s *running) {
		if errors.Is(err, runtime.ErrNotReady) && s.State == runtime.StateDead {
			claimed, err = s.Sandbox, nil
		}
	})
	return claimed, err
}

// Stop lets a claimed sandbox run.
func (d keepsClaimed) Stop(ctx context.Context, sessionID string) error {
	claimed := false
	d.edit(sessionID, func(s *running) { claimed = s.claim != nil })
	if claimed {
		return nil
	}
	return d.sound.Stop(ctx, sessionID)
}

// Delete removes the files of the chat with those of the spare.
func (d removesVolumes) Delete(ctx context.Context, sessionID string) error {
	volume := ""
	d.edit(sessionID, func(s *running) {
		if s.claim != nil {
			volume = s.claim.VolumeHostPath
		}
	})
	err := d.sound.Delete(ctx, sessionID)
	if volume == "" {
		return err
	}
	files, globErr := filepath.Glob(filepath.Join(volume, ".*"))
	err = errors.Join(err, globErr)
	for _, file := range files {
		err = errors.Join(err, os.Remove(file))
	}
	return err
}

func (d forgetsClaims) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	d.known.Store(spec.SessionID, true)
	return d.sound.Create(ctx, spec, progress)
}

func (d forgetsClaims) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	if _, known := d.known.Load(spec.SessionID); !known {
		return d.reclaim(ctx, spec)
	}
	return d.sound.Claim(ctx, spec)
}
