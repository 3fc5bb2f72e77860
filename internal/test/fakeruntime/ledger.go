package fakeruntime

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/bivouac/bivouac/runtime"
)

// Running returns the sandboxes that really run, sorted by session ID. It
// includes sandboxes that the driver reports as lost.
func (d *Driver) Running() []runtime.Sandbox {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.runningOf("")
}

// runningOf returns the running sandboxes of the chat, or of all chats if the
// ID is empty. The caller holds the mutex.
func (d *Driver) runningOf(chatID string) []runtime.Sandbox {
	var running []runtime.Sandbox
	for _, s := range d.sandboxes {
		if s.runs && (chatID == "" || s.ChatID == chatID) {
			running = append(running, s.Sandbox)
		}
	}
	slices.SortFunc(running, func(a, b runtime.Sandbox) int { return cmp.Compare(a.SessionID, b.SessionID) })
	return running
}

// Created returns how many sandboxes were ever started.
func (d *Driver) Created() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.created
}

// MostPerChat returns the largest number of sandboxes that ever ran for one
// chat at the same time.
func (d *Driver) MostPerChat() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	most := 0
	for n := range maps.Values(d.most) {
		most = max(most, n)
	}
	return most
}

// Kill ends a sandbox without a call to the driver.
func (d *Driver) Kill(sessionID, reason string) {
	d.change(sessionID, func(s *sandbox) {
		s.runs = false
		s.State, s.Reason = runtime.StateDead, reason
	})
}

// Lose makes a sandbox lost. It continues to run.
func (d *Driver) Lose(sessionID, reason string) {
	d.change(sessionID, func(s *sandbox) { s.State, s.Reason = runtime.StateLost, reason })
}

// Regain makes a lost sandbox reachable again.
func (d *Driver) Regain(sessionID string) {
	d.change(sessionID, func(s *sandbox) { s.State, s.Reason = runtime.StateRunning, "" })
}

// Swap gives a sandbox another container ID, as if another container had
// replaced it.
func (d *Driver) Swap(sessionID, containerID string) {
	d.change(sessionID, func(s *sandbox) { s.ContainerID = containerID })
}

// Lag makes the driver report a sandbox as it was before it was seen to start.
func (d *Driver) Lag(sessionID string) {
	d.change(sessionID, func(s *sandbox) { s.State, s.ContainerID = runtime.StateStarting, "" })
}

// Plant starts a sandbox without a call to Create.
func (d *Driver) Plant(spec runtime.Spec) runtime.Sandbox {
	s, err := d.start(spec)
	if err != nil {
		panic(fmt.Sprintf("fakeruntime: plant: %v", err))
	}
	return s
}

// Forget ends a sandbox and removes it, so that the driver no longer knows it.
func (d *Driver) Forget(sessionID string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.must(sessionID).State = runtime.StateDead
	delete(d.sandboxes, sessionID)
	d.wake()
}

// Hide makes the driver forget a sandbox that still runs, as a purge does that
// does not wait for its end.
func (d *Driver) Hide(sessionID string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.must(sessionID).hid = true
}

// Edit changes what the driver reports about a sandbox.
func (d *Driver) Edit(sessionID string, edit func(*runtime.Sandbox)) {
	d.change(sessionID, func(s *sandbox) { edit(&s.Sandbox) })
}

// change changes a sandbox and notifies the watchers.
func (d *Driver) change(sessionID string, f func(*sandbox)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.must(sessionID)
	f(s)
	d.report(s.Sandbox)
}

// must returns a sandbox that must exist. The caller holds the mutex.
func (d *Driver) must(sessionID string) *sandbox {
	s, ok := d.sandboxes[sessionID]
	if !ok {
		panic(fmt.Sprintf("fakeruntime: no sandbox %s", sessionID))
	}
	return s
}

// Fail returns an interceptor that makes each call of op fail with err at the
// given moment, and no other call.
func Fail(op Op, moment Moment, err error) Interceptor {
	return func(_ context.Context, call Call) error {
		if call.Op == op && call.Moment == moment {
			return err
		}
		return nil
	}
}
