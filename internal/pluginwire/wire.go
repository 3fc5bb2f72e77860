// Package pluginwire is the protocol between Bivouac and runtime plugins: both
// sides of the gRPC service, and what they tell go-plugin. Package runtime/plugin
// documents the protocol.
//
// The plugin's side serves a [runtime.Driver] with [Serve]. The host's side makes
// a driver of a connection with [NewClient]. How a plugin's process is started and
// restarted is not known here.
package pluginwire

import (
	"context"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

// The handshake, as package runtime/plugin describes it.
const (
	ProtocolVersion = 1
	CookieKey       = "BIVOUAC_RUNTIME_PLUGIN"
	CookieValue     = "2d8c7528-8d4c-4544-9587-215db8490912"
)

// DropMarksKey is the variable by which a plugin's process is told
// [runtime.Config].DropMarks: "1" if so.
const DropMarksKey = "BIVOUAC_DROP_MARKS"

const (
	// MaxMessage is the size limit of a message, in bytes, in both directions.
	MaxMessage = 1 << 20
	// maxHeaders bounds a call's headers and trailers, in bytes. An error's
	// text and details travel there.
	maxHeaders = 64 << 10
)

// dispenseName is under which name go-plugin knows the driver. It never goes
// over the wire.
const dispenseName = "runtime"

// Serve serves driver to the host that started this process, and returns when
// the host has told it to end.
func Serve(driver runtime.Driver, log hclog.Logger) {
	goplugin.Serve(&goplugin.ServeConfig{
		HandshakeConfig:  handshake(),
		VersionedPlugins: versions(driver),
		Logger:           log,
		GRPCServer: func(opts []grpc.ServerOption) *grpc.Server {
			return grpc.NewServer(append(opts, serverOptions()...)...)
		},
	})
}

// ClientConfig is what a host needs to know of the protocol. The host adds how
// the process is started and gives the result to [goplugin.NewClient];
// [NewClient] makes a driver of its connection.
func ClientConfig() *goplugin.ClientConfig {
	return &goplugin.ClientConfig{
		HandshakeConfig:  handshake(),
		VersionedPlugins: versions(nil),
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		AutoMTLS:         true,
		SkipHostEnv:      true,
		GRPCDialOptions:  dialOptions(),
	}
}

func handshake() goplugin.HandshakeConfig {
	return goplugin.HandshakeConfig{MagicCookieKey: CookieKey, MagicCookieValue: CookieValue}
}

// versions is every version of the protocol that is spoken here. Both sides
// give theirs, and the newest common one wins.
func versions(driver runtime.Driver) map[int]goplugin.PluginSet {
	return map[int]goplugin.PluginSet{
		ProtocolVersion: {dispenseName: &v1{driver: driver}},
	}
}

func serverOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(MaxMessage),
		grpc.MaxSendMsgSize(MaxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
	}
}

func dialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage)),
		grpc.WithMaxHeaderListSize(maxHeaders),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(), // a call that may have been applied is repeated by nobody but the host
	}
}

// v1 is version 1 of the protocol as go-plugin wants to see it.
type v1 struct {
	goplugin.NetRPCUnsupportedPlugin
	driver runtime.Driver // nil in the host
}

// GRPCServer serves the driver, in the plugin.
func (p *v1) GRPCServer(_ *goplugin.GRPCBroker, s *grpc.Server) error {
	runtimev1.RegisterDriverServiceServer(s, &server{driver: p.driver})
	return nil
}

// GRPCClient gives the connection to the plugin. The host has it already.
func (*v1) GRPCClient(_ context.Context, _ *goplugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	return conn, nil
}
