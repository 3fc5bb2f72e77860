package pluginwire

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

// server serves a driver to the host. Each call has the host's deadline and
// cancellation in its context.
type server struct {
	runtimev1.UnimplementedDriverServiceServer
	driver runtime.Driver
}

func (s *server) Info(ctx context.Context, _ *runtimev1.InfoRequest) (*runtimev1.InfoResponse, error) {
	info, err := s.driver.Info(ctx)
	if err != nil {
		return nil, toStatus(err)
	}
	return infoToProto(info, abilitiesOf(s.driver)), nil
}

// abilitiesOf returns what a driver can do beyond runtime.Driver, sorted.
func abilitiesOf(driver runtime.Driver) []runtime.Ability {
	var abilities []runtime.Ability
	if _, ok := driver.(runtime.Claimer); ok {
		abilities = append(abilities, runtime.AbilityClaim)
	}
	if _, ok := driver.(runtime.Configurer); ok {
		abilities = append(abilities, runtime.AbilityConfigure)
	}
	if _, ok := driver.(runtime.Execer); ok {
		abilities = append(abilities, runtime.AbilityExec)
	}
	if _, ok := driver.(runtime.Explainer); ok {
		abilities = append(abilities, runtime.AbilityExplain)
	}
	if _, ok := driver.(runtime.HealthChecker); ok {
		abilities = append(abilities, runtime.AbilityHealth)
	}
	if _, ok := driver.(runtime.LogReader); ok {
		abilities = append(abilities, runtime.AbilityLogs)
	}
	if _, ok := driver.(runtime.Watcher); ok {
		abilities = append(abilities, runtime.AbilityWatch)
	}
	return abilities
}

func (s *server) Configure(ctx context.Context, req *runtimev1.ConfigureRequest) (*runtimev1.ConfigureResponse, error) {
	configurer, ok := s.driver.(runtime.Configurer)
	if !ok {
		return nil, toStatus(unsupported(runtime.AbilityConfigure))
	}
	config := runtime.Config{
		Instance: req.GetInstance(), JSON: json.RawMessage(req.GetConfigJson()), DropMarks: os.Getenv(DropMarksKey) == "1",
	}
	if err := configurer.Configure(ctx, config); err != nil {
		return nil, toStatus(err)
	}
	return &runtimev1.ConfigureResponse{}, nil
}

func (s *server) Create(req *runtimev1.CreateRequest, stream grpc.ServerStreamingServer[runtimev1.CreateResponse]) error {
	spec, err := specFromProto(req.GetSpec())
	if err != nil {
		return toStatus(err)
	}
	// If a stage cannot be sent, the sandbox cannot be sent either, and that returns the
	// error.
	answer := &sender[runtimev1.CreateResponse]{stream: stream}
	progress := func(stage runtime.Stage) {
		if s, ok := stages[stage]; ok {
			_ = answer.send(&runtimev1.CreateResponse{Event: &runtimev1.CreateResponse_Stage{Stage: s}})
		}
	}
	sandbox, err := s.driver.Create(stream.Context(), spec, progress)
	if err != nil {
		answer.close()
		return toStatus(err)
	}
	return answer.last(&runtimev1.CreateResponse{Event: &runtimev1.CreateResponse_Sandbox{Sandbox: sandboxToProto(sandbox)}})
}

// sender sends messages on a stream, which takes one at a time. A driver may report
// something from another goroutine, and even after its method has returned: that is
// dropped.
type sender[M any] struct {
	stream interface{ Send(message *M) error }
	mu     sync.Mutex
	closed bool
}

func (s *sender[M]) send(message *M) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	return s.stream.Send(message)
}

// last sends the last message.
func (s *sender[M]) last(message *M) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return s.stream.Send(message)
}

// close drops all messages that follow.
func (s *sender[M]) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
}

func (s *server) Stop(ctx context.Context, req *runtimev1.StopRequest) (*runtimev1.StopResponse, error) {
	if err := s.driver.Stop(ctx, req.GetSessionId()); err != nil {
		return nil, toStatus(err)
	}
	return &runtimev1.StopResponse{}, nil
}

func (s *server) Delete(ctx context.Context, req *runtimev1.DeleteRequest) (*runtimev1.DeleteResponse, error) {
	if err := s.driver.Delete(ctx, req.GetSessionId()); err != nil {
		return nil, toStatus(err)
	}
	return &runtimev1.DeleteResponse{}, nil
}

func (s *server) Inspect(ctx context.Context, req *runtimev1.InspectRequest) (*runtimev1.InspectResponse, error) {
	sandbox, err := s.driver.Inspect(ctx, req.GetSessionId())
	if err != nil {
		return nil, toStatus(err)
	}
	return &runtimev1.InspectResponse{Sandbox: sandboxToProto(sandbox)}, nil
}

// listBytes is the approximate size of one message of a list, in bytes.
const listBytes = 32 << 10

func (s *server) List(_ *runtimev1.ListRequest, stream grpc.ServerStreamingServer[runtimev1.ListResponse]) error {
	batch := &runtimev1.ListResponse{}
	size := 0
	flush := func() error {
		if len(batch.Sandboxes) == 0 {
			return nil
		}
		err := stream.Send(batch)
		batch = &runtimev1.ListResponse{}
		size = 0
		return err
	}
	for sandbox, err := range s.driver.List(stream.Context()) {
		if err != nil {
			return toStatus(errors.Join(err, flush()))
		}
		next := sandboxToProto(sandbox)
		batch.Sandboxes = append(batch.Sandboxes, next)
		if size += proto.Size(next); size >= listBytes {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

func (s *server) Watch(_ *runtimev1.WatchRequest, stream grpc.ServerStreamingServer[runtimev1.WatchResponse]) error {
	watcher, ok := s.driver.(runtime.Watcher)
	if !ok {
		return toStatus(unsupported(runtime.AbilityWatch))
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	err := watcher.Watch(ctx, func(sandbox runtime.Sandbox) {
		if err := stream.Send(&runtimev1.WatchResponse{Sandbox: sandboxToProto(sandbox)}); err != nil {
			cancel(err)
		}
	})
	return toStatus(err)
}

func (s *server) Health(ctx context.Context, _ *runtimev1.HealthRequest) (*runtimev1.HealthResponse, error) {
	checker, ok := s.driver.(runtime.HealthChecker)
	if !ok {
		return nil, toStatus(unsupported(runtime.AbilityHealth))
	}
	if err := checker.Health(ctx); err != nil {
		return nil, toStatus(err)
	}
	return &runtimev1.HealthResponse{}, nil
}

func (s *server) Explain(ctx context.Context, req *runtimev1.ExplainRequest) (*runtimev1.ExplainResponse, error) {
	explainer, ok := s.driver.(runtime.Explainer)
	if !ok {
		return nil, toStatus(unsupported(runtime.AbilityExplain))
	}
	happenings, err := explainer.Explain(ctx, req.GetSessionId())
	if err != nil {
		return nil, toStatus(err)
	}
	return &runtimev1.ExplainResponse{Happenings: happeningsToProto(happenings)}, nil
}

func (s *server) Claim(ctx context.Context, req *runtimev1.ClaimRequest) (*runtimev1.ClaimResponse, error) {
	claimer, ok := s.driver.(runtime.Claimer)
	if !ok {
		return nil, toStatus(unsupported(runtime.AbilityClaim))
	}
	spec, err := specFromProto(req.GetSpec())
	if err != nil {
		return nil, toStatus(err)
	}
	sandbox, err := claimer.Claim(ctx, spec)
	if err != nil {
		return nil, toStatus(err)
	}
	return &runtimev1.ClaimResponse{Sandbox: sandboxToProto(sandbox)}, nil
}

func unsupported(ability runtime.Ability) error {
	return fmt.Errorf("the driver does not have the ability %q: %w", ability, errors.ErrUnsupported)
}
