package pluginwire

import (
	"bytes"
	"context"
	"iter"
	"testing"

	"github.com/shoenig/test/must"
	"google.golang.org/grpc"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

func TestLogs(t *testing.T) {
	t.Run("carries the query and the chunks", func(t *testing.T) {
		query := runtime.LogQuery{Stream: runtime.Stderr, Task: "main", Offset: -1 << 40, Follow: true}
		long := bytes.Repeat([]byte("x"), maxChunk+1)
		c := client(t, of(&fake{logs: func(_ context.Context, id string, got runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
			return func(yield func(runtime.LogChunk, error) bool) {
				must.Eq(t, "s", id)
				must.Eq(t, query, got)
				_ = yield(runtime.LogChunk{Stream: runtime.Stderr, Data: []byte("first")}, nil) &&
					yield(runtime.LogChunk{Stream: runtime.Stderr, Offset: 5, Data: long}, nil) &&
					yield(runtime.LogChunk{}, runtime.ErrLogsDisabled)
			}
		}}))
		chunks, err := read(t, c, query)
		must.ErrorIs(t, err, runtime.ErrLogsDisabled)
		must.Eq(t, []runtime.LogChunk{
			{Stream: runtime.Stderr, Offset: 0, Data: []byte("first")},
			{Stream: runtime.Stderr, Offset: 5, Data: long[:maxChunk]},
			{Stream: runtime.Stderr, Offset: 5 + maxChunk, Data: long[maxChunk:]},
		}, chunks)
	})
	t.Run("begins where a plugin says, even if it was asked for an offset out of range", func(t *testing.T) {
		end := runtime.LogChunk{Stream: runtime.Stdout, Offset: 7, Data: []byte("new")}
		c := client(t, of(&fake{logs: func(context.Context, string, runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
			return func(yield func(runtime.LogChunk, error) bool) { yield(end, nil) }
		}}))
		chunks, err := read(t, c, runtime.LogQuery{Stream: runtime.Stdout, Offset: 1000, Follow: true})
		must.NoError(t, err)
		must.Eq(t, []runtime.LogChunk{end}, chunks)
	})
}

// oldLogs is a plugin from before streams and offsets. It sends "abcdef" and "ghi" on
// standard output, and after that, if it follows, "jkl".
type oldLogs struct{ liar }

func (*oldLogs) Info(context.Context, *runtimev1.InfoRequest) (*runtimev1.InfoResponse, error) {
	return &runtimev1.InfoResponse{Name: "old", Abilities: []string{"logs"}}, nil
}

func (*oldLogs) Logs(req *runtimev1.LogsRequest, stream grpc.ServerStreamingServer[runtimev1.LogsResponse]) error {
	outputs := []*runtimev1.Output{
		{Stream: runtimev1.OutputStream_OUTPUT_STREAM_STDERR, Data: []byte("error")},
		{Stream: runtimev1.OutputStream_OUTPUT_STREAM_STDOUT, Data: []byte("abcdef")},
		{Data: []byte("ghi")},
	}
	if req.GetFollow() {
		outputs = append(outputs, &runtimev1.Output{Data: []byte("jkl")})
	}
	for _, output := range outputs {
		if err := stream.Send(&runtimev1.LogsResponse{Output: output}); err != nil {
			return err
		}
	}
	return nil
}

func TestLogs_OfAPluginFromBeforeOffsets(t *testing.T) {
	c := client(t, &oldLogs{})
	for _, test := range []struct {
		name   string
		query  runtime.LogQuery
		offset int64
		text   string
	}{
		{"one stream", runtime.LogQuery{Stream: runtime.Stderr}, 0, "error"},
		{"the other stream", runtime.LogQuery{Stream: runtime.Stdout}, 0, "abcdefghi"},
		{"an offset", runtime.LogQuery{Stream: runtime.Stdout, Offset: 7}, 7, "hi"},
		{"an offset from the end", runtime.LogQuery{Stream: runtime.Stdout, Offset: -4}, 5, "fghi"},
		{"an offset from the end and what follows", runtime.LogQuery{Stream: runtime.Stdout, Offset: -1, Follow: true}, 8, "ijkl"},
		{"an offset before the beginning", runtime.LogQuery{Stream: runtime.Stdout, Offset: -100}, 0, "abcdefghi"},
		{"an offset after the end", runtime.LogQuery{Stream: runtime.Stdout, Offset: 100}, 0, ""},
		{"an offset after the end and what follows", runtime.LogQuery{Stream: runtime.Stdout, Offset: 100, Follow: true}, 9, "jkl"},
	} {
		t.Run(test.name, func(t *testing.T) {
			chunks, err := read(t, c, test.query)
			must.NoError(t, err)
			text, next := "", test.offset
			for _, chunk := range chunks {
				must.Eq(t, test.query.Stream, chunk.Stream)
				must.Eq(t, next, chunk.Offset)
				text += string(chunk.Data)
				next += int64(len(chunk.Data))
			}
			must.Eq(t, test.text, text)
		})
	}
}

// read reads logs until they end.
func read(t *testing.T, c *Client, query runtime.LogQuery) ([]runtime.LogChunk, error) {
	t.Helper()
	var chunks []runtime.LogChunk
	for chunk, err := range c.Logs(t.Context(), "s", query) {
		if err != nil {
			return chunks, err
		}
		chunks = append(chunks, chunk)
	}
	return chunks, nil
}
