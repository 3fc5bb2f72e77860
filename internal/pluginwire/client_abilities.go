package pluginwire

import (
	"context"
	"errors"
	"io"
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

// Claim waits at most 5 seconds.
func (c *Client) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	if !c.has(runtime.AbilityClaim) {
		return runtime.Sandbox{}, unsupported(runtime.AbilityClaim)
	}
	answer, err := within(ctx, min(c.limit, claimLimit), func(ctx context.Context) (*runtimev1.ClaimResponse, error) {
		return c.rpc.Claim(ctx, &runtimev1.ClaimRequest{Spec: specToProto(spec)})
	})
	if err != nil {
		return runtime.Sandbox{}, err
	}
	return usable(answer.GetSandbox(), spec, "claimed")
}

// Explain waits at most 12 seconds.
func (c *Client) Explain(ctx context.Context, sessionID string) ([]runtime.Happening, error) {
	if !c.has(runtime.AbilityExplain) {
		return nil, unsupported(runtime.AbilityExplain)
	}
	answer, err := within(ctx, c.limit, func(ctx context.Context) (*runtimev1.ExplainResponse, error) {
		return c.rpc.Explain(ctx, &runtimev1.ExplainRequest{SessionId: sessionID})
	})
	if err != nil {
		return nil, err
	}
	return happeningsFromProto(answer.GetHappenings()), nil
}
