package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"strconv"
	"time"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/ready"
	"github.com/hashicorp/go-hclog"
)

const (
	readyLimit = time.Minute     // from the sandbox's start to its answer
	stopGrace  = 5 * time.Second // from SIGTERM to SIGKILL
)

// driver keeps its state in files, so that the plugin may end and start again at any time.
type driver struct {
	logger  hclog.Logger
	config  config
	self    string // this program, which is also the first process of each sandbox
	records records
	ready   ready.Check
}

// Create starts a sandbox, and waits until it answers.
func (d *driver) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	if _, err := os.Stat(spec.VolumeHostPath); err != nil {
		return runtime.Sandbox{}, fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	started, err := d.begin(ctx, spec)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	progress(runtime.StagePlaced)
	progress(runtime.StageStarted)
	if err := d.awaitReady(ctx, started); err != nil {
		return runtime.Sandbox{}, err
	}
	sandbox, err := d.noteReady(ctx, spec.SessionID)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	progress(runtime.StageReady)
	d.logger.Debug("sandbox_ready", "session_id", spec.SessionID, "pid", started.Process.PID)
	return sandbox, nil
}

// begin starts the sandbox, or finds the one that was started.
func (d *driver) begin(ctx context.Context, spec runtime.Spec) (record, error) {
	unlock, err := d.records.lock(ctx, spec.SessionID)
	if err != nil {
		return record{}, err
	}
	defer unlock()
	known, err := d.records.load(spec.SessionID)
	switch {
	case err != nil:
		return record{}, err
	case ctx.Err() != nil:
		return record{}, ctx.Err()
	case known.Ended:
		return record{}, fmt.Errorf("%w: session %s was stopped", runtime.ErrConflict, spec.SessionID)
	case known.Spec.SessionID != "" && !same(known.Spec, spec):
		return record{}, fmt.Errorf("%w: session %s has another spec", runtime.ErrConflict, spec.SessionID)
	case known.Process.PID != 0:
		return known, nil
	}
	// If there is a record without a process, an earlier try ended before its command
	// could run.
	started := record{Spec: spec}
	if err := d.records.save(spec.SessionID, started); err != nil {
		return record{}, err
	}
	waiting, err := d.start(ctx, spec)
	if ctx.Err() != nil && err != nil {
		return record{}, ctx.Err()
	}
	if err != nil {
		return record{}, fmt.Errorf("%w: %w", runtime.ErrNotReady, err)
	}
	defer waiting.close()
	started.Process, started.Endpoint = waiting.process, waiting.endpoint
	if err := d.records.save(spec.SessionID, started); err != nil {
		return record{}, err
	}
	return started, waiting.letRun()
}

// same compares specs without their times, which may differ in a repeated Create.
func same(a, b runtime.Spec) bool {
	return a.ChatID == b.ChatID && a.AgentID == b.AgentID && a.VolumeHostPath == b.VolumeHostPath
}

// awaitReady waits until the sandbox answers, or has ended.
func (d *driver) awaitReady(ctx context.Context, started record) error {
	waiting, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	answered := make(chan struct{})
	var err error
	go func() {
		defer close(answered)
		err = d.ready.Wait(waiting, started.Endpoint, started.Spec.SessionID)
	}()
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for {
		select {
		case <-answered:
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return err
		case <-look.C:
			if !started.Process.runs() {
				cancel()
				<-answered
				return fmt.Errorf("%w: its process has ended: %s", runtime.ErrNotReady, d.records.lastWords(started.Spec.SessionID))
			}
		}
	}
}

func (d *driver) noteReady(ctx context.Context, sessionID string) (runtime.Sandbox, error) {
	unlock, err := d.records.lock(ctx, sessionID)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	defer unlock()
	known, err := d.records.load(sessionID)
	switch {
	case err != nil:
		return runtime.Sandbox{}, err
	case known.Ended:
		return runtime.Sandbox{}, fmt.Errorf("%w: session %s was stopped while it started", runtime.ErrConflict, sessionID)
	}
	known.Ready = true
	made := known.sandbox()
	if made.State != runtime.StateRunning {
		return runtime.Sandbox{}, fmt.Errorf("%w: it has ended since it answered: %s", runtime.ErrNotReady, made.Reason)
	}
	return made, d.records.save(sessionID, known)
}

// Stop ends the sandbox and keeps its record.
func (d *driver) Stop(ctx context.Context, sessionID string) error {
	return d.end(ctx, sessionID, func(*record) {})
}

// Delete ends the sandbox, and keeps only a mark of its session ID.
func (d *driver) Delete(ctx context.Context, sessionID string) error {
	return d.end(ctx, sessionID, func(r *record) { *r = record{Ended: true, Deleted: true} })
}

func (d *driver) end(ctx context.Context, sessionID string, then func(*record)) error {
	unlock, err := d.records.lock(ctx, sessionID)
	if err != nil {
		return err
	}
	defer unlock()
	known, err := d.records.load(sessionID)
	if err != nil {
		return err
	}
	if !known.Ended {
		known.Ended = true
		if known.Reason = "stopped"; known.Process.PID != 0 && !known.Process.runs() {
			known.Reason = "its process has ended"
		}
		if err := d.records.save(sessionID, known); err != nil {
			return err
		}
	}
	if err := known.Process.end(ctx, stopGrace); err != nil {
		return fmt.Errorf("%w: end process %d: %w", runtime.ErrUnavailable, known.Process.PID, err)
	}
	// There may also be a process that a plugin had no time to record. It ends by itself,
	// because nobody opens its gate.
	if err := d.records.awaitSilence(ctx, sessionID); err != nil {
		return fmt.Errorf("%w: wait for the end of bwrap: %w", runtime.ErrUnavailable, err)
	}
	then(&known)
	return errors.Join(d.records.save(sessionID, known), d.records.removeOutput(sessionID))
}

// Inspect reads the record and looks at the process.
func (d *driver) Inspect(_ context.Context, sessionID string) (runtime.Sandbox, error) {
	known, err := d.records.load(sessionID)
	switch {
	case err != nil:
		return runtime.Sandbox{}, err
	case known.Spec.SessionID == "":
		return runtime.Sandbox{}, fmt.Errorf("%w: session %s", runtime.ErrNotFound, sessionID)
	}
	return known.sandbox(), nil
}

func (r record) sandbox() runtime.Sandbox {
	sandbox := runtime.Sandbox{
		SessionID:   r.Spec.SessionID,
		ChatID:      r.Spec.ChatID,
		ContainerID: strconv.Itoa(r.Process.PID) + "-" + r.Spec.SessionID,
		Endpoint:    r.Endpoint,
		State:       runtime.StateRunning,
	}
	switch {
	case r.Process.PID == 0 && !r.Ended:
		sandbox.State = runtime.StateStarting
	case !r.Process.runs():
		sandbox.State, sandbox.Reason = runtime.StateDead, r.Reason
		if sandbox.Reason == "" {
			sandbox.Reason = "its process has ended"
		}
	case !r.Ready:
		sandbox.State = runtime.StateStarting
	}
	return sandbox
}

// List yields the sandboxes of all records. It also removes old records of deleted
// sandboxes.
func (d *driver) List(context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		ids, err := d.records.all()
		if err != nil {
			yield(runtime.Sandbox{}, err)
			return
		}
		for _, id := range ids {
			known, err := d.records.load(id)
			if err == nil && known.Deleted {
				err = d.records.expire(id)
			}
			if err != nil {
				yield(runtime.Sandbox{}, err)
				return
			}
			if known.Spec.SessionID != "" && !yield(known.sandbox(), nil) {
				return
			}
		}
	}
}
