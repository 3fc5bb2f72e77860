package pluginwire

import (
	"io"
	"slices"

	"google.golang.org/grpc"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

// Exec buffers nothing: gRPC's flow control makes the host wait while the command does not
// read its input, and the command while the host does not read its output.
func (s *server) Exec(stream grpc.BidiStreamingServer[runtimev1.ExecRequest, runtimev1.ExecResponse]) error {
	execer, ok := s.driver.(runtime.Execer)
	if !ok {
		return toStatus(unsupported(runtime.AbilityExec))
	}
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	command, err := commandFromProto(first.GetStart())
	if err != nil {
		return toStatus(err)
	}
	answer := &sender[runtimev1.ExecResponse]{stream: stream}
	stdin, input := io.Pipe()
	defer stdin.Close()
	resize := make(chan runtime.WindowSize, 1)
	go receiveInput(stream, input, resize) // gRPC ends its Recv once this handler has returned
	exitCode, err := execer.Exec(stream.Context(), first.GetStart().GetSessionId(), command, runtime.Streams{
		Stdin:  stdin,
		Stdout: outputWriter{answer, runtimev1.OutputStream_OUTPUT_STREAM_STDOUT},
		Stderr: outputWriter{answer, runtimev1.OutputStream_OUTPUT_STREAM_STDERR},
		Resize: resize,
	})
	if err != nil {
		answer.close()
		return toStatus(err)
	}
	return answer.last(&runtimev1.ExecResponse{Event: &runtimev1.ExecResponse_ExitCode{ExitCode: int32(exitCode)}}) //nolint:gosec // exit codes are small
}

// receiveInput passes on what the host sends, until the stream ends. A size waits behind
// the input before it; of several sizes that wait the last is passed on.
func receiveInput(
	stream grpc.BidiStreamingServer[runtimev1.ExecRequest, runtimev1.ExecResponse], input *io.PipeWriter, resize chan runtime.WindowSize,
) {
	for {
		req, err := stream.Recv()
		if err != nil {
			_ = input.CloseWithError(err) // it never fails; io.EOF is the end of the input
			return
		}
		switch event := req.GetEvent().(type) {
		case *runtimev1.ExecRequest_Stdin:
			_, _ = input.Write(event.Stdin) // it fails if the command no longer reads, which is no error
		case *runtimev1.ExecRequest_StdinClose:
			_ = input.Close() // it never fails
		case *runtimev1.ExecRequest_Resize:
			select {
			case <-resize:
			default:
			}
			resize <- sizeFromProto(event.Resize)
		}
	}
}

// outputWriter sends what a command writes to one of its streams.
type outputWriter struct {
	answer *sender[runtimev1.ExecResponse]
	stream runtimev1.OutputStream
}

func (w outputWriter) Write(data []byte) (int, error) {
	for chunk := range slices.Chunk(data, maxChunk) {
		output := &runtimev1.Output{Stream: w.stream, Data: chunk}
		if err := w.answer.send(&runtimev1.ExecResponse{Event: &runtimev1.ExecResponse_Output{Output: output}}); err != nil {
			return 0, err
		}
	}
	return len(data), nil
}
