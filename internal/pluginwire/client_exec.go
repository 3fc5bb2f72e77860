package pluginwire

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"google.golang.org/grpc"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

// Exec has no time limit other than ctx's. It buffers one piece of the input at a time.
func (c *Client) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	if !c.has(runtime.AbilityExec) {
		return 0, unsupported(runtime.AbilityExec)
	}
	var sending sync.WaitGroup
	defer sending.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // the plugin kills the command, if it still runs
	stream, err := c.rpc.Exec(ctx)
	if err != nil {
		return 0, fromStatus(ctx, err)
	}
	start := &runtimev1.ExecRequest{Event: &runtimev1.ExecRequest_Start{Start: commandToProto(sessionID, command)}}
	if err := stream.Send(start); err != nil && !errors.Is(err, io.EOF) { // with io.EOF, Recv returns the error
		return 0, fromStatus(ctx, err)
	}
	input := &sender[runtimev1.ExecRequest]{stream: stream}
	sending.Go(func() { sendSizes(ctx, input, streams.Resize) })
	go sendInput(input, streams.Stdin) // it may wait in a Read that only the caller can end
	return receiveOutput(ctx, stream, streams)
}

// receiveOutput writes the command's output, and returns its exit code.
func receiveOutput(ctx context.Context, stream grpc.BidiStreamingClient[runtimev1.ExecRequest, runtimev1.ExecResponse], to runtime.Streams) (int, error) {
	for {
		resp, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return 0, broken("exec ended without an exit code")
		case err != nil:
			return 0, fromStatus(ctx, err)
		}
		switch event := resp.GetEvent().(type) {
		case *runtimev1.ExecResponse_Output:
			writer := to.Stdout
			if streamFromProto(event.Output.GetStream()) == runtime.Stderr {
				writer = to.Stderr
			}
			if _, err := writer.Write(event.Output.GetData()); err != nil {
				return 0, fmt.Errorf("write the command's output: %w", err)
			}
		case *runtimev1.ExecResponse_ExitCode:
			return int(event.ExitCode), nil
		}
	}
}

// sendInput sends the command's input and then its end.
func sendInput(to *sender[runtimev1.ExecRequest], stdin io.Reader) {
	if stdin != nil {
		// If something cannot be sent, the call has ended.
		_, _ = io.CopyBuffer(inputWriter{to}, struct{ io.Reader }{stdin}, make([]byte, maxChunk))
	}
	_ = to.send(&runtimev1.ExecRequest{Event: &runtimev1.ExecRequest_StdinClose{StdinClose: true}})
}

type inputWriter struct{ *sender[runtimev1.ExecRequest] }

func (w inputWriter) Write(data []byte) (int, error) {
	return len(data), w.send(&runtimev1.ExecRequest{Event: &runtimev1.ExecRequest_Stdin{Stdin: data}})
}

// sendSizes sends the sizes of the command's terminal until ctx ends.
func sendSizes(ctx context.Context, to *sender[runtimev1.ExecRequest], sizes <-chan runtime.WindowSize) {
	for {
		select {
		case <-ctx.Done():
			return
		case size, ok := <-sizes:
			if !ok {
				return
			}
			if to.send(&runtimev1.ExecRequest{Event: &runtimev1.ExecRequest_Resize{Resize: sizeToProto(size)}}) != nil {
				return // the call has ended
			}
		}
	}
}
