// Package processplugin is a runtime plugin for tests and measurements, written
// like a third party would write one. Each sandbox is a process of this
// machine.
//
// It keeps no state in memory, so its process may be killed at any time. A file
// for each session records the request, and processes are found by a variable
// in their environment. It needs Linux's /proc.
package processplugin

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/ready"
)

// Plugin implements runtime.Driver, runtime.Claimer, runtime.Configurer and runtime.Watcher.
type Plugin struct {
	dir     string
	command []string
	mu      sync.Mutex // held while a session's files or process change
}

// record is the stored state of a sandbox. It is written without a PID before
// the process starts.
type record struct {
	Spec runtime.Spec
	Port uint16
	PID  int
	// Start is the start time of the process.
	Start string
}

// Info returns the plugin's name, version and configuration schema.
func (p *Plugin) Info(context.Context) (runtime.Info, error) {
	variant := fmt.Sprintf("%x", sha256.Sum256([]byte(strings.Join(p.command, "\x00"))))
	return runtime.Info{Name: "process-plugin", Version: "1", Variant: variant, ConfigSchema: json.RawMessage(
		`{"type": "object", "required": ["dir", "command"], "properties": {"dir": {"type": "string"}, "command": {"type": "array"}}}`)}, nil
}

// Configure accepts {"dir": DIRECTORY, "command": [PROGRAM, ARGUMENT...]}.
func (p *Plugin) Configure(_ context.Context, given runtime.Config) error {
	var config struct {
		Dir     string   `json:"dir"`
		Command []string `json:"command"`
	}
	decoder := json.NewDecoder(bytes.NewReader(given.JSON))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&config); err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	if !filepath.IsAbs(config.Dir) || len(config.Command) == 0 {
		return fmt.Errorf("%w: dir must be an absolute path, and command must not be empty", runtime.ErrInvalid)
	}
	p.dir, p.command = filepath.Join(config.Dir, given.Instance), config.Command
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	if !given.DropMarks {
		return nil
	}
	marks, err := filepath.Glob(filepath.Join(p.dir, "*.stopped"))
	for _, mark := range marks {
		err = errors.Join(err, os.Remove(mark))
	}
	return err
}

// Create starts the process and waits until it answers.
func (p *Plugin) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	progress(runtime.StagePlaced)
	r, err := p.start(spec)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	progress(runtime.StageStarted)
	waiting, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer cancel()
		for p.runs(r) && pause(waiting, 10*time.Millisecond) {
		}
	}()
	err = ready.Check{HTTPPath: "/healthz", WantSessionID: true}.Wait(waiting, p.view(r).Endpoint, spec.SessionID)
	switch {
	case p.stopped(spec.SessionID):
		return runtime.Sandbox{}, fmt.Errorf("%w: it was stopped", runtime.ErrConflict)
	case ctx.Err() != nil:
		return runtime.Sandbox{}, ctx.Err()
	case err != nil || !p.runs(r):
		return runtime.Sandbox{}, fmt.Errorf("%w: it has ended: %w", runtime.ErrNotReady, cmp.Or(err, errors.New("it was ready before")))
	}
	progress(runtime.StageReady)
	return p.view(r), nil
}

// start starts the process unless it was started before.
func (p *Plugin) start(spec runtime.Spec) (record, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped(spec.SessionID) {
		return record{}, fmt.Errorf("%w: it was stopped", runtime.ErrConflict)
	}
	r, err := p.load(spec.SessionID)
	switch {
	case errors.Is(err, runtime.ErrNotFound):
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return record{}, err
		}
		r = record{Spec: spec, Port: listener.Addr().(*net.TCPAddr).AddrPort().Port()}
		if err := errors.Join(listener.Close(), p.save(r)); err != nil {
			return record{}, err
		}
	case err != nil:
		return record{}, err
	case r.Spec.Pool != spec.Pool || r.Spec.ChatID != spec.ChatID || r.Spec.AgentID != spec.AgentID || r.Spec.VolumeHostPath != spec.VolumeHostPath:
		return record{}, fmt.Errorf("%w: it was created with another spec", runtime.ErrConflict)
	case r.PID != 0:
		return r, nil
	}
	if found := p.processes(spec.SessionID); len(found) > 0 { // a plugin started it and was killed before it saved the PID
		r.PID = found[0]
		r.Start, _ = startOf(r.PID)
		return r, p.save(r)
	}
	cmd := exec.Command(p.command[0], p.command[1:]...) // the sandbox outlives the call
	cmd.Dir = p.workspace(spec)
	cmd.Env = append(os.Environ(), p.mark(spec.SessionID), "PORT="+strconv.Itoa(int(r.Port)), "BIVOUAC_SESSION_ID="+spec.SessionID,
		"BIVOUAC_WORKSPACE="+p.workspace(spec), "BIVOUAC_ACCESS_TOKEN="+string(spec.AccessToken))
	if spec.Pool == "" {
		cmd.Env = append(cmd.Env, "BIVOUAC_CHAT_ID="+spec.ChatID, "BIVOUAC_AGENT_ID="+spec.AgentID)
	} else {
		cmd.Env = append(cmd.Env, "BIVOUAC_SESSION_FILE="+p.inSpare(spec.SessionID, sessionFile))
		if err := p.makeFolder(spec.SessionID); err != nil {
			return record{}, err
		}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return record{}, fmt.Errorf("%w: %w", runtime.ErrNotReady, err)
	}
	r.PID = cmd.Process.Pid
	r.Start, _ = startOf(r.PID)
	go func() { _ = cmd.Wait() }() // its result does not matter
	return r, p.save(r)
}

// Stop kills all processes of the sandbox.
func (p *Plugin) Stop(ctx context.Context, sessionID string) error {
	if err := uuid.Validate(sessionID); err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	p.mu.Lock()
	err := os.WriteFile(p.path(sessionID, ".stopped"), nil, 0o600)
	p.mu.Unlock()
	for err == nil {
		left := p.processes(sessionID)
		if len(left) == 0 {
			return nil
		}
		for _, pid := range left {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it fails if the process has ended
			for err == nil {
				if _, runs := startOf(pid); !runs {
					break
				}
				if !pause(ctx, 5*time.Millisecond) {
					err = fmt.Errorf("%w: process %d still runs", runtime.ErrNotStopped, pid)
				}
			}
		}
	}
	return err
}

// Delete stops the sandbox and removes its record.
func (p *Plugin) Delete(ctx context.Context, sessionID string) error {
	if err := p.Stop(ctx, sessionID); err != nil {
		return err
	}
	if err := os.RemoveAll(p.path(sessionID, spareExt)); err != nil { // without what the links lead to
		return err
	}
	_ = os.Remove(p.path(sessionID, ".json.new")) // left by a plugin that was killed while it saved
	if err := os.Remove(p.path(sessionID, ".json")); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Inspect returns the state of a sandbox.
func (p *Plugin) Inspect(_ context.Context, sessionID string) (runtime.Sandbox, error) {
	r, err := p.load(sessionID)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	return p.view(r), nil
}

// List yields the sandboxes that are not deleted.
func (p *Plugin) List(context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		files, err := filepath.Glob(p.path("*", ".json"))
		if err != nil {
			yield(runtime.Sandbox{}, err)
			return
		}
		for _, file := range files {
			r, err := p.load(strings.TrimSuffix(filepath.Base(file), ".json"))
			if errors.Is(err, runtime.ErrNotFound) {
				continue // it was deleted in the meantime
			}
			if !yield(p.view(r), err) || err != nil {
				return
			}
		}
	}
}

// Watch polls for changes every 20 ms.
func (p *Plugin) Watch(ctx context.Context, changed func(runtime.Sandbox)) error {
	seen := map[string]runtime.State{}
	for pause(ctx, 20*time.Millisecond) {
		for sandbox, err := range p.List(ctx) {
			if err == nil && seen[sandbox.SessionID] != sandbox.State {
				seen[sandbox.SessionID] = sandbox.State
				changed(sandbox)
			}
		}
	}
	return ctx.Err()
}

func (p *Plugin) view(r record) runtime.Sandbox {
	view := runtime.Sandbox{
		SessionID: r.Spec.SessionID, ChatID: r.Spec.ChatID, Pool: r.Spec.Pool, State: runtime.StateStarting,
		Endpoint: runtime.Endpoint{IP: netip.AddrFrom4([4]byte{127, 0, 0, 1}), Port: r.Port},
		AgentID:  r.Spec.AgentID, VolumeHostPath: r.Spec.VolumeHostPath, CreatedAt: r.Spec.CreatedAt, ExpiresAt: r.Spec.ExpiresAt,
	}
	if r.PID != 0 {
		view.ContainerID = strconv.Itoa(r.PID)
	}
	switch stopped := p.stopped(r.Spec.SessionID); {
	case p.runs(r):
		view.State = runtime.StateRunning
	case stopped:
		view.State, view.Reason = runtime.StateDead, "stopped"
	case r.PID != 0:
		view.State, view.Reason = runtime.StateDead, "it has ended"
	}
	return view
}

func (p *Plugin) path(sessionID, ext string) string { return filepath.Join(p.dir, sessionID+ext) }

func (p *Plugin) mark(sessionID string) string { return "PROCESS_PLUGIN=" + p.path(sessionID, "") }

func (p *Plugin) stopped(sessionID string) bool {
	_, err := os.Lstat(p.path(sessionID, ".stopped"))
	return err == nil
}

func (p *Plugin) load(sessionID string) (record, error) {
	if err := uuid.Validate(sessionID); err != nil {
		return record{}, fmt.Errorf("%w: %w", runtime.ErrNotFound, err)
	}
	text, err := os.ReadFile(p.path(sessionID, ".json"))
	if errors.Is(err, fs.ErrNotExist) {
		return record{}, fmt.Errorf("%w: %s", runtime.ErrNotFound, sessionID)
	}
	var r record
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	return r, err
}

func (p *Plugin) save(r record) error {
	text, err := json.Marshal(r)
	path := p.path(r.Spec.SessionID, ".json")
	if err == nil {
		err = os.WriteFile(path+".new", text, 0o600)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	return err
}

// runs reports whether the sandbox's first process still runs.
func (p *Plugin) runs(r record) bool {
	start, runs := startOf(r.PID)
	return runs && start == r.Start
}

// startOf reports whether a process or one of its threads runs, and when it was
// started. The PID alone is not enough, because it may have been reused.
func startOf(pid int) (string, bool) {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return "", false
	}
	const state, threads, start = 0, 17, 19 // positions after the program's name
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) <= start || fields[state] == "X" || fields[state] == "Z" && fields[threads] <= "1" {
		return "", false
	}
	return fields[start], true
}

// processes finds the processes of a sandbox.
func (p *Plugin) processes(sessionID string) []int {
	var found []int
	if r, err := p.load(sessionID); err == nil && p.runs(r) {
		found = append(found, r.PID)
	}
	all, _ := filepath.Glob("/proc/[0-9]*") // the pattern is well formed
	for _, path := range all {
		pid, err := strconv.Atoi(filepath.Base(path))
		environ, environErr := os.ReadFile(filepath.Join(path, "environ"))
		if err == nil && environErr == nil && bytes.Contains(environ, []byte(p.mark(sessionID)+"\x00")) {
			found = append(found, pid)
		}
	}
	return found
}

// pause waits for d. It returns false if ctx is done first.
func pause(ctx context.Context, d time.Duration) bool { return backoff.Sleep(ctx, d) == nil }
