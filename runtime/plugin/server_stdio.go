package plugin

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"google.golang.org/grpc"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

// maxChunk is the maximum size of the output or input in one message, in bytes.
const maxChunk = 64 << 10

func (s *server) Logs(req *runtimev1.LogsRequest, stream grpc.ServerStreamingServer[runtimev1.LogsResponse]) error {
	reader, ok := s.driver.(runtime.LogReader)
	if !ok {
		return toStatus(unsupported(runtime.AbilityLogs))
	}
	for chunk, err := range reader.Logs(stream.Context(), req.GetSessionId(), req.GetFollow()) {
		if err != nil {
			return toStatus(err)
		}
		for data := range slices.Chunk(chunk.Data, maxChunk) {
			if err := stream.Send(&runtimev1.LogsResponse{Output: outputToProto(chunk.Stream, data)}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *server) Exec(stream grpc.BidiStreamingServer[runtimev1.ExecRequest, runtimev1.ExecResponse]) error {
	execer, ok := s.driver.(runtime.Execer)
	if !ok {
		return toStatus(unsupported(runtime.AbilityExec))
	}
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	start := first.GetStart()
	if len(start.GetCommand()) == 0 {
		return toStatus(fmt.Errorf("%w: no command", runtime.ErrInvalid))
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)

	var sending sync.Mutex
	code, err := execer.Exec(ctx, start.GetSessionId(), start.GetCommand(), runtime.Stdio{
		Stdin:  &execStdin{stream: stream},
		Stdout: &execWriter{stream: stream, sending: &sending, to: runtime.Stdout},
		Stderr: &execWriter{stream: stream, sending: &sending, to: runtime.Stderr},
	})
	if err != nil {
		return toStatus(err)
	}
	sending.Lock()
	defer sending.Unlock()
	exit := int32(code) //nolint:gosec // no system has an exit code that does not fit
	return stream.Send(&runtimev1.ExecResponse{Event: &runtimev1.ExecResponse_ExitCode{ExitCode: exit}})
}

// execStdin reads a command's input from the requests of its call. A Read ends at the latest
// with the call.
type execStdin struct {
	stream grpc.BidiStreamingServer[runtimev1.ExecRequest, runtimev1.ExecResponse]
	rest   []byte
}

func (r *execStdin) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		req, err := r.stream.Recv()
		if err != nil {
			return 0, err // io.EOF where the input has ended
		}
		r.rest = req.GetStdin()
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// execWriter sends a command's output as responses of its call.
type execWriter struct {
	stream  grpc.BidiStreamingServer[runtimev1.ExecRequest, runtimev1.ExecResponse]
	sending *sync.Mutex // shared by both outputs: a stream takes one message at a time
	to      runtime.LogStream
}

func (w *execWriter) Write(p []byte) (int, error) {
	w.sending.Lock()
	defer w.sending.Unlock()
	for data := range slices.Chunk(p, maxChunk) {
		resp := &runtimev1.ExecResponse{Event: &runtimev1.ExecResponse_Output{Output: outputToProto(w.to, data)}}
		if err := w.stream.Send(resp); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}
