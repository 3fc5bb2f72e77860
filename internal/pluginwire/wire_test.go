package pluginwire

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shoenig/test/must"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

// fake is a driver whose answers a test decides. It has every ability.
type fake struct {
	info    func() (runtime.Info, error)
	create  func(context.Context, runtime.Spec, func(runtime.Stage)) (runtime.Sandbox, error)
	end     func(ctx context.Context, sessionID string) error
	inspect func(ctx context.Context, sessionID string) (runtime.Sandbox, error)
	list    func(context.Context) iter.Seq2[runtime.Sandbox, error]
	watch   func(context.Context, func(runtime.Sandbox)) error
	logs    func(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error]
	exec    func(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error)
	explain func(ctx context.Context, sessionID string) ([]runtime.Happening, error)
	claim   func(context.Context, runtime.Spec) (runtime.Sandbox, error)
	config  func(runtime.Config) error
	health  func() error
}

func (f *fake) Info(context.Context) (runtime.Info, error) {
	if f.info == nil {
		return runtime.Info{Name: "fake", Version: "1.2.3"}, nil
	}
	return f.info()
}
func (f *fake) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	return f.create(ctx, spec, progress)
}
func (f *fake) Stop(ctx context.Context, id string) error   { return f.end(ctx, id) }
func (f *fake) Delete(ctx context.Context, id string) error { return f.end(ctx, id) }
func (f *fake) Inspect(ctx context.Context, id string) (runtime.Sandbox, error) {
	return f.inspect(ctx, id)
}
func (f *fake) List(ctx context.Context) iter.Seq2[runtime.Sandbox, error] { return f.list(ctx) }
func (f *fake) Watch(ctx context.Context, changed func(runtime.Sandbox)) error {
	return f.watch(ctx, changed)
}
func (f *fake) Logs(ctx context.Context, id string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	return f.logs(ctx, id, query)
}
func (f *fake) Exec(ctx context.Context, id string, command runtime.Command, streams runtime.Streams) (int, error) {
	return f.exec(ctx, id, command, streams)
}
func (f *fake) Explain(ctx context.Context, id string) ([]runtime.Happening, error) {
	return f.explain(ctx, id)
}
func (f *fake) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	return f.claim(ctx, spec)
}
func (f *fake) Configure(_ context.Context, config runtime.Config) error { return f.config(config) }
func (f *fake) Health(context.Context) error                             { return f.health() }

// bare is a driver without any ability.
type bare struct{ runtime.Driver }

var sandbox = runtime.Sandbox{
	SessionID:   "5ad5b7a5-8d0d-4a36-8b53-6a4f7f4b7b11",
	ChatID:      "0c9f7d54-7f4a-4b0c-9a28-4f0d7c6c1a22",
	ContainerID: "c0ffee",
	Endpoint:    runtime.Endpoint{IP: netip.MustParseAddr("10.0.0.7"), Port: 8080},
	State:       runtime.StateRunning,
}

var spec = runtime.Spec{
	SessionID:      sandbox.SessionID,
	ChatID:         sandbox.ChatID,
	AgentID:        "agent é 1",
	VolumeHostPath: "/srv/a b/ü",
	CreatedAt:      time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
	ExpiresAt:      time.Date(2026, 1, 2, 3, 34, 5, 6, time.UTC),
	Owner:          "team-a",
	Labels:         map[string]string{"ticket": "4711"},
	AccessToken:    runtime.Secret(strings.Repeat("5e", 32)),
}

// overTheWire serves driver on a connection with the limits of the real one.
func overTheWire(t *testing.T, serve runtimev1.DriverServiceServer) grpc.ClientConnInterface {
	t.Helper()
	listener := bufconn.Listen(1 << 20)
	srv := grpc.NewServer(serverOptions()...)
	runtimev1.RegisterDriverServiceServer(srv, serve)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:plugin", append(dialOptions(),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
	)...)
	must.NoError(t, err)
	t.Cleanup(func() {
		must.NoError(t, conn.Close())
		srv.Stop()
		must.NoError(t, <-served)
	})
	return conn
}

func client(t *testing.T, serve runtimev1.DriverServiceServer) *Client {
	t.Helper()
	c, err := NewClient(t.Context(), overTheWire(t, serve))
	must.NoError(t, err)
	return c
}

func of(driver runtime.Driver) *server { return &server{driver: driver} }

func noProgress(runtime.Stage) {}

func TestCreate_CarriesSpecStagesAndSandbox(t *testing.T) {
	var got runtime.Spec
	c := client(t, of(&fake{create: func(_ context.Context, s runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
		got = s
		progress(runtime.StagePlaced)
		progress("a stage of tomorrow")
		progress(runtime.StageReady)
		return sandbox, nil
	}}))
	var stages []runtime.Stage
	created, err := c.Create(t.Context(), spec, func(s runtime.Stage) { stages = append(stages, s) })
	must.NoError(t, err)
	must.Eq(t, sandbox, created)
	must.Eq(t, spec, got)
	must.Eq(t, []runtime.Stage{runtime.StagePlaced, runtime.StageReady}, stages)
}

func TestCalls_CarryDeadlineAndCancellation(t *testing.T) {
	seen := make(chan error, 1)
	began := make(chan time.Time, 1)
	waits := func(ctx context.Context) error {
		deadline, _ := ctx.Deadline()
		began <- deadline
		<-ctx.Done()
		seen <- ctx.Err()
		return ctx.Err()
	}
	c := client(t, of(&fake{
		create: func(ctx context.Context, _ runtime.Spec, _ func(runtime.Stage)) (runtime.Sandbox, error) {
			return runtime.Sandbox{}, waits(ctx)
		},
		end: func(ctx context.Context, _ string) error { return waits(ctx) },
		inspect: func(ctx context.Context, _ string) (runtime.Sandbox, error) {
			return runtime.Sandbox{}, waits(ctx)
		},
		claim: func(ctx context.Context, _ runtime.Spec) (runtime.Sandbox, error) {
			return runtime.Sandbox{}, waits(ctx)
		},
	}))
	calls := map[string]func(context.Context) error{
		"create":  func(ctx context.Context) error { _, err := c.Create(ctx, spec, noProgress); return err },
		"stop":    func(ctx context.Context) error { return c.Stop(ctx, "s") },
		"delete":  func(ctx context.Context) error { return c.Delete(ctx, "s") },
		"inspect": func(ctx context.Context) error { _, err := c.Inspect(ctx, "s"); return err },
		"claim":   func(ctx context.Context) error { _, err := c.Claim(ctx, spec); return err },
	}
	for name, call := range calls {
		t.Run(name+" is cancelled", func(t *testing.T) {
			deadline := time.Now().Add(5 * time.Second)
			ctx, cancel := context.WithDeadline(t.Context(), deadline)
			defer cancel()
			failed := make(chan error, 1)
			go func() { failed <- call(ctx) }()
			must.Between(t, -time.Second, (<-began).Sub(deadline), time.Second)
			cancel()
			must.ErrorIs(t, <-seen, context.Canceled)
			must.ErrorIs(t, <-failed, context.Canceled)
		})
		t.Run(name+" runs out of time", func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			err := call(ctx)
			<-began
			<-seen
			must.ErrorIs(t, err, context.DeadlineExceeded)
			must.False(t, errors.Is(err, runtime.ErrUnavailable))
		})
	}
}

func TestErrors_KeepKindAndTextOverTheWire(t *testing.T) {
	for _, err := range []error{
		runtime.ErrNotPlaced,
		fmt.Errorf("engine full: %w: 3 of 3 slots used — «voll»", runtime.ErrNotPlaced),
		fmt.Errorf("%w: no container", runtime.ErrNotFound),
		fmt.Errorf("%w: other volume", runtime.ErrConflict),
		fmt.Errorf("%w: %w: port closed", runtime.ErrNotReady, context.DeadlineExceeded),
		fmt.Errorf("%w: %w", runtime.ErrUnavailable, context.Canceled),
		fmt.Errorf("%w: bad path", runtime.ErrInvalid),
		fmt.Errorf("%w: its cleaning up goes on", runtime.ErrNotStopped),
		fmt.Errorf("%w: set log_driver", runtime.ErrLogsDisabled),
	} {
		t.Run(err.Error(), func(t *testing.T) {
			c := client(t, of(&fake{end: func(context.Context, string) error { return err }}))
			got := c.Stop(t.Context(), "s")
			must.EqError(t, got, err.Error())
			must.True(t, IsAnswer(got))
			for _, k := range kinds {
				must.Eq(t, errors.Is(err, k.err), errors.Is(got, k.err), must.Sprintf("as %v", k.err))
			}
		})
	}
}

func TestErrors_OfNoKindAreUnavailable(t *testing.T) {
	for name, err := range map[string]error{
		"plain":                 errors.New("disk on fire"),
		"somebody else's limit": context.DeadlineExceeded,
		"cancelled by nobody":   context.Canceled,
		"unsupported":           fmt.Errorf("not today: %w", errors.ErrUnsupported),
		"long":                  errors.New(strings.Repeat("ü", maxErrorMessage)),
		"not UTF-8":             errors.New("broken \xff text"),
	} {
		t.Run(name, func(t *testing.T) {
			c := client(t, of(&fake{end: func(context.Context, string) error { return err }}))
			got := c.Delete(t.Context(), "s")
			must.ErrorIs(t, got, runtime.ErrUnavailable)
			must.LessEq(t, maxErrorMessage, len(got.Error()))
			must.StrContains(t, got.Error(), limitText(err.Error(), 8))
		})
	}
}

// codeOnly answers each Stop as a plugin in another language may: with a status
// and no detail.
type codeOnly struct {
	server
	code codes.Code
}

func (c *codeOnly) Stop(context.Context, *runtimev1.StopRequest) (*runtimev1.StopResponse, error) {
	return nil, status.Error(c.code, "said by code")
}

func TestErrors_AreToldByTheCodeAlone(t *testing.T) {
	for code, want := range map[codes.Code]error{
		codes.FailedPrecondition: runtime.ErrNotPlaced,
		codes.NotFound:           runtime.ErrNotFound,
		codes.AlreadyExists:      runtime.ErrConflict,
		codes.Aborted:            runtime.ErrNotReady,
		codes.OutOfRange:         runtime.ErrNotStopped,
		codes.DataLoss:           runtime.ErrLogsDisabled,
		codes.InvalidArgument:    runtime.ErrInvalid,
		codes.Unavailable:        runtime.ErrUnavailable,
		// What libraries give out by themselves is never taken for an answer.
		codes.ResourceExhausted: runtime.ErrUnavailable,
		codes.Internal:          runtime.ErrUnavailable,
		codes.Unknown:           runtime.ErrUnavailable,
		codes.Unimplemented:     runtime.ErrUnavailable,
		codes.Canceled:          runtime.ErrUnavailable,
		codes.DeadlineExceeded:  runtime.ErrUnavailable,
	} {
		t.Run(code.String(), func(t *testing.T) {
			c := client(t, &codeOnly{server: server{driver: &fake{}}, code: code})
			err := c.Stop(t.Context(), "s")
			must.ErrorIs(t, err, want)
			must.EqError(t, err, "said by code")
			must.False(t, IsAnswer(err), must.Sprint("it may be of a connection that broke"))
		})
	}
}

func TestList_StreamsWhatOneMessageCouldNotHold(t *testing.T) {
	const n = 20_000
	c := client(t, of(&fake{list: func(context.Context) iter.Seq2[runtime.Sandbox, error] {
		return func(yield func(runtime.Sandbox, error) bool) {
			for i := range n {
				s := sandbox
				s.SessionID = fmt.Sprintf("session-%d", i)
				s.Reason = strings.Repeat("r", 100)
				if !yield(s, nil) {
					return
				}
			}
		}
	}}))
	count := 0
	for s, err := range c.List(t.Context()) {
		must.NoError(t, err)
		must.Eq(t, fmt.Sprintf("session-%d", count), s.SessionID)
		count++
	}
	must.Eq(t, n, count)
}

func TestList_EndsWhereTheCallerStops(t *testing.T) {
	ended := make(chan struct{})
	c := client(t, of(&fake{list: func(ctx context.Context) iter.Seq2[runtime.Sandbox, error] {
		return func(yield func(runtime.Sandbox, error) bool) {
			defer close(ended)
			for yield(sandbox, nil) {
			}
		}
	}}))
	for _, err := range c.List(t.Context()) {
		must.NoError(t, err)
		break
	}
	<-ended
}

func TestList_PassesOnAnErrorAfterWhatCameBefore(t *testing.T) {
	c := client(t, of(&fake{list: func(context.Context) iter.Seq2[runtime.Sandbox, error] {
		return func(yield func(runtime.Sandbox, error) bool) {
			_ = yield(sandbox, nil) && yield(runtime.Sandbox{}, fmt.Errorf("%w: engine gone", runtime.ErrUnavailable))
		}
	}}))
	var listed []runtime.Sandbox
	var last error
	for s, err := range c.List(t.Context()) {
		if last = err; err == nil {
			listed = append(listed, s)
		}
	}
	must.Eq(t, []runtime.Sandbox{sandbox}, listed)
	must.ErrorContains(t, last, "engine gone")
}

func TestAbilities_AreThoseOfTheDriver(t *testing.T) {
	all, err := client(t, of(&fake{})).Info(t.Context())
	must.NoError(t, err)
	must.Eq(t, []runtime.Ability{
		runtime.AbilityClaim, runtime.AbilityConfigure, runtime.AbilityExec, runtime.AbilityExplain,
		runtime.AbilityHealth, runtime.AbilityLogs, runtime.AbilityWatch,
	}, all.Abilities)

	without := client(t, of(bare{&fake{}}))
	none, err := without.Info(t.Context())
	must.NoError(t, err)
	must.Eq(t, []runtime.Ability{}, none.Abilities)

	must.ErrorIs(t, without.Configure(t.Context(), runtime.Config{}), errors.ErrUnsupported)
	must.ErrorIs(t, without.Watch(t.Context(), func(runtime.Sandbox) {}), errors.ErrUnsupported)
	for _, err := range without.Logs(t.Context(), "s", runtime.LogQuery{}) {
		must.ErrorIs(t, err, errors.ErrUnsupported)
	}
	_, err = without.Exec(t.Context(), "s", runtime.Command{Args: []string{"true"}}, runtime.Streams{})
	must.ErrorIs(t, err, errors.ErrUnsupported)
	_, err = without.Explain(t.Context(), "s")
	must.ErrorIs(t, err, errors.ErrUnsupported)
	_, err = without.Claim(t.Context(), spec)
	must.ErrorIs(t, err, errors.ErrUnsupported)
	must.NoError(t, without.Health(t.Context()))
}

func TestConfigure_CarriesInstanceAndConfiguration(t *testing.T) {
	want := runtime.Config{Instance: "west-1", JSON: []byte(`{"socket":"/run/x"}`)}
	var got runtime.Config
	c := client(t, of(&fake{config: func(config runtime.Config) error { got = config; return nil }}))
	must.NoError(t, c.Configure(t.Context(), want))
	must.Eq(t, want, got)
}

func TestWatch_ReportsUntilItsContextEnds(t *testing.T) {
	c := client(t, of(&fake{watch: func(ctx context.Context, changed func(runtime.Sandbox)) error {
		dead := sandbox
		dead.State, dead.Reason = runtime.StateDead, "exit code 137"
		changed(dead)
		<-ctx.Done()
		return ctx.Err()
	}}))
	ctx, cancel := context.WithCancel(t.Context())
	err := c.Watch(ctx, func(s runtime.Sandbox) {
		must.Eq(t, runtime.StateDead, s.State)
		must.Eq(t, "exit code 137", s.Reason)
		cancel()
	})
	must.ErrorIs(t, err, context.Canceled)
}

// liar answers what no driver behind Serve would.
type liar struct {
	runtimev1.UnimplementedDriverServiceServer
	info      *runtimev1.InfoResponse
	create    []*runtimev1.CreateResponse
	inspect   *runtimev1.Sandbox
	listEvery *runtimev1.Sandbox // listed without end
	silent    bool               // answers nothing but Info
}

func (l *liar) Info(context.Context, *runtimev1.InfoRequest) (*runtimev1.InfoResponse, error) {
	if l.info != nil {
		return l.info, nil
	}
	return &runtimev1.InfoResponse{Name: "liar"}, nil
}

func (l *liar) Create(_ *runtimev1.CreateRequest, stream grpc.ServerStreamingServer[runtimev1.CreateResponse]) error {
	for _, resp := range l.create {
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
	return nil
}

func (l *liar) Inspect(ctx context.Context, _ *runtimev1.InspectRequest) (*runtimev1.InspectResponse, error) {
	if l.silent {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return &runtimev1.InspectResponse{Sandbox: l.inspect}, nil
}

func (l *liar) List(_ *runtimev1.ListRequest, stream grpc.ServerStreamingServer[runtimev1.ListResponse]) error {
	if l.silent {
		<-stream.Context().Done()
		return stream.Context().Err()
	}
	batch := &runtimev1.ListResponse{Sandboxes: slices.Repeat([]*runtimev1.Sandbox{l.listEvery}, 1000)}
	for {
		if err := stream.Send(batch); err != nil {
			return err
		}
	}
}

func TestSandbox_ThatCannotBeIsRefused(t *testing.T) {
	good := func() *runtimev1.Sandbox { return sandboxToProto(sandbox) }
	for name, tc := range map[string]struct {
		spoil func(*runtimev1.Sandbox)
		want  string
	}{
		"another session":        {func(s *runtimev1.Sandbox) { s.SessionId = "another" }, `it answered for session "another"`},
		"endpoint no address":    {func(s *runtimev1.Sandbox) { s.Endpoint.Ip = "localhost" }, `endpoint IP "localhost" is no address`},
		"endpoint unspecified":   {func(s *runtimev1.Sandbox) { s.Endpoint.Ip = "0.0.0.0" }, "cannot be connected to"},
		"endpoint port 0":        {func(s *runtimev1.Sandbox) { s.Endpoint.Port = 0 }, "endpoint port 0 is no port"},
		"endpoint port 70000":    {func(s *runtimev1.Sandbox) { s.Endpoint.Port = 70000 }, "endpoint port 70000 is no port"},
		"pool with spaces":       {func(s *runtimev1.Sandbox) { s.Pool = "my pool" }, `pool "my pool" is not a valid name`},
		"created for a pool":     {func(s *runtimev1.Sandbox) { s.Pool = "small" }, `created for pool "small"`},
		"unknown state":          {func(s *runtimev1.Sandbox) { s.State = 99 }, "unknown state 99"},
		"no state":               {func(s *runtimev1.Sandbox) { s.State = 0 }, "unknown state 0"},
		"long container ID":      {func(s *runtimev1.Sandbox) { s.ContainerId = strings.Repeat("c", 300) }, "is over 256 bytes"},
		"container ID with ESC":  {func(s *runtimev1.Sandbox) { s.ContainerId = "\x1b[2J" }, "control characters"},
		"an answer of 100 MB":    {func(s *runtimev1.Sandbox) { s.Reason = strings.Repeat("r", 2<<20) }, "larger than max"},
		"created no container":   {func(s *runtimev1.Sandbox) { s.ContainerId = "" }, "without a container ID"},
		"created no endpoint":    {func(s *runtimev1.Sandbox) { s.Endpoint = nil }, "without an endpoint"},
		"created dead":           {func(s *runtimev1.Sandbox) { s.State = runtimev1.State_STATE_DEAD }, "created and dead"},
		"created lost":           {func(s *runtimev1.Sandbox) { s.State = runtimev1.State_STATE_LOST }, "created and lost"},
		"created starting":       {func(s *runtimev1.Sandbox) { s.State = runtimev1.State_STATE_STARTING }, "created and starting"},
		"created for other chat": {func(s *runtimev1.Sandbox) { s.ChatId = "other" }, `created for chat "other"`},
	} {
		t.Run(name, func(t *testing.T) {
			answer := good()
			tc.spoil(answer)
			c := client(t, &liar{inspect: answer, create: []*runtimev1.CreateResponse{
				{Event: &runtimev1.CreateResponse_Sandbox{Sandbox: answer}},
			}})
			_, err := c.Create(t.Context(), spec, noProgress)
			must.ErrorIs(t, err, runtime.ErrUnavailable)
			must.ErrorContains(t, err, tc.want)
			must.Eq(t, name != "an answer of 100 MB", IsAnswer(err))
			if !strings.HasPrefix(name, "created") {
				_, err = c.Inspect(t.Context(), spec.SessionID)
				must.ErrorIs(t, err, runtime.ErrUnavailable)
				must.ErrorContains(t, err, tc.want)
			}
		})
	}
}

func TestCreate_ThatNeverComesToASandboxIsRefused(t *testing.T) {
	stage := &runtimev1.CreateResponse{Event: &runtimev1.CreateResponse_Stage{Stage: runtimev1.Stage_STAGE_PLACED}}
	for name, answers := range map[string][]*runtimev1.CreateResponse{
		"nothing":         nil,
		"a stage only":    {stage},
		"stages for ever": slices.Repeat([]*runtimev1.CreateResponse{stage}, 10_000),
		"empty messages":  {{}, {}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := client(t, &liar{create: answers}).Create(t.Context(), spec, noProgress)
			must.ErrorIs(t, err, runtime.ErrUnavailable)
			must.ErrorContains(t, err, "sandbox")
		})
	}
}

func TestList_WithoutEndIsCutOff(t *testing.T) {
	c := client(t, &liar{listEvery: sandboxToProto(sandbox)})
	count := 0
	var last error
	for _, err := range c.List(t.Context()) {
		if last = err; err == nil {
			count++
		}
	}
	must.Eq(t, maxSandboxes, count)
	must.ErrorIs(t, last, runtime.ErrUnavailable)
	must.ErrorContains(t, last, "more than 1500000 sandboxes")
}

func TestSilence_IsUnavailableAfterALimit(t *testing.T) {
	c := client(t, &liar{silent: true})
	c.limit = 20 * time.Millisecond
	_, err := c.Inspect(t.Context(), "s")
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	must.ErrorIs(t, err, errNoAnswer)
	for _, err = range c.List(t.Context()) {
	}
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	must.ErrorIs(t, err, errNoAnswer)
}

func TestInfo_ThatCannotBeIsRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		info *runtimev1.InfoResponse
		want string
	}{
		"no name":          {&runtimev1.InfoResponse{}, "its name"},
		"name with spaces": {&runtimev1.InfoResponse{Name: "my driver"}, "its name"},
		"long version":     {&runtimev1.InfoResponse{Name: "x", Version: strings.Repeat("1", 65)}, "its version"},
		"schema no JSON":   {&runtimev1.InfoResponse{Name: "x", ConfigSchema: "{"}, "is not JSON"},
		"schema too long":  {&runtimev1.InfoResponse{Name: "x", ConfigSchema: strings.Repeat(" ", maxConfigSchema+1)}, "schema is over"},
		"long variant":     {&runtimev1.InfoResponse{Name: "x", Variant: strings.Repeat("1", 65)}, "its variant"},
		"variant with é":   {&runtimev1.InfoResponse{Name: "x", Variant: "é"}, "not printable ASCII"},
		"variant with ESC": {&runtimev1.InfoResponse{Name: "x", Variant: "\x1b"}, "not printable ASCII"},
		"many abilities":   {&runtimev1.InfoResponse{Name: "x", Abilities: make([]string, 65)}, "declares 65 abilities"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := NewClient(t.Context(), overTheWire(t, &liar{info: tc.info}))
			must.ErrorIs(t, err, runtime.ErrUnavailable)
			must.ErrorContains(t, err, tc.want)
		})
	}
}

func TestInfo_PassesOverAbilitiesOfTomorrow(t *testing.T) {
	c := client(t, &liar{info: &runtimev1.InfoResponse{Name: "x", Abilities: []string{"teleport", "logs"}}})
	info, err := c.Info(t.Context())
	must.NoError(t, err)
	must.Eq(t, []runtime.Ability{runtime.AbilityLogs}, info.Abilities)
}
