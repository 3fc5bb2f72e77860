package pluginhost

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"

	wire "github.com/bivouac/bivouac/internal/pluginwire"
	"github.com/bivouac/bivouac/runtime"
	author "github.com/bivouac/bivouac/runtime/plugin"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

// role is the variable that makes the test's own binary a plugin, or a host.
const role = "PLUGINHOST_TEST_ROLE"

// variantFile is the variable that names a file with the variant of a stub's spares.
const variantFile = "PLUGINHOST_TEST_VARIANT"

func TestMain(m *testing.M) {
	name := os.Getenv(role)
	if name == "" {
		os.Exit(m.Run())
	}
	play, ok := roles[name]
	if !ok {
		panic("no such role: " + name)
	}
	play()
}

// roles are the plugins of the tests, good and bad.
var roles = map[string]func(){
	"good":  func() { author.Serve(newStub()) },
	"old":   func() { author.Serve(withoutClaim{newStub()}) },
	"twins": func() { author.Serve(newStubOfTwins()) },

	// Before the handshake.
	"exits at once": func() {
		fmt.Fprintln(os.Stderr, "no engine here")
		os.Exit(3)
	},
	"says nothing":       block,
	"closes its stdout":  func() { _ = os.Stdout.Close(); block() },
	"prints garbage":     func() { fmt.Println("Hello, I am a plugin!"); block() },
	"prints no line end": func() { fmt.Print(strings.Repeat("x", 1<<20)); block() },
	"other core":         func() { fmt.Println("2|1|unix|/tmp/x|grpc|"); block() },
	"other version":      func() { fmt.Println("1|9|unix|/tmp/x|grpc|"); block() },
	"net/rpc":            func() { fmt.Println("1|1|unix|/tmp/x|netrpc|"); block() },
	"address elsewhere":  func() { fmt.Println("1|1|tcp|192.0.2.1:80|grpc|"); block() },
	"no certificate":     func() { fmt.Println("1|1|unix|/tmp/x|grpc|"); block() },
	"bad certificate":    func() { fmt.Println("1|1|unix|/tmp/x|grpc|AAAA"); block() },

	// After it.
	"answers nothing": func() { serveRaw(&runtimev1.UnimplementedDriverServiceServer{}, hang) },
	"implements nothing": func() {
		serveRaw(&runtimev1.UnimplementedDriverServiceServer{}, nil)
	},
	"floods stderr": func() {
		line := strings.Repeat("flood ", 1000) + "\n"
		for range 10_000 {
			fmt.Fprint(os.Stderr, line)
		}
		author.Serve(newStub())
	},
	"prints what is no log line": func() {
		for _, line := range []string{`{"@message":1}`, `{"@message":"x","@level":2}`, `{"@timestamp":3}`, `[`, "\x1b[2J", "\xff\xfe"} {
			fmt.Fprintln(os.Stderr, line)
		}
		author.Serve(newStub())
	},
	"liar": func() { serveRaw(&liar{}, nil) },

	"host": runAsHost,
}

func block() { select {} }

// withoutClaim is a driver from before spares, which has only its configuration beyond
// the calls that every driver has.
type withoutClaim struct{ runtime.Driver }

func (w withoutClaim) Configure(ctx context.Context, config runtime.Config) error {
	return w.Driver.(runtime.Configurer).Configure(ctx, config)
}

// stub is a driver that keeps its sandboxes in memory. The volume of a create
// decides how it goes.
type stub struct {
	mu        sync.Mutex
	sandboxes map[string]runtime.Sandbox
	config    runtime.Config
}

// The volumes with a meaning.
const (
	volumeCrash  = "/crash"  // the process ends in the middle
	volumeHang   = "/hang"   // the process stops to run at all
	volumeWait   = "/wait"   // the create takes until its context ends
	volumeHelper = "/helper" // the sandbox is a process in the plugin's own group
	volumeDetach = "/detach" // the sandbox is a process in a session of its own
	volumeTwin   = "/twin"   // the sandbox has the container of every other such one
)

func newStub() *stub { return &stub{sandboxes: map[string]runtime.Sandbox{}} }

// newStubOfTwins has a sandbox from an earlier life, with the container of every
// twin.
func newStubOfTwins() *stub {
	old := runtime.Sandbox{SessionID: "old", ContainerID: "twin", State: runtime.StateRunning}
	return &stub{sandboxes: map[string]runtime.Sandbox{old.SessionID: old}}
}

func (s *stub) Info(context.Context) (runtime.Info, error) {
	return runtime.Info{
		Name:         "stub",
		Version:      "0.1.0",
		Variant:      s.variant(),
		ConfigSchema: []byte(`{"type":"object","properties":{"slots":{"type":"integer"}},"additionalProperties":false}`),
	}, nil
}

// variant is what the file variantFile has, and the configuration.
func (s *stub) variant() string {
	if s.config.Instance == "" {
		return "not configured"
	}
	build, _ := os.ReadFile(os.Getenv(variantFile)) // without a file it is empty
	return string(build) + string(s.config.JSON)
}

func (s *stub) Configure(_ context.Context, config runtime.Config) error {
	if strings.Contains(string(config.JSON), "13") {
		return fmt.Errorf("%w: 13 slots are unlucky", runtime.ErrInvalid)
	}
	s.config = config
	return nil
}

// Health tells the configuration, so that a test can see it.
func (s *stub) Health(context.Context) error {
	return fmt.Errorf("instance %s, configuration %s, environment %q", s.config.Instance, s.config.JSON, os.Environ())
}

func (s *stub) Create(ctx context.Context, spec runtime.Spec, _ func(runtime.Stage)) (runtime.Sandbox, error) {
	container := "container of " + spec.SessionID
	switch spec.VolumeHostPath {
	case volumeCrash:
		panic("engine on fire")
	case volumeHang:
		if err := syscall.Kill(os.Getpid(), syscall.SIGSTOP); err != nil {
			return runtime.Sandbox{}, err
		}
		block() // the signal takes its time
	case volumeWait:
		<-ctx.Done()
		return runtime.Sandbox{}, ctx.Err()
	case volumeHelper, volumeDetach:
		sleep := exec.Command("sleep", "1000")
		sleep.Stdout, sleep.Stderr = os.NewFile(1, "stdout"), os.NewFile(2, "stderr")
		sleep.SysProcAttr = &syscall.SysProcAttr{Setsid: spec.VolumeHostPath == volumeDetach}
		if err := sleep.Start(); err != nil {
			return runtime.Sandbox{}, err
		}
		container = fmt.Sprint(sleep.Process.Pid)
	case volumeTwin:
		container = "twin"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sandboxes[spec.SessionID] = runtime.Sandbox{
		SessionID: spec.SessionID, ChatID: spec.ChatID, Pool: spec.Pool, ContainerID: container, State: runtime.StateRunning,
		Endpoint: runtime.Endpoint{IP: netip.MustParseAddr("127.0.0.1"), Port: 1},
	}
	return s.sandboxes[spec.SessionID], nil
}

// Claim gives a spare to a chat, as a Create for the volume would go.
func (s *stub) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	spare, err := s.Inspect(ctx, spec.SessionID)
	switch {
	case err != nil:
		return runtime.Sandbox{}, err
	case spare.Pool == "":
		return runtime.Sandbox{}, fmt.Errorf("%w: not a spare", runtime.ErrConflict)
	}
	claimed, err := s.Create(ctx, spec, func(runtime.Stage) {})
	claimed.Pool = spare.Pool
	return claimed, err
}

func (s *stub) Stop(ctx context.Context, id string) error { return s.Delete(ctx, id) }

func (s *stub) Delete(_ context.Context, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sandboxes, id)
	return nil
}

func (s *stub) Inspect(_ context.Context, id string) (runtime.Sandbox, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sandbox, ok := s.sandboxes[id]; ok {
		return sandbox, nil
	}
	return runtime.Sandbox{}, runtime.ErrNotFound
}

// Exec copies its input, or crashes. There are no Logs.
func (s *stub) Exec(ctx context.Context, id string, command runtime.Command, streams runtime.Streams) (int, error) {
	if _, err := s.Inspect(ctx, id); err != nil {
		return 0, err
	}
	if command.Args[0] == volumeCrash {
		panic("engine on fire")
	}
	_, err := io.Copy(streams.Stdout, streams.Stdin)
	return 7, err
}

func (s *stub) Explain(ctx context.Context, id string) ([]runtime.Happening, error) {
	_, err := s.Inspect(ctx, id)
	return []runtime.Happening{{Text: "made"}}, err
}

func (s *stub) List(context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		s.mu.Lock()
		all := slices.Collect(maps.Values(s.sandboxes))
		s.mu.Unlock()
		for _, sandbox := range all {
			if !yield(sandbox, nil) {
				return
			}
		}
	}
}

// liar gives answers that Serve would not let pass.
type liar struct {
	runtimev1.UnimplementedDriverServiceServer
}

func (*liar) Info(context.Context, *runtimev1.InfoRequest) (*runtimev1.InfoResponse, error) {
	return &runtimev1.InfoResponse{Name: "liar"}, nil
}

func (*liar) Inspect(_ context.Context, req *runtimev1.InspectRequest) (*runtimev1.InspectResponse, error) {
	sandbox := &runtimev1.Sandbox{SessionId: req.GetSessionId(), ContainerId: "c", State: runtimev1.State_STATE_RUNNING}
	switch req.GetSessionId() {
	case "huge":
		sandbox.Reason = strings.Repeat("r", 100<<20)
	case "nowhere":
		sandbox.Endpoint = &runtimev1.Endpoint{Ip: "localhost", Port: 80}
	}
	return &runtimev1.InspectResponse{Sandbox: sandbox}, nil
}

func (*liar) List(_ *runtimev1.ListRequest, stream grpc.ServerStreamingServer[runtimev1.ListResponse]) error {
	one := &runtimev1.Sandbox{SessionId: "s", ContainerId: "c", State: runtimev1.State_STATE_RUNNING}
	batch := &runtimev1.ListResponse{Sandboxes: slices.Repeat([]*runtimev1.Sandbox{one}, 1000)}
	for range 2000 {
		if err := stream.Send(batch); err != nil {
			return err
		}
	}
	return nil
}

// serveRaw serves without the checks and limits of Serve.
func serveRaw(service runtimev1.DriverServiceServer, intercept grpc.UnaryServerInterceptor) {
	goplugin.Serve(&goplugin.ServeConfig{
		HandshakeConfig:  goplugin.HandshakeConfig{MagicCookieKey: wire.CookieKey, MagicCookieValue: wire.CookieValue},
		VersionedPlugins: map[int]goplugin.PluginSet{wire.ProtocolVersion: {"raw": &raw{service: service}}},
		Logger:           hclog.NewNullLogger(),
		GRPCServer: func(opts []grpc.ServerOption) *grpc.Server {
			if intercept != nil {
				opts = append(opts, grpc.UnaryInterceptor(intercept))
			}
			return grpc.NewServer(opts...)
		},
	})
}

func hang(ctx context.Context, _ any, _ *grpc.UnaryServerInfo, _ grpc.UnaryHandler) (any, error) {
	block()
	return nil, ctx.Err()
}

type raw struct {
	goplugin.NetRPCUnsupportedPlugin
	service runtimev1.DriverServiceServer
}

func (r *raw) GRPCServer(_ *goplugin.GRPCBroker, s *grpc.Server) error {
	runtimev1.RegisterDriverServiceServer(s, r.service)
	return nil
}

func (*raw) GRPCClient(context.Context, *goplugin.GRPCBroker, *grpc.ClientConn) (any, error) {
	return nil, errors.ErrUnsupported
}

// runAsHost is a host with a good plugin, whose process ID it prints.
func runAsHost() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	host, err := New(Config{Instance: "test", Logger: hclog.NewNullLogger(), Plugins: []Plugin{
		{Name: "good", Path: self, Env: map[string]string{role: "good"}},
	}})
	if err != nil {
		panic(err)
	}
	go func() {
		if err := host.AwaitStart(ctx); err != nil {
			panic(err)
		}
		fmt.Println(host.Status()[0].PID)
	}()
	host.Run(ctx)
}
