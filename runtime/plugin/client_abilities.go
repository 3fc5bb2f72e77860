package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"

	"google.golang.org/grpc"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

func (c *Client) has(ability runtime.Ability) bool {
	return slices.Contains(c.info.Abilities, ability)
}

// Configure waits 12 seconds at most.
func (c *Client) Configure(ctx context.Context, config runtime.Config) error {
	if !c.has(runtime.AbilityConfigure) {
		return unsupported(runtime.AbilityConfigure)
	}
	_, err := within(ctx, c.limit, func(ctx context.Context) (*runtimev1.ConfigureResponse, error) {
		return c.rpc.Configure(ctx, &runtimev1.ConfigureRequest{Instance: config.Instance, ConfigJson: string(config.JSON)})
	})
	return err
}

// Health of a driver that does not have the ability is good. It waits 12
// seconds at most.
func (c *Client) Health(ctx context.Context) error {
	if !c.has(runtime.AbilityHealth) {
		return nil
	}
	_, err := within(ctx, c.limit, func(ctx context.Context) (*runtimev1.HealthResponse, error) {
		return c.rpc.Health(ctx, &runtimev1.HealthRequest{})
	})
	return err
}

// Watch of a driver that does not have the ability reports nothing.
func (c *Client) Watch(ctx context.Context, changed func(runtime.Sandbox)) error {
	if !c.has(runtime.AbilityWatch) {
		<-ctx.Done()
		return ctx.Err()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.rpc.Watch(ctx, &runtimev1.WatchRequest{})
	if err != nil {
		return fromStatus(ctx, err)
	}
	for {
		resp, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return broken("its watch ended")
		case err != nil:
			return fromStatus(ctx, err)
		}
		sandbox, err := sandboxFromProto(resp.GetSandbox(), "")
		if err != nil {
			return err
		}
		changed(sandbox)
	}
}

// Logs has no limit but ctx's.
func (c *Client) Logs(ctx context.Context, sessionID string, follow bool) iter.Seq2[runtime.LogChunk, error] {
	return func(yield func(runtime.LogChunk, error) bool) {
		if !c.has(runtime.AbilityLogs) {
			yield(runtime.LogChunk{}, unsupported(runtime.AbilityLogs))
			return
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := c.rpc.Logs(ctx, &runtimev1.LogsRequest{SessionId: sessionID, Follow: follow})
		if err != nil {
			yield(runtime.LogChunk{}, fromStatus(ctx, err))
			return
		}
		for {
			resp, err := stream.Recv()
			switch {
			case errors.Is(err, io.EOF):
				return
			case err != nil:
				yield(runtime.LogChunk{}, fromStatus(ctx, err))
				return
			}
			if !yield(outputFromProto(resp.GetOutput()), nil) {
				return
			}
		}
	}
}

// Exec has no limit but ctx's.
func (c *Client) Exec(ctx context.Context, sessionID string, command []string, stdio runtime.Stdio) (int, error) {
	if !c.has(runtime.AbilityExec) {
		return 0, unsupported(runtime.AbilityExec)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.rpc.Exec(ctx)
	if err != nil {
		return 0, fromStatus(ctx, err)
	}
	start := &runtimev1.ExecRequest{Event: &runtimev1.ExecRequest_Start{
		Start: &runtimev1.ExecStart{SessionId: sessionID, Command: command},
	}}
	// A send fails with EOF where the call is over; Recv then tells why.
	if err := stream.Send(start); err != nil && !errors.Is(err, io.EOF) {
		return 0, fromStatus(ctx, err)
	}
	// The copying ends with the input or with the stream, so it may outlast
	// the call while the input's own Read is blocked.
	go sendStdin(stream, stdio.Stdin)

	for {
		resp, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return 0, broken("exec ended without an exit code")
		case err != nil:
			return 0, fromStatus(ctx, err)
		}
		switch event := resp.GetEvent().(type) {
		case *runtimev1.ExecResponse_ExitCode:
			return int(event.ExitCode), nil
		case *runtimev1.ExecResponse_Output:
			if err := writeOutput(stdio, outputFromProto(event.Output)); err != nil {
				return 0, fmt.Errorf("exec: write the output: %w", err)
			}
		}
	}
}

func sendStdin(stream grpc.BidiStreamingClient[runtimev1.ExecRequest, runtimev1.ExecResponse], stdin io.Reader) {
	if stdin != nil {
		buf := make([]byte, maxChunk)
		for {
			n, err := stdin.Read(buf)
			if n > 0 {
				data := slices.Clone(buf[:n]) // a message may be kept after Send
				if stream.Send(&runtimev1.ExecRequest{Event: &runtimev1.ExecRequest_Stdin{Stdin: data}}) != nil {
					return
				}
			}
			if err != nil {
				break
			}
		}
	}
	_ = stream.CloseSend() // it fails only where the call is over
}

func writeOutput(stdio runtime.Stdio, chunk runtime.LogChunk) error {
	to := stdio.Stdout
	if chunk.Stream == runtime.Stderr {
		to = stdio.Stderr
	}
	if to == nil {
		return nil
	}
	_, err := to.Write(chunk.Data)
	return err
}
