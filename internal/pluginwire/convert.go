package pluginwire

import (
	"encoding/json"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"unicode"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

// The limits of a plugin's answers, in bytes.
const (
	maxID           = 256
	maxVersion      = 64
	maxVariant      = 64
	maxReason       = 4 << 10
	maxConfigSchema = 256 << 10
	maxAbilities    = 64
	maxHappening    = 4 << 10
	maxHappenings   = 100 // not bytes
)

var stages = map[runtime.Stage]runtimev1.Stage{
	runtime.StagePlaced:  runtimev1.Stage_STAGE_PLACED,
	runtime.StageStarted: runtimev1.Stage_STAGE_STARTED,
	runtime.StageReady:   runtimev1.Stage_STAGE_READY,
}

var states = map[runtime.State]runtimev1.State{
	runtime.StateStarting: runtimev1.State_STATE_STARTING,
	runtime.StateRunning:  runtimev1.State_STATE_RUNNING,
	runtime.StateDead:     runtimev1.State_STATE_DEAD,
	runtime.StateLost:     runtimev1.State_STATE_LOST,
}

var streams = map[runtime.LogStream]runtimev1.OutputStream{
	runtime.Stdout: runtimev1.OutputStream_OUTPUT_STREAM_STDOUT,
	runtime.Stderr: runtimev1.OutputStream_OUTPUT_STREAM_STDERR,
}

// keyOf returns the key of value, and false if there is none.
func keyOf[K, V comparable](m map[K]V, value V) (K, bool) {
	for k, v := range m {
		if v == value {
			return k, true
		}
	}
	var none K
	return none, false
}

func infoToProto(info runtime.Info, abilities []runtime.Ability) *runtimev1.InfoResponse {
	answer := &runtimev1.InfoResponse{
		Name:         info.Name,
		Version:      info.Version,
		ConfigSchema: string(info.ConfigSchema),
		Variant:      info.Variant,
	}
	for _, ability := range abilities {
		answer.Abilities = append(answer.Abilities, string(ability))
	}
	return answer
}

func infoFromProto(answer *runtimev1.InfoResponse) (runtime.Info, error) {
	schema := json.RawMessage(answer.GetConfigSchema())
	switch {
	case !runtime.ValidName(answer.GetName()):
		return runtime.Info{}, broken("its name %.70q is not 1 to 64 of a-z, 0-9 and '-', or begins with '-'", answer.GetName())
	case len(answer.GetVersion()) > maxVersion || hasControl(answer.GetVersion()):
		return runtime.Info{}, broken("its version %.70q is over %d bytes or has control characters", answer.GetVersion(), maxVersion)
	case len(answer.GetVariant()) > maxVariant || !isPrintable(answer.GetVariant()):
		return runtime.Info{}, broken("its variant %.70q is over %d bytes or not printable ASCII", answer.GetVariant(), maxVariant)
	case len(answer.GetAbilities()) > maxAbilities:
		return runtime.Info{}, broken("it declares %d abilities", len(answer.GetAbilities()))
	case len(schema) > maxConfigSchema:
		return runtime.Info{}, broken("its configuration schema is over %d bytes", maxConfigSchema)
	case len(schema) > 0 && !json.Valid(schema):
		return runtime.Info{}, broken("its configuration schema is not JSON")
	}
	info := runtime.Info{
		Name:         answer.GetName(),
		Version:      answer.GetVersion(),
		Abilities:    []runtime.Ability{},
		ConfigSchema: schema,
		Variant:      answer.GetVariant(),
	}
	for _, name := range answer.GetAbilities() {
		switch ability := runtime.Ability(name); ability {
		case runtime.AbilityClaim, runtime.AbilityConfigure, runtime.AbilityExec, runtime.AbilityExplain,
			runtime.AbilityHealth, runtime.AbilityLogs, runtime.AbilityWatch:
			info.Abilities = append(info.Abilities, ability)
		}
	}
	return info, nil
}

func specToProto(spec runtime.Spec) *runtimev1.Spec {
	return &runtimev1.Spec{
		SessionId:      spec.SessionID,
		ChatId:         spec.ChatID,
		AgentId:        spec.AgentID,
		VolumeHostPath: spec.VolumeHostPath,
		CreatedAt:      timestamppb.New(spec.CreatedAt),
		ExpiresAt:      timestamppb.New(spec.ExpiresAt),
		Owner:          spec.Owner,
		Labels:         spec.Labels,
		AccessToken:    string(spec.AccessToken),
		Pool:           spec.Pool,
	}
}

func specFromProto(spec *runtimev1.Spec) (runtime.Spec, error) {
	if spec.GetSessionId() == "" {
		return runtime.Spec{}, fmt.Errorf("%w: no session ID", runtime.ErrInvalid)
	}
	return runtime.Spec{
		SessionID:      spec.GetSessionId(),
		ChatID:         spec.GetChatId(),
		AgentID:        spec.GetAgentId(),
		VolumeHostPath: spec.GetVolumeHostPath(),
		CreatedAt:      spec.GetCreatedAt().AsTime(),
		ExpiresAt:      spec.GetExpiresAt().AsTime(),
		Owner:          spec.GetOwner(),
		Labels:         spec.GetLabels(),
		AccessToken:    runtime.Secret(spec.GetAccessToken()),
		Pool:           spec.GetPool(),
	}, nil
}

func sandboxToProto(sandbox runtime.Sandbox) *runtimev1.Sandbox {
	answer := &runtimev1.Sandbox{
		SessionId:   sandbox.SessionID,
		ChatId:      sandbox.ChatID,
		ContainerId: sandbox.ContainerID,
		State:       states[sandbox.State],
		Reason:      limitText(sandbox.Reason, maxReason),
		Pool:        sandbox.Pool,
	}
	if sandbox.Endpoint != (runtime.Endpoint{}) {
		answer.Endpoint = &runtimev1.Endpoint{Port: uint32(sandbox.Endpoint.Port)}
		if sandbox.Endpoint.IP.IsValid() {
			answer.Endpoint.Ip = sandbox.Endpoint.IP.String()
		}
	}
	return answer
}

// sandboxFromProto decodes a sandbox, and refuses one that the host cannot rely on. wantID
// is the requested session ID; empty accepts any.
func sandboxFromProto(answer *runtimev1.Sandbox, wantID string) (runtime.Sandbox, error) {
	id := answer.GetSessionId()
	state, known := keyOf(states, answer.GetState())
	switch {
	case answer == nil:
		return runtime.Sandbox{}, broken("it answered without a sandbox")
	case wantID != "" && id != wantID:
		return runtime.Sandbox{}, broken("asked for session %s, it answered for session %.70q", wantID, id)
	case id == "" || len(id) > maxID || hasControl(id):
		return runtime.Sandbox{}, broken("session ID %.70q is not 1 to %d bytes without control characters", id, maxID)
	case len(answer.GetContainerId()) > maxID || hasControl(answer.GetContainerId()):
		return runtime.Sandbox{}, broken("session %s: container ID %.70q is over %d bytes or has control characters", id, answer.GetContainerId(), maxID)
	case len(answer.GetChatId()) > maxID || hasControl(answer.GetChatId()):
		return runtime.Sandbox{}, broken("session %s: chat ID %.70q is over %d bytes or has control characters", id, answer.GetChatId(), maxID)
	case answer.GetPool() != "" && !runtime.ValidName(answer.GetPool()):
		return runtime.Sandbox{}, broken("session %s: pool %.70q is not a valid name", id, answer.GetPool())
	case !known:
		return runtime.Sandbox{}, broken("session %s: unknown state %d", id, answer.GetState())
	}
	endpoint, err := endpointFromProto(answer.GetEndpoint())
	if err != nil {
		return runtime.Sandbox{}, broken("session %s: %w", id, err)
	}
	return runtime.Sandbox{
		SessionID:   id,
		ChatID:      answer.GetChatId(),
		ContainerID: answer.GetContainerId(),
		Endpoint:    endpoint,
		State:       state,
		Reason:      oneLine(limitText(answer.GetReason(), maxReason)),
		Pool:        answer.GetPool(),
	}, nil
}

func endpointFromProto(answer *runtimev1.Endpoint) (runtime.Endpoint, error) {
	if answer == nil {
		return runtime.Endpoint{}, nil
	}
	ip, err := netip.ParseAddr(answer.GetIp())
	switch {
	case err != nil:
		return runtime.Endpoint{}, fmt.Errorf("endpoint IP %.70q is no address", answer.GetIp())
	case ip.IsUnspecified() || ip.IsMulticast() || ip.Zone() != "":
		return runtime.Endpoint{}, fmt.Errorf("endpoint IP %s cannot be connected to", ip)
	case answer.GetPort() < 1 || answer.GetPort() > 65535:
		return runtime.Endpoint{}, fmt.Errorf("endpoint port %d is no port", answer.GetPort())
	}
	return runtime.Endpoint{IP: ip.Unmap(), Port: uint16(answer.GetPort())}, nil //nolint:gosec // it was just found to fit
}

// streamFromProto treats an unknown stream as Stdout.
func streamFromProto(stream runtimev1.OutputStream) runtime.LogStream {
	known, ok := keyOf(streams, stream)
	if !ok {
		return runtime.Stdout
	}
	return known
}

func commandToProto(sessionID string, command runtime.Command) *runtimev1.ExecStart {
	start := &runtimev1.ExecStart{
		SessionId: sessionID,
		Command:   command.Args,
		Env:       command.Env,
		Dir:       command.Dir,
		User:      command.User,
		Task:      command.Task,
		Tty:       command.TTY,
	}
	if command.Size != (runtime.WindowSize{}) {
		start.Size = sizeToProto(command.Size)
	}
	return start
}

func commandFromProto(start *runtimev1.ExecStart) (runtime.Command, error) {
	if len(start.GetCommand()) == 0 {
		return runtime.Command{}, fmt.Errorf("%w: no command", runtime.ErrInvalid)
	}
	return runtime.Command{
		Args: start.GetCommand(),
		Env:  start.GetEnv(),
		Dir:  start.GetDir(),
		User: start.GetUser(),
		Task: start.GetTask(),
		TTY:  start.GetTty(),
		Size: sizeFromProto(start.GetSize()),
	}, nil
}

func sizeToProto(size runtime.WindowSize) *runtimev1.WindowSize {
	return &runtimev1.WindowSize{Rows: uint32(size.Rows), Columns: uint32(size.Columns)}
}

func sizeFromProto(size *runtimev1.WindowSize) runtime.WindowSize {
	return runtime.WindowSize{
		Rows:    uint16(min(size.GetRows(), math.MaxUint16)),
		Columns: uint16(min(size.GetColumns(), math.MaxUint16)),
	}
}

func happeningsToProto(happenings []runtime.Happening) []*runtimev1.Happening {
	var answer []*runtimev1.Happening
	for _, happening := range newest(happenings) {
		told := &runtimev1.Happening{Text: limitText(happening.Text, maxHappening)}
		if !happening.Time.IsZero() {
			told.Time = timestamppb.New(happening.Time)
		}
		answer = append(answer, told)
	}
	return answer
}

func happeningsFromProto(answer []*runtimev1.Happening) []runtime.Happening {
	var happenings []runtime.Happening
	for _, told := range newest(answer) {
		happening := runtime.Happening{Text: oneLine(limitText(told.GetText(), maxHappening))}
		if told.GetTime().IsValid() {
			happening.Time = told.GetTime().AsTime()
		}
		happenings = append(happenings, happening)
	}
	return happenings
}

// newest returns the last of the happenings that may be reported.
func newest[H any](happenings []H) []H {
	return happenings[max(0, len(happenings)-maxHappenings):]
}

func hasControl(s string) bool { return strings.ContainsFunc(s, unicode.IsControl) }

// isPrintable reports whether s is printable ASCII.
func isPrintable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}

// oneLine returns s with control characters replaced by spaces.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
}
