package pluginwire

import (
	"context"
	"errors"
	"io"
	"iter"
	"slices"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

func (c *Client) has(ability runtime.Ability) bool {
	return slices.Contains(c.info.Abilities, ability)
}

// Configure waits at most 12 seconds.
func (c *Client) Configure(ctx context.Context, config runtime.Config) error {
	if !c.has(runtime.AbilityConfigure) {
		return unsupported(runtime.AbilityConfigure)
	}
	_, err := within(ctx, c.limit, func(ctx context.Context) (*runtimev1.ConfigureResponse, error) {
		return c.rpc.Configure(ctx, &runtimev1.ConfigureRequest{Instance: config.Instance, ConfigJson: string(config.JSON)})
	})
	return err
}

// Health returns nil if the driver does not have the ability. It waits at most 12
// seconds.
func (c *Client) Health(ctx context.Context) error {
	if !c.has(runtime.AbilityHealth) {
		return nil
	}
	_, err := within(ctx, c.limit, func(ctx context.Context) (*runtimev1.HealthResponse, error) {
		return c.rpc.Health(ctx, &runtimev1.HealthRequest{})
	})
	return err
}

// Watch has no time limit other than ctx's.
func (c *Client) Watch(ctx context.Context, changed func(runtime.Sandbox)) error {
	if !c.has(runtime.AbilityWatch) {
		return unsupported(runtime.AbilityWatch)
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

// Logs has no time limit other than ctx's.
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
