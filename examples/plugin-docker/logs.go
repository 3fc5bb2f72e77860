package main

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/bivouac/bivouac/runtime"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/client"
)

// Logs yields the output that the engine has kept. The engine counts lines and not bytes,
// so Logs reads everything and drops what comes before the offset.
func (d *driver) Logs(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	return func(yield func(runtime.LogChunk, error) bool) {
		begin, err := d.beginning(ctx, sessionID, query)
		if err != nil {
			yield(runtime.LogChunk{}, err)
			return
		}
		var next int64
		err = d.readLogs(ctx, sessionID, query, func(data []byte) bool {
			drop := min(max(begin-next, 0), int64(len(data)))
			chunk := runtime.LogChunk{Stream: query.Stream, Offset: next + drop, Data: data[drop:]}
			next += int64(len(data))
			return len(chunk.Data) == 0 || yield(chunk, nil)
		})
		if err != nil {
			yield(runtime.LogChunk{}, err)
		}
	}
}

// beginning returns the offset of a query counted from the oldest kept byte.
func (d *driver) beginning(ctx context.Context, sessionID string, query runtime.LogQuery) (int64, error) {
	if query.Offset == 0 {
		return 0, nil
	}
	query.Follow = false
	var kept int64
	err := d.readLogs(ctx, sessionID, query, func(data []byte) bool {
		kept += int64(len(data))
		return true
	})
	if query.Offset < 0 {
		return max(kept+query.Offset, 0), err
	}
	return min(query.Offset, kept), err
}

// readLogs passes the output of a stream to each, until that returns false.
func (d *driver) readLogs(ctx context.Context, sessionID string, query runtime.LogQuery, each eachPiece) error {
	if query.Task != "" {
		return errNoTasks
	}
	found, err := d.inspect(ctx, sessionID)
	if err != nil {
		return err
	}
	logs, err := d.engine.ContainerLogs(ctx, found.ID, client.ContainerLogsOptions{
		ShowStdout: query.Stream == runtime.Stdout, ShowStderr: query.Stream == runtime.Stderr, Follow: query.Follow,
	})
	if err != nil {
		return known(err)
	}
	defer func() { _ = logs.Close() }()
	_, err = stdcopy.StdCopy(each, each, logs)
	switch {
	case errors.Is(err, errEnough):
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return known(err)
}

var (
	errEnough  = errors.New("the reader has enough")
	errNoTasks = fmt.Errorf("%w: a container has no tasks", runtime.ErrInvalid)
)

// eachPiece is a function as a writer.
type eachPiece func(data []byte) bool

func (e eachPiece) Write(data []byte) (int, error) {
	if !e(data) {
		return 0, errEnough
	}
	return len(data), nil
}
