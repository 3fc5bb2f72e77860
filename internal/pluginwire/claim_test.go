package pluginwire

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/shoenig/test/must"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

// spare is the spec of a spare, and spareSandbox is what is made from it.
var (
	spare        = runtime.Spec{SessionID: spec.SessionID, CreatedAt: spec.CreatedAt, ExpiresAt: spec.ExpiresAt, AccessToken: spec.AccessToken, Pool: "small"}
	spareSandbox = runtime.Sandbox{
		SessionID: spec.SessionID, ContainerID: sandbox.ContainerID, Endpoint: sandbox.Endpoint, State: runtime.StateRunning, Pool: "small",
	}
)

// creates returns the client of a driver whose Create returns sandbox, and what it was
// given.
func creates(t *testing.T, sandbox runtime.Sandbox) (*Client, *runtime.Spec) {
	t.Helper()
	got := new(runtime.Spec)
	return client(t, of(&fake{create: func(_ context.Context, s runtime.Spec, _ func(runtime.Stage)) (runtime.Sandbox, error) {
		*got = s
		return sandbox, nil
	}})), got
}

func TestCreate_OfASpare(t *testing.T) {
	t.Run("carries its pool both ways", func(t *testing.T) {
		c, got := creates(t, spareSandbox)
		made, err := c.Create(t.Context(), spare, noProgress)
		must.NoError(t, err)
		must.Eq(t, spareSandbox, made)
		must.Eq(t, spare, *got)
	})
	t.Run("refuses one of another pool", func(t *testing.T) {
		other := spareSandbox
		other.Pool = "large"
		c, _ := creates(t, other)
		_, err := c.Create(t.Context(), spare, noProgress)
		must.ErrorIs(t, err, runtime.ErrUnavailable)
		must.ErrorContains(t, err, `created for pool "large"`)
	})
	t.Run("does not ask a plugin that cannot claim", func(t *testing.T) {
		_, err := client(t, of(bare{&fake{}})).Create(t.Context(), spare, noProgress)
		must.ErrorIs(t, err, errors.ErrUnsupported)
	})
}

// claims returns the client of a driver with a Claim.
func claims(t *testing.T, claim func(context.Context, runtime.Spec) (runtime.Sandbox, error)) *Client {
	t.Helper()
	return client(t, of(&fake{claim: claim}))
}

func TestClaim(t *testing.T) {
	t.Run("carries the spec and the sandbox", func(t *testing.T) {
		var got runtime.Spec
		want := sandbox
		want.Pool = "small"
		claimed, err := claims(t, func(_ context.Context, s runtime.Spec) (runtime.Sandbox, error) {
			got = s
			return want, nil
		}).Claim(t.Context(), spec)
		must.NoError(t, err)
		must.Eq(t, want, claimed)
		must.Eq(t, spec, got)
	})
	for _, want := range []error{
		fmt.Errorf("%w: claimed for another chat", runtime.ErrConflict),
		fmt.Errorf("%w: no container", runtime.ErrNotFound),
		fmt.Errorf("%w: port closed", runtime.ErrNotReady),
		fmt.Errorf("%w: no such folder", runtime.ErrInvalid),
	} {
		t.Run("keeps an error: "+want.Error(), func(t *testing.T) {
			_, err := claims(t, func(context.Context, runtime.Spec) (runtime.Sandbox, error) {
				return runtime.Sandbox{}, want
			}).Claim(t.Context(), spec)
			must.EqError(t, err, want.Error())
			must.ErrorIs(t, err, errors.Unwrap(want))
			must.False(t, errors.Is(err, runtime.ErrUnavailable))
		})
	}
	for want, spoil := range map[string]func(*runtime.Sandbox){
		`it answered for session "another"`: func(s *runtime.Sandbox) { s.SessionID = "another" },
		`claimed for chat ""`:               func(s *runtime.Sandbox) { s.ChatID = "" },
		"claimed without a container ID":    func(s *runtime.Sandbox) { s.ContainerID = "" },
		"claimed without an endpoint":       func(s *runtime.Sandbox) { s.Endpoint = runtime.Endpoint{} },
		"claimed and dead":                  func(s *runtime.Sandbox) { s.State = runtime.StateDead },
	} {
		t.Run("refuses a sandbox: "+want, func(t *testing.T) {
			_, err := claims(t, func(context.Context, runtime.Spec) (runtime.Sandbox, error) {
				bad := sandbox
				spoil(&bad)
				return bad, nil
			}).Claim(t.Context(), spec)
			must.ErrorIs(t, err, runtime.ErrUnavailable)
			must.ErrorContains(t, err, want)
		})
	}
	t.Run("ends after a limit", func(t *testing.T) {
		limits := make(chan time.Duration, 1)
		c := claims(t, func(ctx context.Context, _ runtime.Spec) (runtime.Sandbox, error) {
			deadline, _ := ctx.Deadline()
			limits <- time.Until(deadline)
			return runtime.Sandbox{}, runtime.ErrNotReady
		})
		_, err := c.Claim(t.Context(), spec)
		must.ErrorIs(t, err, runtime.ErrNotReady)
		must.Between(t, 0, <-limits, claimLimit)

		c = claims(t, func(ctx context.Context, _ runtime.Spec) (runtime.Sandbox, error) {
			<-ctx.Done()
			return runtime.Sandbox{}, ctx.Err()
		})
		c.limit = 20 * time.Millisecond
		_, err = c.Claim(t.Context(), spec)
		must.ErrorIs(t, err, runtime.ErrUnavailable)
		must.ErrorIs(t, err, errNoAnswer)
	})
}

func TestInfo_CarriesTheVariant(t *testing.T) {
	c := client(t, of(&fake{info: func() (runtime.Info, error) {
		return runtime.Info{Name: "fake", Variant: "sha256:4711"}, nil
	}}))
	info, err := c.Info(t.Context())
	must.NoError(t, err)
	must.Eq(t, "sha256:4711", info.Variant)
}

// oldPlugin is a plugin from before spares: it has no Claim, and answers a create with the
// fields that it knows.
type oldPlugin struct{ liar }

func (*oldPlugin) Create(req *runtimev1.CreateRequest, stream grpc.ServerStreamingServer[runtimev1.CreateResponse]) error {
	answer := sandboxToProto(sandbox)
	answer.SessionId, answer.ChatId = req.GetSpec().GetSessionId(), req.GetSpec().GetChatId()
	return stream.Send(&runtimev1.CreateResponse{Event: &runtimev1.CreateResponse_Sandbox{Sandbox: answer}})
}

func TestVersions(t *testing.T) {
	t.Run("a host works with a plugin from before spares", func(t *testing.T) {
		c := client(t, &oldPlugin{})
		made, err := c.Create(t.Context(), spec, noProgress)
		must.NoError(t, err)
		must.Eq(t, sandbox, made)
		info, err := c.Info(t.Context())
		must.NoError(t, err)
		must.Eq(t, "", info.Variant)
		_, err = c.Create(t.Context(), spare, noProgress)
		must.ErrorIs(t, err, errors.ErrUnsupported)
		_, err = c.Claim(t.Context(), spec)
		must.ErrorIs(t, err, errors.ErrUnsupported)
	})
	t.Run("a plugin that declares what it does not serve makes no sandbox", func(t *testing.T) {
		c := client(t, &oldPlugin{liar{info: &runtimev1.InfoResponse{Name: "old", Abilities: []string{"claim"}}}})
		_, err := c.Claim(t.Context(), spec)
		must.ErrorIs(t, err, errors.ErrUnsupported)
	})
	t.Run("a host or plugin from before spares passes over the new fields", func(t *testing.T) {
		file := protodesc.ToFileDescriptorProto(runtimev1.File_v1_runtime_proto)
		for _, message := range file.GetMessageType() {
			message.Field = slices.DeleteFunc(message.Field, func(f *descriptorpb.FieldDescriptorProto) bool {
				return f.GetName() == "pool" || f.GetName() == "variant"
			})
		}
		before, err := protodesc.NewFile(file, protoregistry.GlobalFiles)
		must.NoError(t, err)
		for _, message := range []proto.Message{
			infoToProto(runtime.Info{Name: "new", Version: "2", Variant: "1"}, []runtime.Ability{runtime.AbilityClaim}),
			sandboxToProto(spareSandbox), specToProto(spare),
		} {
			sent, err := proto.Marshal(message)
			must.NoError(t, err)
			old := dynamicpb.NewMessage(before.Messages().ByName(message.ProtoReflect().Descriptor().Name()))
			must.NoError(t, proto.Unmarshal(sent, old))
			must.SliceNotEmpty(t, old.GetUnknown())

			// Nothing else is lost.
			old.SetUnknown(nil)
			kept, err := proto.Marshal(old)
			must.NoError(t, err)
			got := message.ProtoReflect().New().Interface()
			must.NoError(t, proto.Unmarshal(kept, got))
			reflected := message.ProtoReflect()
			for _, name := range []protoreflect.Name{"pool", "variant"} {
				if field := reflected.Descriptor().Fields().ByName(name); field != nil {
					reflected.Clear(field)
				}
			}
			must.True(t, proto.Equal(message, got))
		}
	})
}
