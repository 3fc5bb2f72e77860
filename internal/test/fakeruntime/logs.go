package fakeruntime

import (
	"bytes"
	"context"
	"fmt"
	"iter"

	"github.com/bivouac/bivouac/runtime"
)

// Print makes a sandbox print text.
func (d *Driver) Print(sessionID string, stream runtime.LogStream, text string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if s, ok := d.sandboxes[sessionID]; ok {
		if s.printed == nil {
			s.printed = make(map[runtime.LogStream][]byte)
		}
		s.printed[stream] = append(s.printed[stream], text...)
		d.wake()
	}
}

// wake wakes the followers of logs. The caller holds the mutex.
func (d *Driver) wake() {
	close(d.news)
	d.news = make(chan struct{})
}

// Logs implements [runtime.LogReader]. It yields at most 64 KiB at a time. A sandbox has
// one task, "main".
func (d *Driver) Logs(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	return func(yield func(runtime.LogChunk, error) bool) {
		if err := d.readLog(ctx, sessionID, query, yield); err != nil {
			yield(runtime.LogChunk{}, err)
		}
	}
}

// readLog returns an error that is to be yielded.
func (d *Driver) readLog(ctx context.Context, sessionID string, query runtime.LogQuery, yield func(runtime.LogChunk, error) bool) error {
	if err := d.ask(ctx, OpLogs, sessionID, Before); err != nil {
		return err
	}
	d.mu.Lock()
	s, ok := d.sandboxes[sessionID]
	d.mu.Unlock()
	switch {
	case !ok || s.hid:
		return fmt.Errorf("%w: %s", runtime.ErrNotFound, sessionID)
	case query.Task != "" && query.Task != "main":
		return fmt.Errorf("%w: unknown task %q (available: main)", runtime.ErrInvalid, query.Task)
	}
	next := int64(-1)
	for ctx.Err() == nil {
		d.mu.Lock()
		text, news, ended := s.printed[query.Stream], d.news, s.State == runtime.StateDead
		end := int64(len(text))
		if next < 0 {
			if next = min(query.Offset, end); next < 0 {
				next = max(0, end+next)
			}
		}
		chunk := runtime.LogChunk{Stream: query.Stream, Offset: next, Data: bytes.Clone(text[next:min(end, next+64<<10)])}
		d.mu.Unlock()
		next += int64(len(chunk.Data))
		switch {
		case len(chunk.Data) > 0:
			if !yield(chunk, nil) {
				return nil
			}
			continue
		case ended || !query.Follow:
			return d.ask(ctx, OpLogs, sessionID, After)
		}
		select {
		case <-news:
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}
