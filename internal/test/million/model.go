package main

import (
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

// modelName is the name of the model's runtime.
const modelName = "model"

// model is a driver whose sandboxes do not exist. The first ones stand from the start, one
// for each standing session. Others start and end at once.
type model struct {
	mu       sync.Mutex
	standing uint32
	created  map[string]runtime.Sandbox // by session ID
	ended    map[string]struct{}        // session IDs
}

// Info implements [runtime.Driver].
func (m *model) Info(context.Context) (runtime.Info, error) {
	return runtime.Info{Name: modelName, Version: "1"}, nil
}

// Configure accepts {"standing": NUMBER}.
func (m *model) Configure(_ context.Context, given runtime.Config) error {
	var config struct {
		Standing uint32 `json:"standing"`
	}
	if err := json.Unmarshal(given.JSON, &config); err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	m.standing = config.Standing
	m.created, m.ended = make(map[string]runtime.Sandbox), make(map[string]struct{})
	return nil
}

// Create implements [runtime.Driver].
func (m *model) Create(_ context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	progress(runtime.StageReady)
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ended := m.ended[spec.SessionID]; ended {
		return runtime.Sandbox{}, fmt.Errorf("%w: it was stopped", runtime.ErrConflict)
	}
	if sandbox, ok := m.find(spec.SessionID); ok {
		return sandbox, nil
	}
	sandbox := runtime.Sandbox{
		SessionID: spec.SessionID, ChatID: spec.ChatID, ContainerID: uuid.NewString(),
		Endpoint: runtime.Endpoint{IP: netip.AddrFrom4([4]byte{127, 0, 0, 1}), Port: 8080}, State: runtime.StateRunning,
	}
	m.created[spec.SessionID] = sandbox
	return sandbox, nil
}

// find returns a sandbox that has not ended. The caller holds mu.
func (m *model) find(sessionID string) (runtime.Sandbox, bool) {
	if sandbox, ok := m.created[sessionID]; ok {
		return sandbox, true
	}
	i, ok := indexOf(sessionID)
	if _, ended := m.ended[sessionID]; !ok || ended || i >= m.standing {
		return runtime.Sandbox{}, false
	}
	return sandboxOf(i), true
}

// Stop implements [runtime.Driver].
func (m *model) Stop(_ context.Context, sessionID string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.created, sessionID)
	m.ended[sessionID] = struct{}{}
	return nil
}

// Delete implements [runtime.Driver].
func (m *model) Delete(ctx context.Context, sessionID string) error { return m.Stop(ctx, sessionID) }

// Inspect implements [runtime.Driver].
func (m *model) Inspect(_ context.Context, sessionID string) (runtime.Sandbox, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	sandbox, ok := m.find(sessionID)
	if !ok {
		return runtime.Sandbox{}, fmt.Errorf("session %s: %w", sessionID, runtime.ErrNotFound)
	}
	return sandbox, nil
}

// List implements [runtime.Driver].
func (m *model) List(context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		m.mu.Lock()
		created, ended := slices.Collect(maps.Values(m.created)), maps.Clone(m.ended)
		m.mu.Unlock()
		for i := range m.standing {
			sandbox := sandboxOf(i)
			if _, ok := ended[sandbox.SessionID]; !ok && !yield(sandbox, nil) {
				return
			}
		}
		for _, sandbox := range created {
			if !yield(sandbox, nil) {
				return
			}
		}
	}
}
