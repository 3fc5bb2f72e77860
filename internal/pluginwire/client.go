package pluginwire

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

const (
	// answerLimit is how long a plugin may take for a call that package runtime limits
	// to 10 seconds. The rest is for the way there and back.
	answerLimit = 12 * time.Second
	// claimLimit is how long a plugin may take for a Claim. A caller waits for it, and
	// starting another sandbox takes no longer.
	claimLimit = 5 * time.Second
	// maxSandboxes bounds the number of sandboxes in a list.
	maxSandboxes = 1_500_000
	// maxStages bounds the number of stages that a Create may report before its
	// sandbox.
	maxStages = 64
)

// Client is the driver of one plugin process. It has the methods of every ability; Info
// declares which of them work. Client checks the plugin's answers. An answer that
// breaks the contract becomes [runtime.ErrUnavailable].
type Client struct {
	rpc   runtimev1.DriverServiceClient
	info  runtime.Info
	limit time.Duration // answerLimit, less in tests
}

var (
	_ runtime.Driver        = (*Client)(nil)
	_ runtime.Configurer    = (*Client)(nil)
	_ runtime.Watcher       = (*Client)(nil)
	_ runtime.HealthChecker = (*Client)(nil)
	_ runtime.LogReader     = (*Client)(nil)
	_ runtime.Execer        = (*Client)(nil)
	_ runtime.Explainer     = (*Client)(nil)
	_ runtime.Claimer       = (*Client)(nil)
)

// NewClient reads the info of the plugin at the other end of conn and returns its
// driver.
func NewClient(ctx context.Context, conn grpc.ClientConnInterface) (*Client, error) {
	c := &Client{rpc: runtimev1.NewDriverServiceClient(conn), limit: answerLimit}
	answer, err := within(ctx, c.limit, func(ctx context.Context) (*runtimev1.InfoResponse, error) {
		return c.rpc.Info(ctx, &runtimev1.InfoRequest{})
	})
	if err != nil {
		return nil, fmt.Errorf("info: %w", err)
	}
	if c.info, err = infoFromProto(answer); err != nil {
		return nil, fmt.Errorf("info: %w", err)
	}
	return c, nil
}

// errNoAnswer is the cause if a plugin took longer than the contract allows.
var errNoAnswer = errors.New("the plugin did not answer in time")

// within makes a call for which the contract sets a limit.
func within[T any](ctx context.Context, limit time.Duration, call func(context.Context) (T, error)) (T, error) {
	limited, cancel := context.WithTimeoutCause(ctx, limit, errNoAnswer)
	defer cancel()
	answer, err := call(limited)
	if err != nil {
		var none T
		return none, callFailed(ctx, limited, err)
	}
	return answer, nil
}

// callFailed returns the error of a call that failed with err. limited is the call's
// context, derived from the caller's ctx.
func callFailed(ctx, limited context.Context, err error) error {
	// The plugin knows the deadline too, and may report it a moment before limited ends.
	if deadline, ok := limited.Deadline(); ok && status.Code(err) == codes.DeadlineExceeded && time.Until(deadline) < time.Second {
		<-limited.Done()
	}
	if ctx.Err() == nil && errors.Is(context.Cause(limited), errNoAnswer) {
		return fmt.Errorf("%w: %w", runtime.ErrUnavailable, errNoAnswer)
	}
	return fromStatus(ctx, err)
}

// Info returns the info that NewClient read.
func (c *Client) Info(context.Context) (runtime.Info, error) { return c.info, nil }

// Create has no time limit other than ctx's. It refuses to ask a plugin for a spare that
// does not have the ability to claim it.
func (c *Client) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	if spec.Pool != "" && !c.has(runtime.AbilityClaim) {
		return runtime.Sandbox{}, unsupported(runtime.AbilityClaim)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the stream if this returns early
	stream, err := c.rpc.Create(ctx, &runtimev1.CreateRequest{Spec: specToProto(spec)})
	if err != nil {
		return runtime.Sandbox{}, fromStatus(ctx, err)
	}
	for range maxStages {
		resp, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return runtime.Sandbox{}, broken("create ended without a sandbox")
		case err != nil:
			return runtime.Sandbox{}, fromStatus(ctx, err)
		}
		switch event := resp.GetEvent().(type) {
		case *runtimev1.CreateResponse_Stage:
			if stage, ok := keyOf(stages, event.Stage); ok {
				progress(stage)
			}
		case *runtimev1.CreateResponse_Sandbox:
			sandbox, err := usable(event.Sandbox, spec, "created")
			if err == nil && sandbox.Pool != spec.Pool {
				return runtime.Sandbox{}, broken("session %s: created for pool %q", spec.SessionID, sandbox.Pool)
			}
			return sandbox, err
		}
	}
	return runtime.Sandbox{}, broken("create told %d stages and no sandbox", maxStages)
}

// usable decodes the sandbox that was created or claimed for spec, and refuses one that
// cannot be used. how says in the error which of both it was.
func usable(answer *runtimev1.Sandbox, spec runtime.Spec, how string) (runtime.Sandbox, error) {
	sandbox, err := sandboxFromProto(answer, spec.SessionID)
	switch {
	case err != nil:
		return runtime.Sandbox{}, err
	case sandbox.ContainerID == "":
		return runtime.Sandbox{}, broken("session %s: %s without a container ID", spec.SessionID, how)
	case !sandbox.Endpoint.IsValid():
		return runtime.Sandbox{}, broken("session %s: %s without an endpoint", spec.SessionID, how)
	case sandbox.ChatID != spec.ChatID:
		return runtime.Sandbox{}, broken("session %s: %s for chat %.70q", spec.SessionID, how, sandbox.ChatID)
	case sandbox.State != runtime.StateRunning:
		return runtime.Sandbox{}, broken("session %s: %s and %s", spec.SessionID, how, sandbox.State)
	}
	return sandbox, nil
}

// Stop has no time limit other than ctx's.
func (c *Client) Stop(ctx context.Context, sessionID string) error {
	_, err := c.rpc.Stop(ctx, &runtimev1.StopRequest{SessionId: sessionID})
	return fromStatus(ctx, err)
}

// Delete has no time limit other than ctx's.
func (c *Client) Delete(ctx context.Context, sessionID string) error {
	_, err := c.rpc.Delete(ctx, &runtimev1.DeleteRequest{SessionId: sessionID})
	return fromStatus(ctx, err)
}

// Inspect waits at most 12 seconds.
func (c *Client) Inspect(ctx context.Context, sessionID string) (runtime.Sandbox, error) {
	answer, err := within(ctx, c.limit, func(ctx context.Context) (*runtimev1.InspectResponse, error) {
		return c.rpc.Inspect(ctx, &runtimev1.InspectRequest{SessionId: sessionID})
	})
	if err != nil {
		return runtime.Sandbox{}, err
	}
	return sandboxFromProto(answer.GetSandbox(), sessionID)
}

// List ends with an error after 1,500,000 sandboxes, or if the plugin sends nothing for
// 12 seconds.
func (c *Client) List(ctx context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		limited, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		stream, err := c.rpc.List(limited, &runtimev1.ListRequest{})
		if err != nil {
			yield(runtime.Sandbox{}, fromStatus(ctx, err))
			return
		}
		// The time limit runs while this waits for the plugin, not while the caller
		// handles a sandbox.
		late := time.AfterFunc(c.limit, func() { cancel(errNoAnswer) })
		defer late.Stop()
		for count := 0; ; {
			late.Reset(c.limit)
			resp, err := stream.Recv()
			late.Stop()
			switch {
			case errors.Is(err, io.EOF):
				return
			case err != nil:
				yield(runtime.Sandbox{}, callFailed(ctx, limited, err))
				return
			}
			for _, answer := range resp.GetSandboxes() {
				if count++; count > maxSandboxes {
					yield(runtime.Sandbox{}, broken("it lists more than %d sandboxes", maxSandboxes))
					return
				}
				sandbox, err := sandboxFromProto(answer, "")
				if !yield(sandbox, err) || err != nil {
					return
				}
			}
		}
	}
}
