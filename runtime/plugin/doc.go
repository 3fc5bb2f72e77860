// Package plugin runs a runtime driver as a separate process. Bivouac, the host,
// starts the process, calls the driver in it, and restarts it if it fails.
//
// # In Go
//
// A plugin is a program whose main function passes a [runtime.Driver] to [Serve]:
//
//	func main() { plugin.Serve(mydriver.New(plugin.NewLogger())) }
//
// Package runtime says what a driver must do. Optional abilities are declared
// by implementing their interfaces: [runtime.Configurer], [runtime.Watcher],
// [runtime.HealthChecker], [runtime.LogReader], [runtime.Execer],
// [runtime.Explainer], [runtime.Claimer].
//
// If the record of a plugin's sandbox is lost, for example because the store was
// restored from an old snapshot, Bivouac cannot write it again. A plugin does not
// report what its sandboxes were created for, and the host does not ask it for the
// sandboxes of one chat. So a create relies on the record alone. A sandbox without a
// record is stopped once its chat has another session. Until then it is only
// reported.
//
// # In other languages
//
// The rest of this page is all that a plugin has to implement. The protocol is
// HashiCorp's go-plugin over gRPC, with the service in proto/v1/runtime.proto.
//
// # Start
//
// The host runs the plugin's file with the configured arguments, in the directory
// "/" and with an empty standard input. The environment contains the configured
// variables, a PATH of the system's usual directories unless one is configured, and:
//
//	BIVOUAC_RUNTIME_PLUGIN    2d8c7528-8d4c-4544-9587-215db8490912
//	PLUGIN_PROTOCOL_VERSIONS  the versions that the host speaks, separated by commas: "1"
//	PLUGIN_CLIENT_CERT        the host's certificate, as PEM
//	PLUGIN_UNIX_SOCKET_DIR    an empty directory for the plugin's socket
//	PLUGIN_MIN_PORT           the lowest port, if the plugin uses TCP instead
//	PLUGIN_MAX_PORT           the highest port, if the plugin uses TCP instead
//	BIVOUAC_DROP_MARKS        "1" if the plugin may remove all marks of used session
//	                          IDs, see "Marks"; otherwise not set
//
// The host does not pass on its own environment. If BIVOUAC_RUNTIME_PLUGIN does not
// have this value, the plugin was started by mistake: it must print that and exit
// with code 1. The value is not a secret.
//
// # Handshake
//
// The plugin chooses the highest version that both sides speak. If there is none, it
// prints that to standard error and exits with code 1. Otherwise it makes a
// certificate, starts to listen, and then prints one line to standard output and
// flushes it. The line has six fields, separated by "|":
//
//	1|1|unix|/tmp/plugin-dir1234/plugin|grpc|MIICRjCCAc2gAwIBAgIQNn…
//
//	1  version of go-plugin's own protocol: 1
//	2  version of Bivouac's runtime protocol, as chosen
//	3  "unix", or "tcp" for an address on loopback
//	4  the absolute path of the socket, or "127.0.0.1:PORT"
//	5  "grpc"
//	6  the plugin's certificate: DER in standard base64 without '=' padding
//
// The line is at most 16 KiB. Everything that the plugin prints to standard output
// after it, and to standard error at any time, goes to the host's log. A line that
// is a JSON object with "@message" and "@level" ("trace", "debug", "info", "warn",
// "error") is logged with its level and other keys, any other line as it is. The
// host cuts lines at 8 KiB, and drops those above 500 lines per second.
//
// # TLS
//
// Both sides use TLS 1.2 or newer with ALPN "h2", and authenticate with certificates
// that are made for each process. The plugin's certificate is self-signed, has the
// DNS name "localhost" (go-plugin connects by that name), is its own authority (basic
// constraints CA:TRUE, key usage with certificate signing), and allows server
// authentication. The plugin must require a client certificate and trust only
// PLUGIN_CLIENT_CERT. It may use any key that both TLS libraries accept.
//
// go-plugin makes the host's certificate: self-signed, ECDSA on P-521, CA:TRUE. It is
// also the client certificate. So a plugin's TLS library needs P-521. If the library
// does not accept an authority as a client, or cannot trust a single certificate, the
// plugin can do this instead: compare the client certificate's DER byte by byte with
// PLUGIN_CLIENT_CERT, and verify the signature of the handshake with its key.
//
// # Services
//
// The plugin serves over that one listener:
//
//   - bivouac.runtime.v1.DriverService, as in proto/v1/runtime.proto. Calls are
//     concurrent. A server needs room for 128 Creates and Claims of each replica that
//     calls it,
//     for up to about 1,024 Inspects, for one Watch and one StreamStdio, which last as
//     long as the process, for Stops and Deletes, and for as many Execs and Logs as the
//     host allows, which last as long as their callers like. Deadline (header
//     grpc-timeout) and cancellation of a call are gRPC's.
//   - grpc.health.v1.Health: Check with service "plugin" answers SERVING. It must not
//     wait behind other calls. Otherwise the host takes a busy plugin for hung.
//   - plugin.GRPCController: "rpc Shutdown(Empty) returns (Empty)", where Empty
//     is a message without fields. The plugin answers and ends its process.
//   - plugin.GRPCStdio: "rpc StreamStdio(google.protobuf.Empty) returns (stream
//     StdioData)", where StdioData is { Channel channel = 1; bytes data = 2; }
//     and Channel is { INVALID = 0; STDOUT = 1; STDERR = 2; }. It is for plugins that
//     capture their own output. Other plugins leave it out, or leave the stream open
//     and send nothing.
//
// go-plugin's client also calls plugin.GRPCBroker, which is not needed here. A gRPC
// server that does not have it answers UNIMPLEMENTED by itself.
//
// A message is at most 1 MiB in both directions, and a call's headers and trailers
// are at most 64 KiB. List is a stream, so it can return many sandboxes.
//
// # Logs
//
// The ability "logs" is to read one stream of a sandbox's output, from an offset. The
// plugin sends pieces of at most 64 KiB, each with the offset of its first byte, and
// ends the call without an error when there is no more, or with follow when the sandbox
// has ended. A plugin that does not know the request's stream and offset sends both
// streams from the beginning and leaves the offsets unset. The host then drops what it
// did not ask for. It reads the output twice if it asked for an offset.
//
// # Exec
//
// The ability "exec" is to run a command in a running sandbox. The call is a stream in
// both directions. The host sends the start, then pieces of the input of at most 64 KiB,
// the end of the input, and new sizes of the terminal. A size waits behind the input
// before it. The plugin sends pieces of the output, and last the exit code. Neither
// side may buffer more than a few pieces: the plugin reads from the call only when the
// command has taken the input before, and from the command only when the last piece of
// output has been sent. A failure that is known before the command runs, such as a
// missing file, is a status: INVALID_ARGUMENT.
//
// When the call is cancelled, when its deadline passes or when its connection breaks,
// the plugin kills the command with SIGKILL, and its children. The host cancels the call
// when its own caller is gone. If the host dies, the connection breaks.
//
// If the plugin dies, the command must die too. Nothing that runs in the plugin can see to
// that, so it takes something outside that notices: a helper that holds the other end of a
// pipe, as in the examples plugin-docker and plugin-python, or an engine that kills a
// command whose connection breaks. The helper must be in its own session (setsid), because
// the host kills the plugin's process group. A command can escape: a child that hides from
// what the plugin looks for, such as a mark in its environment, is only found by what ends
// the whole sandbox. A plugin that cannot kill a command, for example because its engine
// runs on another machine, must not run it.
//
// If the command ends by itself, the plugin answers at once, even if a child in the
// background still has the output open. Such children belong to the sandbox: Stop ends
// them.
//
// # Explain
//
// The ability "explain" is to tell in words what happened to a sandbox, such as "container
// ended: exit code 137, out of memory". It answers within 10 seconds.
//
// # Claim
//
// The ability "claim" is to start sandboxes before a chat needs them. Such a sandbox is a
// spare. The host makes it with Create, from a spec with a session ID and a pool, and
// without a chat, an AI agent and a volume. Its environment has BIVOUAC_SESSION_FILE
// instead of BIVOUAC_CHAT_ID and BIVOUAC_AGENT_ID: the path of a file that does not exist
// yet. Inspect and List report it with its pool, and all other calls treat it like any
// sandbox. A plugin without the ability never gets a spec with a pool.
//
// Claim gives a spare to a chat. The request has the spec of the chat, with the session
// ID and the access token of the spare. The plugin makes the volume the workspace of the
// running sandbox, and writes the session file, a JSON object:
//
//	{"session_id": "…", "chat_id": "…", "agent_id": "…"}
//
// It answers with the sandbox and the chat ID once the sandbox answers. The host waits 5
// seconds at most. After any error it deletes the sandbox and starts another one for the
// chat.
//
// A spare is for one chat. A repeated Claim with the same spec returns the same sandbox,
// and one with another spec is ALREADY_EXISTS, also if the plugin was killed in the first
// one. So the plugin must write down whom the spare is for before it binds the volume, in
// one step that fails if somebody else was first. A spare that was stopped, or a sandbox
// that is no spare, is ALREADY_EXISTS too. A spare that has ended by itself is ABORTED.
//
// After a Claim the plugin may report the chat of the sandbox in Inspect and List. If it
// cannot change what it has recorded, it reports the spare as before: with its pool and
// without a chat.
//
// A plugin that declares "claim" and "configure" is asked for its Info once more after
// Configure, because the variant may depend on the configuration. The host asks each
// process anew. It ends spares of another variant, and makes new ones.
//
// # Limits of answers
//
// The host treats an answer that breaks one of these limits as ErrUnavailable:
//
//   - a List has at most 1,500,000 sandboxes, and a Create's answer at most 64
//     messages, including the sandbox;
//   - a sandbox that was created or claimed has a container ID, an endpoint, the chat
//     ID of the spec and the state running; one that was created has the spec's pool;
//   - IDs are at most 256 bytes without control characters;
//   - an endpoint's IP is an address as text, not unspecified (0.0.0.0), not
//     multicast and without a zone, and its port is 1 to 65535;
//   - Info has a version of at most 64 bytes, a variant of at most 64 bytes of
//     printable ASCII, at most 64 abilities, of which unknown ones are passed over, and
//     a configuration schema of at most 256 KiB;
//   - a container is one session's: one that is running and known as that of
//     another session is refused;
//   - an Exec ends with an exit code or a status.
//
// The host keeps 4 KiB of a sandbox's reason, 8 KiB of an error's text, and of an
// Explain the last 100 happenings with 4 KiB of text each.
//
// # Errors
//
// A call fails with a gRPC status. Its message is for a person. Its code tells the
// host what to do next:
//
//	FAILED_PRECONDITION  runtime.ErrNotPlaced
//	NOT_FOUND            runtime.ErrNotFound
//	ALREADY_EXISTS       runtime.ErrConflict
//	ABORTED              runtime.ErrNotReady
//	OUT_OF_RANGE         runtime.ErrNotStopped
//	INVALID_ARGUMENT     runtime.ErrInvalid
//	DATA_LOSS            runtime.ErrLogsDisabled
//	UNAVAILABLE          runtime.ErrUnavailable
//
// Any other code means ErrUnavailable too, unless it reports that the host's own
// deadline has passed or that the host has cancelled the call. If an error is of
// several kinds, a bivouac.runtime.v1.ErrorDetail in the status's details names them
// all.
//
// # Marks
//
// A plugin marks each session ID that Stop or Delete was called for, and keeps the
// mark for an hour after the Delete. It removes older marks of its instance at each
// List. The host calls List soon after the start and then regularly. At its end,
// "bivouac plugin verify" starts the plugin once more with BIVOUAC_DROP_MARKS=1 and
// calls List. After that no mark of the instance must be left.
//
// # Life cycle
//
// The host calls Check of the health service, Info, and Configure where the
// plugin declares it, in this order, and nothing else before they succeeded. If the
// plugin also declares "claim", Info follows once more.
// From the start of the process to that point a plugin has 30 seconds. A
// Configure that fails with INVALID_ARGUMENT says what is wrong with the
// configuration.
//
// Then the host calls List once, to learn which sandboxes exist. From then on any
// call may come at any time. The host calls Check every 5 seconds, with a limit of 5
// seconds. After two failures in a row it takes the plugin for hung and kills it with
// SIGKILL.
//
// When the process ends or is killed, running calls fail with ErrUnavailable. So do
// all new calls until the plugin is up again. The host starts a new process after a
// pause of up to 25 ms. That limit doubles with each failure up to 30 seconds, and is
// 25 ms again after a process has run for a minute. The new process gets the whole
// configuration again. Its List and Inspect must find the sandboxes of the process
// before.
//
// To end a plugin, the host calls Shutdown, and kills the process 5 seconds later if
// it still runs. This does not stop sandboxes.
//
// Each process leads its own process group. When the plugin has ended, for whatever
// reason, the host kills everything in the group. So a sandbox that is a child of the
// plugin must be in its own session (setsid), and must not keep the plugin's standard
// output and error open.
//
// If the host itself dies by a crash or SIGKILL, it cannot kill the group. On Linux the
// kernel then kills the plugin's first process with SIGKILL, but not the helpers that
// it has started. A plugin with helpers must end them itself, with PR_SET_PDEATHSIG or
// with a pipe whose other end only the plugin holds. On other systems the plugin itself
// also runs on, and should exit when its connection ends.
package plugin
