// Package pluginwire implements the protocol between Bivouac and runtime plugins: both
// sides of the gRPC service, and their settings for go-plugin. Package runtime/plugin
// documents the protocol.
//
// The plugin serves a [runtime.Driver] with [Serve]. The host makes a driver from a
// connection with [NewClient].
//
// The package does not start or restart plugin processes.
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

// DropMarksKey is the environment variable that sets [runtime.Config].DropMarks in a
// plugin's process. "1" means true.
const DropMarksKey = "BIVOUAC_DROP_MARKS"

const (
	// MaxMessage is the size limit of a message, in bytes, in both directions.
	MaxMessage = 1 << 20
	// maxHeaders bounds a call's headers and trailers, in bytes. They contain an
	// error's text and details.
	maxHeaders = 64 << 10
)

// dispenseName is go-plugin's name for the driver. It is never sent.
const dispenseName = "runtime"

// Serve serves driver to the host that started this process. It returns when the host
// asks the process to end.
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

// ClientConfig returns the protocol's settings for a host. The host adds how to start
// the process and passes the result to [goplugin.NewClient]. [NewClient] then makes a
// driver from the connection.
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

// versions returns every supported version of the protocol. Both sides list theirs, and
// the newest common one is used.
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
		grpc.WithDisableRetry(), // only the host may repeat a call that may have been applied
	}
}

// v1 is version 1 of the protocol as a go-plugin plugin.
type v1 struct {
	goplugin.NetRPCUnsupportedPlugin
	driver runtime.Driver // nil in the host
}

// GRPCServer registers the driver's service in the plugin.
func (p *v1) GRPCServer(_ *goplugin.GRPCBroker, s *grpc.Server) error {
	runtimev1.RegisterDriverServiceServer(s, &server{driver: p.driver})
	return nil
}

// GRPCClient returns the connection to the plugin. The host makes its driver from that.
func (*v1) GRPCClient(_ context.Context, _ *goplugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	return conn, nil
}
