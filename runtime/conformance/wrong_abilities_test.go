package conformance_test

import (
	"context"
	"errors"
	"io"
	"iter"
	"slices"
	"sync"
	"syscall"

	"github.com/bivouac/bivouac/runtime"
)

// Each wrong driver is a sound one with one fault in an ability.
type (
	repeats        struct{ sound }
	miscounts      struct{ sound }
	tidies         struct{ sound }
	rewinds        struct{ sound }
	looksOnce      struct{ sound }
	mourns         struct{ sound }
	followsOn      struct{ sound }
	silent         struct{ sound }
	lenient        struct{ sound }
	mixes          struct{ sound }
	expectant      struct{ sound }
	bare           struct{ sound }
	rigid          struct{ sound }
	shell          struct{ sound }
	walksOff       struct{ sound }
	sparesChildren struct{ sound }
	bequeaths      struct{ sound }
	sweeps         struct{ sound }
	disowns        struct{ sound }
	discreet       struct{ sound }
	makesUp        struct{ sound }
	narrow         struct {
		sound
		busy *sync.Mutex
	}
)

// Logs yields standard error as standard output as well.
func (d repeats) Logs(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	s, err := d.find(sessionID)
	if err != nil || query.Stream != runtime.Stdout {
		return d.sound.Logs(ctx, sessionID, query)
	}
	d.m.mu.Lock()
	stderr := slices.Clone(s.output[runtime.Stderr])
	d.m.mu.Unlock()
	return func(yield func(runtime.LogChunk, error) bool) {
		var next int64
		for chunk, err := range d.sound.Logs(ctx, sessionID, query) {
			next = chunk.Offset + int64(len(chunk.Data))
			if !yield(chunk, err) {
				return
			}
		}
		if len(stderr) > 0 {
			yield(runtime.LogChunk{Stream: runtime.Stdout, Offset: next, Data: stderr}, nil)
		}
	}
}

// Logs yields halves with the offset of the whole.
func (d miscounts) Logs(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	return func(yield func(runtime.LogChunk, error) bool) {
		for chunk, err := range d.sound.Logs(ctx, sessionID, query) {
			if len(chunk.Data) < 10_000 {
				if !yield(chunk, err) {
					return
				}
				continue
			}
			whole := chunk.Data
			for half := range slices.Chunk(whole, len(whole)/2+1) {
				chunk.Data = half
				if !yield(chunk, nil) {
					return
				}
			}
		}
	}
}

func (d tidies) Logs(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	found, err := d.Inspect(ctx, sessionID)
	if err == nil && found.Reason == "stopped" {
		return d.sound.Logs(ctx, "", query)
	}
	return d.sound.Logs(ctx, sessionID, query)
}

func (d rewinds) Logs(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	query.Offset = 0
	return d.sound.Logs(ctx, sessionID, query)
}

func (d looksOnce) Logs(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	if !query.Follow {
		return d.sound.Logs(ctx, sessionID, query)
	}
	return func(yield func(runtime.LogChunk, error) bool) {
		query.Follow = false
		for chunk, err := range d.sound.Logs(ctx, sessionID, query) {
			if !yield(chunk, err) {
				return
			}
		}
		<-ctx.Done()
	}
}

func (d mourns) Logs(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	return func(yield func(runtime.LogChunk, error) bool) {
		for chunk, err := range d.sound.Logs(ctx, sessionID, query) {
			if !yield(chunk, err) {
				return
			}
		}
		if query.Follow {
			<-ctx.Done()
		}
	}
}

func (d followsOn) Logs(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	return d.sound.Logs(context.WithoutCancel(ctx), sessionID, query)
}

func (d silent) Logs(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	return func(yield func(runtime.LogChunk, error) bool) {
		for chunk, err := range d.sound.Logs(ctx, sessionID, query) {
			if errors.Is(err, runtime.ErrNotFound) || !yield(chunk, err) {
				return
			}
		}
	}
}

func (d lenient) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	_, err := d.sound.Exec(ctx, sessionID, command, streams)
	return 0, err
}

func (d mixes) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	streams.Stderr = streams.Stdout
	return d.sound.Exec(ctx, sessionID, command, streams)
}

// Exec lets a command without input wait for one.
func (d expectant) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	if streams.Stdin == nil {
		endless, end := io.Pipe()
		defer end.Close()
		streams.Stdin = endless
	}
	return d.sound.Exec(ctx, sessionID, command, streams)
}

func (d bare) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	command.Env = nil
	return d.sound.Exec(ctx, sessionID, command, streams)
}

func (d rigid) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	streams.Resize = nil
	return d.sound.Exec(ctx, sessionID, command, streams)
}

func (d narrow) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	if !d.busy.TryLock() {
		return 0, runtime.ErrUnavailable
	}
	defer d.busy.Unlock()
	return d.sound.Exec(ctx, sessionID, command, streams)
}

func (d shell) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	code, err := d.sound.Exec(ctx, sessionID, command, streams)
	if errors.Is(err, runtime.ErrInvalid) {
		return 127, nil
	}
	return code, err
}

// Exec returns when its context ends, and lets the command run.
func (d walksOff) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	type result struct {
		code int
		err  error
	}
	ended := make(chan result, 1)
	go func() {
		code, err := d.sound.Exec(context.WithoutCancel(ctx), sessionID, command, streams)
		ended <- result{code, err}
	}()
	select {
	case r := <-ended:
		return r.code, r.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

func (d sparesChildren) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	return d.exec(ctx, sessionID, command, streams, func(pid int) error { return syscall.Kill(pid, syscall.SIGKILL) })
}

// Exec runs a command that does not notice that the driver has died.
func (d bequeaths) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	immortal := d.sound
	immortal.dead = context.Background()
	type result struct {
		code int
		err  error
	}
	ended := make(chan result, 1)
	go func() {
		code, err := immortal.Exec(ctx, sessionID, command, streams)
		ended <- result{code, err}
	}()
	select {
	case r := <-ended:
		return r.code, r.err
	case <-d.dead.Done():
		return 0, runtime.ErrUnavailable
	}
}

// Exec kills the process group of a command also after it has ended by itself.
func (d sweeps) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	code, err := d.sound.Exec(ctx, sessionID, command, streams)
	s, findErr := d.find(sessionID)
	if findErr != nil {
		return code, err
	}
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	for _, group := range s.groups {
		if syscall.Kill(group, 0) != nil { // the command itself has ended
			_ = killGroup(group) // it fails if the group is empty
		}
	}
	return code, err
}

// Stop ends the sandbox without what commands have left.
func (d disowns) Stop(ctx context.Context, sessionID string) error {
	s, err := d.find(sessionID)
	if err != nil {
		return d.sound.Stop(ctx, sessionID)
	}
	d.m.mu.Lock()
	left := s.groups
	s.groups = nil
	d.m.mu.Unlock()
	err = d.sound.Stop(ctx, sessionID)
	d.m.mu.Lock()
	s.groups = left
	d.m.mu.Unlock()
	return err
}

func (d disowns) Delete(ctx context.Context, sessionID string) error {
	if s, err := d.find(sessionID); err == nil {
		d.m.killCommands(s)
	}
	return d.sound.Delete(ctx, sessionID)
}

func (d discreet) Explain(ctx context.Context, sessionID string) ([]runtime.Happening, error) {
	told, err := d.sound.Explain(ctx, sessionID)
	return told[:min(len(told), 1)], err
}

func (d makesUp) Explain(ctx context.Context, sessionID string) ([]runtime.Happening, error) {
	told, err := d.sound.Explain(ctx, sessionID)
	if errors.Is(err, runtime.ErrNotFound) {
		return []runtime.Happening{{Text: "it was never here"}}, nil
	}
	return told, err
}
