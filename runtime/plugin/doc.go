// Package plugin makes a runtime driver a process of its own, which Bivouac
// starts, asks for sandboxes, and restarts when it fails. It must never know of
// the scheduler, of Nomad or of Consul: an author's build stays small.
//
// # In Go
//
// A plugin is a main that hands a [runtime.Driver] to [Serve]:
//
//	func main() { plugin.Serve(mydriver.New(plugin.NewLogger())) }
//
// Package runtime says what a driver must do. Optional abilities are declared
// by implementing their interfaces: [runtime.Configurer], [runtime.Watcher],
// [runtime.HealthChecker], [runtime.LogReader].
//
// A record that is lost, as by a store that was set back, is not found again for
// a plugin's sandbox: a plugin does not say what its sandboxes were created for,
// nor is it asked for those of one chat. A create then relies on the record alone.
// A sandbox without one is stopped once its chat has another, and else reported.
//
// # In other languages
//
// What follows is all that a plugin needs to speak. The protocol is that of
// HashiCorp's go-plugin, in the form in which it speaks gRPC, with the service
// of proto/v1/runtime.proto.
//
// # Start
//
// The host runs the plugin's file with the configured arguments, in the folder
// "/", with nothing to read on standard input. The environment holds the
// configured variables, a PATH of the system's usual folders unless one is
// configured, and:
//
//	BIVOUAC_RUNTIME_PLUGIN    2d8c7528-8d4c-4544-9587-215db8490912
//	PLUGIN_PROTOCOL_VERSIONS  the versions that the host speaks, by comma: "1"
//	PLUGIN_CLIENT_CERT        the host's certificate, as PEM
//	PLUGIN_UNIX_SOCKET_DIR    a folder for the plugin's socket, empty
//	PLUGIN_MIN_PORT           for a TCP port instead: at least this
//	PLUGIN_MAX_PORT           and at most this
//	BIVOUAC_DROP_MARKS        "1" if all marks of used session IDs may go, see
//	                          "Marks"; else not there
//
// Nothing of the host's own environment is passed on. Where
// BIVOUAC_RUNTIME_PLUGIN does not have this value a plugin was started by
// mistake: it says so and ends with code 1. The value is no secret.
//
// # Handshake
//
// The plugin takes the highest version that both sides speak. Where there is
// none it says so on standard error and ends with code 1. Else it makes a
// certificate, listens, and only then prints one line to standard output, of
// six fields with bars between them, and flushes it:
//
//	1|1|unix|/tmp/plugin-dir1234/plugin|grpc|MIICRjCCAc2gAwIBAgIQNn…
//
//	1  version of go-plugin's own protocol: 1
//	2  version of Bivouac's runtime protocol, as taken
//	3  "unix", or "tcp" for an address on loopback
//	4  the absolute path of the socket, or "127.0.0.1:PORT"
//	5  "grpc"
//	6  the plugin's certificate: DER in standard base64 without '=' padding
//
// The line is at most 16 KiB. Whatever is printed to standard output after it,
// and to standard error at any time, goes into the host's log: a line that is a
// JSON object with "@message" and "@level" ("trace", "debug", "info", "warn",
// "error") with its level and other keys, any other line as it is. Lines are cut
// at 8 KiB, and what is more than 500 lines in a second is dropped.
//
// # TLS
//
// Both sides prove who they are by certificates that are made afresh for each
// process, TLS 1.2 or newer with ALPN "h2". The plugin's certificate is
// self-signed, names the DNS name "localhost" (go-plugin connects by that name),
// is its own authority (basic constraints CA:TRUE, key usage with certificate
// signing), and allows server authentication. As a server the plugin demands a
// client certificate and trusts PLUGIN_CLIENT_CERT alone. Any key will do that
// both TLS libraries accept.
//
// The host's certificate is made by go-plugin: self-signed, ECDSA on P-521,
// CA:TRUE, and used as the client's certificate itself. So a plugin's TLS library
// needs P-521. A library that does not take an authority for a client, or has no
// way to trust one certificate, can do this instead: compare the DER of what the
// client presents with that in PLUGIN_CLIENT_CERT, byte by byte, and verify the
// signature of the handshake with its key.
//
// # Services
//
// The plugin serves over that one listener:
//
//   - bivouac.runtime.v1.DriverService, as in proto/v1/runtime.proto. Calls
//     come concurrently, and a server needs room for 128 Creates of each replica
//     that asks it, up to about 1,024 Inspects, one Watch and one StreamStdio,
//     which last as long as the process, and Stops and Deletes beside them. The
//     deadline of a call is that of gRPC (header grpc-timeout), and the
//     cancellation too.
//   - grpc.health.v1.Health: Check with service "plugin" answers SERVING. It must
//     not wait in line behind other calls: where it does, a plugin that is busy
//     is taken for hung.
//   - plugin.GRPCController: "rpc Shutdown(Empty) returns (Empty)", where Empty
//     is a message without fields. The plugin answers and ends its process.
//   - plugin.GRPCStdio: "rpc StreamStdio(google.protobuf.Empty) returns (stream
//     StdioData)", where StdioData is { Channel channel = 1; bytes data = 2; }
//     and Channel is { INVALID = 0; STDOUT = 1; STDERR = 2; }. It is for plugins
//     that catch their own output. All others do without it, or leave the
//     stream open and send nothing.
//
// go-plugin's plugin.GRPCBroker is tried by its client and not needed here: a
// server that does not know it answers UNIMPLEMENTED, as gRPC does by itself.
//
// A message is at most 1 MiB in both directions, and a call's headers and
// trailers are at most 64 KiB. List is a stream, so that many sandboxes fit.
//
// # Limits of answers
//
// An answer that breaks one of these is refused, and counts as ErrUnavailable:
//
//   - a List has at most 250,000 sandboxes, and a Create's answer at most 64
//     messages, the sandbox included;
//   - a Create's sandbox has a container ID, an endpoint, the chat ID of the spec
//     and the state running;
//   - IDs are at most 256 bytes without control characters;
//   - an endpoint's IP is an address as text, not unspecified (0.0.0.0), not
//     multicast and without a zone, and its port is 1 to 65535;
//   - Info has a version of at most 64 bytes, at most 64 abilities, of which
//     unknown ones are passed over, and a configuration schema of at most 256
//     KiB;
//   - a container is one session's: one that is running and known as that of
//     another session is refused.
//
// Of a sandbox's reason 4 KiB are kept, and of an error's text 8 KiB.
//
// # Errors
//
// A call fails with a gRPC status, whose message is for a person. Its code says
// what the host may do next:
//
//	FAILED_PRECONDITION  runtime.ErrNotPlaced
//	NOT_FOUND            runtime.ErrNotFound
//	ALREADY_EXISTS       runtime.ErrConflict
//	ABORTED              runtime.ErrNotReady
//	OUT_OF_RANGE         runtime.ErrNotStopped
//	INVALID_ARGUMENT     runtime.ErrInvalid
//	UNAVAILABLE          runtime.ErrUnavailable
//
// Any other code means ErrUnavailable too, unless it reports that the host's
// own deadline has passed or that the host has cancelled the call. Where an
// error is of several kinds, bivouac.runtime.v1.ErrorDetail among the details
// of the status names them all.
//
// # Marks
//
// A plugin marks each session ID that Stop or Delete was called for, and keeps
// the mark for an hour after the Delete. It removes older marks of its instance at
// each List, which the host asks for soon after the start and then regularly.
// "bivouac plugin verify" starts the plugin once more when it is done, with
// BIVOUAC_DROP_MARKS=1, and asks for a List. After that no mark of the instance is
// left.
//
// # Life cycle
//
// The host calls Check of the health service, Info, and Configure where the
// plugin declares it, in this order, and nothing else before they succeeded.
// From the start of the process to that point a plugin has 30 seconds. A
// Configure that fails with INVALID_ARGUMENT says what is wrong with the
// configuration.
//
// Then it asks for a List once, to learn what there is. From then on any call
// may come at any time. The host asks Check every 5
// seconds and gives it 5 seconds to answer; after two failures in a row it takes
// the plugin for hung and kills it with SIGKILL.
//
// When the process ends or is killed, calls under way fail for their callers
// with ErrUnavailable, and so do all others at once until the plugin is up
// again. The host starts a new process after a pause of 25 ms, which doubles
// with each failure up to 30 seconds and is short again once a process ran for a
// minute. The new process is told everything anew and knows nothing but what it
// finds by itself; its List and Inspect must find the sandboxes of the one
// before.
//
// To end a plugin the host calls Shutdown and kills it 5 seconds later if it is
// still there. Sandboxes are not stopped.
//
// Each process is the leader of a process group of its own. Whatever is in the
// group the host kills when the plugin has ended, in whatever way; so a sandbox
// that is a child of the plugin must be in a session of its own (setsid) and must
// not hold the plugin's standard output and error.
//
// When the host itself dies by a crash or SIGKILL, nobody is left to do that. On
// Linux the kernel then kills the plugin's first process with SIGKILL, and that
// one alone: helpers that it has started run on. A plugin that has any sees to
// their end, by PR_SET_PDEATHSIG or by a pipe whose other end only the plugin
// holds. On other systems the plugin itself runs on too, and should end when its
// connection does.
package plugin
