package plugin

import (
	"context"
	"fmt"
	"os"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

// The values of the handshake that the package comment describes.
const (
	ProtocolVersion = 1
	CookieKey       = "BIVOUAC_RUNTIME_PLUGIN"
	CookieValue     = "2d8c7528-8d4c-4544-9587-215db8490912"
)

// DropMarksKey is the environment variable that sets [runtime.Config].DropMarks in a
// plugin: "1" means true.
const DropMarksKey = "BIVOUAC_DROP_MARKS"

const (
	// MaxMessage is the size limit of a message, in bytes, in both directions.
	MaxMessage = 1 << 20
	// maxHeaders bounds a call's headers and trailers, in bytes. They contain an
	// error's text and details.
	maxHeaders = 64 << 10
)

// dispenseName is go-plugin's name for the driver. It is not sent over the network.
const dispenseName = "runtime"

// Serve serves driver to the host that started this process, and returns after the
// host has asked it to end. Call it last in a plugin's main. If no host started the
// process, Serve prints how to use it and exits with code 1.
func Serve(driver runtime.Driver) {
	if os.Getenv(CookieKey) != CookieValue {
		fmt.Fprintln(os.Stderr, "This is a runtime plugin. Bivouac starts it by itself. To try it:\n"+
			"  bivouac plugin run PATH\n  bivouac plugin verify PATH")
		// goplugin.Serve prints more and exits.
	}
	goplugin.Serve(&goplugin.ServeConfig{
		HandshakeConfig:  handshake(),
		VersionedPlugins: versions(driver),
		Logger:           NewLogger().Named("go-plugin"),
		GRPCServer: func(opts []grpc.ServerOption) *grpc.Server {
			return grpc.NewServer(append(opts, serverOptions()...)...)
		},
	})
}

// NewLogger returns a logger whose lines appear in the host's log, with their level and
// values. The host's log level decides which are shown.
func NewLogger() hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{
		Level:      hclog.Trace,
		Output:     os.Stderr,
		JSONFormat: true,
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

// versions returns all supported versions of the protocol. The newest that both sides
// support is used.
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
		grpc.WithDisableRetry(), // a call may have been applied: only the host may repeat it
	}
}

// v1 is version 1 of the protocol, in go-plugin's form.
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
