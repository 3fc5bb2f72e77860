package pluginwire

import (
	"context"
	"errors"
	"io"
	"iter"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

// Logs has no time limit other than ctx's. A plugin that was built before streams and
// offsets sends both streams from their beginning: Logs then drops what was not asked for.
func (c *Client) Logs(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	return func(yield func(runtime.LogChunk, error) bool) {
		if !c.has(runtime.AbilityLogs) {
			yield(runtime.LogChunk{}, unsupported(runtime.AbilityLogs))
			return
		}
		var begin, next int64 // for a plugin that does not know offsets: those of the first and the next byte
		counted := false
		for output, err := range c.outputs(ctx, sessionID, query) {
			if err != nil {
				yield(runtime.LogChunk{}, err)
				return
			}
			chunk := runtime.LogChunk{Stream: query.Stream, Offset: output.GetOffset(), Data: output.GetData()}
			if output.Offset == nil {
				if !counted {
					counted = true
					if begin, err = c.countTo(ctx, sessionID, query); err != nil {
						yield(runtime.LogChunk{}, err)
						return
					}
				}
				drop := min(max(begin-next, 0), int64(len(chunk.Data)))
				chunk.Offset, next = next+drop, next+int64(len(chunk.Data))
				chunk.Data = chunk.Data[drop:]
			}
			if len(chunk.Data) > 0 && !yield(chunk, nil) {
				return
			}
		}
	}
}

// outputs yields what the plugin sends of the stream that query asks for.
func (c *Client) outputs(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[*runtimev1.Output, error] {
	return func(yield func(*runtimev1.Output, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := c.rpc.Logs(ctx, &runtimev1.LogsRequest{
			SessionId: sessionID, Follow: query.Follow, Stream: streams[query.Stream], Task: query.Task, Offset: query.Offset,
		})
		if err != nil {
			yield(nil, fromStatus(ctx, err))
			return
		}
		for {
			resp, err := stream.Recv()
			switch {
			case errors.Is(err, io.EOF):
				return
			case err != nil:
				yield(nil, fromStatus(ctx, err))
				return
			}
			output := resp.GetOutput()
			if streamFromProto(output.GetStream()) == query.Stream && !yield(output, nil) {
				return
			}
		}
	}
}

// countTo returns query's offset counted from the oldest kept byte. It reads what is kept,
// because the plugin does not know offsets.
func (c *Client) countTo(ctx context.Context, sessionID string, query runtime.LogQuery) (int64, error) {
	if query.Offset == 0 {
		return 0, nil
	}
	query.Follow = false
	var kept int64
	for output, err := range c.outputs(ctx, sessionID, query) {
		if err != nil {
			return 0, err
		}
		kept += int64(len(output.GetData()))
	}
	if query.Offset < 0 {
		return max(kept+query.Offset, 0), nil
	}
	return min(query.Offset, kept), nil
}
