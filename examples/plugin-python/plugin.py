#!/usr/bin/python3
"""A runtime plugin of Bivouac in Python: each sandbox is a process of this machine.

It is for reading: the first half is the protocol, which every plugin speaks
whatever it is written in, the second half is a driver. A sandbox is not confined.
The protocol is documented in the Go package github.com/bivouac/bivouac/runtime/plugin,
what a driver must do in github.com/bivouac/bivouac/runtime.

It needs Linux and Debian's packages python3-grpcio and python3-cryptography.
"""

import base64
import contextlib
import datetime
import fcntl
import http.client
import json
import os
import pathlib
import random
import selectors
import shutil
import signal
import socket
import stat as stat_bits
import struct
import subprocess
import sys
import termios
import threading
import time
import uuid
from concurrent import futures

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# ---------------------------------------------------------------- the protocol

COOKIE = ("BIVOUAC_RUNTIME_PLUGIN", "2d8c7528-8d4c-4544-9587-215db8490912")
GO_PLUGIN_VERSION = 1
RUNTIME_VERSION = 1
MAX_MESSAGE = 1 << 20  # bytes
MAX_CALLS = 2048  # at a time, each on a thread: more than the host makes, so that no health check waits in line

# The messages of runtime.proto that this plugin uses, with their fields in the
# order of their numbers. A field is a string unless it has a type. "*" means
# repeated. Enums are numbers on the wire, and a map is a list of pairs. Fields that
# are not listed are ignored.
MESSAGES = """
Empty
InfoResponse      name version abilities* config_schema
ConfigureRequest  instance config_json
Spec              session_id chat_id agent_id volume_host_path created_at:Empty expires_at:Empty owner labels*:Pair access_token
Pair              key value
CreateRequest     spec:Spec
CreateResponse    stage:uint32 sandbox:Sandbox
SessionRequest    session_id
Endpoint          ip port:uint32
Sandbox           session_id chat_id container_id endpoint:Endpoint state:uint32 reason
InspectResponse   sandbox:Sandbox
ListResponse      sandboxes*:Sandbox
LogsRequest       session_id follow:bool stream:uint32 task offset:int64
LogsResponse      output:Output
Output            stream:uint32 data:bytes offset:int64
ExecRequest       start:ExecStart stdin:bytes stdin_close:bool resize:WindowSize
ExecStart         session_id command* env*:Pair dir user task tty:bool size:WindowSize
WindowSize        rows:uint32 columns:uint32
ExecResponse      output:Output exit_code:int32
ExplainResponse   happenings*:Happening
Happening         time:Timestamp text
Timestamp         seconds:int64 nanos:int32
"""
PLACED, STARTED, READY = 1, 2, 3  # Stage
STARTING, RUNNING, DEAD, LOST = 1, 2, 3, 4  # State
STDOUT, STDERR = 1, 2  # OutputStream
MAX_CHUNK = 64 << 10  # bytes of output in a message


def message_classes():
    """Makes a class of each message."""
    field = descriptor_pb2.FieldDescriptorProto
    types = {
        "": field.TYPE_STRING,
        "bool": field.TYPE_BOOL,
        "bytes": field.TYPE_BYTES,
        "int32": field.TYPE_INT32,
        "int64": field.TYPE_INT64,
        "uint32": field.TYPE_UINT32,
    }
    # With proto2, a field that is set to 0 is sent.
    file = descriptor_pb2.FileDescriptorProto(name="plugin.proto", package="bivouac", syntax="proto2")
    for line in MESSAGES.strip().splitlines():
        name, *fields = line.split()
        message = file.message_type.add(name=name)
        for number, text in enumerate(fields, start=1):
            text, _, kind = text.partition(":")
            added = message.field.add(name=text.rstrip("*"), number=number)
            added.label = field.LABEL_REPEATED if text.endswith("*") else field.LABEL_OPTIONAL
            added.type = types.get(kind, field.TYPE_MESSAGE)
            if added.type == field.TYPE_MESSAGE:
                added.type_name = ".bivouac." + kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    get = getattr(message_factory, "GetMessageClass", None) or message_factory.MessageFactory(pool).GetPrototype
    return {m.name: get(pool.FindMessageTypeByName("bivouac." + m.name)) for m in file.message_type}


M = message_classes()


class Failure(Exception):
    """What a driver raises. The code says what the host may do next."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def not_found(message):
    return Failure(grpc.StatusCode.NOT_FOUND, message)


def conflict(message):
    return Failure(grpc.StatusCode.ALREADY_EXISTS, message)


def not_placed(message):
    return Failure(grpc.StatusCode.FAILED_PRECONDITION, message)


def not_ready(message):
    return Failure(grpc.StatusCode.ABORTED, message)


def invalid(message):
    return Failure(grpc.StatusCode.INVALID_ARGUMENT, message)


def log(level, message, **values):
    """Writes a line that comes out of the host's log with its level and values."""
    print(json.dumps({"@level": level, "@message": message, **values}), file=sys.stderr, flush=True)


def unary(call, request, response):
    """Makes a handler of a function of a request and its context."""

    def handle(message, context):
        try:
            return call(message, context)
        except Failure as failure:
            context.abort(failure.code, str(failure))

    return grpc.unary_unary_rpc_method_handler(
        handle, request_deserializer=M[request].FromString, response_serializer=M[response].SerializeToString
    )


def streaming(call, request, response, handler=grpc.unary_stream_rpc_method_handler):
    """Makes a handler of a generator of answers."""

    def handle(message, context):
        try:
            yield from call(message, context)
        except Failure as failure:
            context.abort(failure.code, str(failure))

    return handler(
        handle, request_deserializer=M[request].FromString, response_serializer=M[response].SerializeToString
    )


def certificate():
    """Makes a certificate for this process alone. Returns its key and itself, as PEM, and itself as DER."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(True, False, False, False, True, True, False, False, False), critical=True
        )  # signatures, key agreement, certificates
        .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return key_pem, made.public_bytes(serialization.Encoding.PEM), made.public_bytes(serialization.Encoding.DER)


def serve(driver):
    """Serves a driver to the host until the host ends it."""
    if os.environ.get(COOKIE[0]) != COOKIE[1]:
        sys.exit("This is a runtime plugin of Bivouac. To try it: bivouac plugin run PATH")
    if str(RUNTIME_VERSION) not in os.environ.get("PLUGIN_PROTOCOL_VERSIONS", "").split(","):
        sys.exit("The host does not speak version 1 of the runtime protocol.")

    ended = threading.Event()

    def shutdown(_request, _context):
        ended.set()
        return b""  # an empty message is no bytes

    def stdio(_request, context):
        # The output goes to the host by standard error, so there is nothing to send.
        closed = threading.Event()
        if context.add_callback(closed.set):
            closed.wait()
        return iter(())

    services = {
        "bivouac.runtime.v1.DriverService": {
            "Info": unary(driver.info, "Empty", "InfoResponse"),
            "Configure": unary(driver.configure, "ConfigureRequest", "Empty"),
            "Create": streaming(driver.create, "CreateRequest", "CreateResponse"),
            "Stop": unary(driver.stop, "SessionRequest", "Empty"),
            "Delete": unary(driver.delete, "SessionRequest", "Empty"),
            "Inspect": unary(driver.inspect, "SessionRequest", "InspectResponse"),
            "List": streaming(driver.list, "Empty", "ListResponse"),
            "Logs": streaming(driver.logs, "LogsRequest", "LogsResponse"),
            "Exec": streaming(driver.exec, "ExecRequest", "ExecResponse", grpc.stream_stream_rpc_method_handler),
            "Explain": unary(driver.explain, "SessionRequest", "ExplainResponse"),
        },
        # Without serializers, messages are bytes. These are { status: SERVING }.
        "grpc.health.v1.Health": {"Check": grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"\x08\x01")},
        "plugin.GRPCController": {"Shutdown": grpc.unary_unary_rpc_method_handler(shutdown)},
        "plugin.GRPCStdio": {"StreamStdio": grpc.unary_stream_rpc_method_handler(stdio)},
    }
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=MAX_CALLS),
        options=[("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.max_send_message_length", MAX_MESSAGE)],
    )
    for name, methods in services.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))

    key, pem, der = certificate()
    credentials = grpc.ssl_server_credentials(
        [(key, pem)], root_certificates=os.environ["PLUGIN_CLIENT_CERT"].encode(), require_client_auth=True
    )
    path = os.path.join(os.environ["PLUGIN_UNIX_SOCKET_DIR"], "plugin")
    server.add_secure_port("unix:" + path, credentials)
    server.start()
    encoded = base64.b64encode(der).decode().rstrip("=")
    print(GO_PLUGIN_VERSION, RUNTIME_VERSION, "unix", path, "grpc", encoded, sep="|", flush=True)
    ended.wait()
    server.stop(grace=0.5).wait()


# ------------------------------------------------------------------ the driver

READY_LIMIT = 60  # seconds from a sandbox's start to its answer
STOP_GRACE = 5  # seconds from SIGTERM to SIGKILL
DELETED_LIFE = 3600  # seconds for which the record of a deleted sandbox is kept
MAX_LOG = 1 << 20  # bytes; a List empties a log that is longer

# Describes the configuration to people: "bivouac plugin inspect" shows it.
CONFIG_SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "required": ["command"],
    "properties": {
        "command": {"type": "array", "minItems": 1, "items": {"type": "string"}},
        "ready_path": {"type": "string", "pattern": "^/", "description": "HTTP path whose answer holds the session ID"},
        "state_dir": {"type": "string", "pattern": "^/", "default": "/var/tmp/bivouac-python"},
    },
}

# The shell waits for a line before it becomes the command. If the plugin ends
# before it has written down which process this is, the line never comes and the
# command never runs. The shell has the session's lock as its standard error: so
# until it has become the command or ended, nobody else can do a thing.
GATE = 'read -r go || exit 1; log=$1; shift; exec "$@" </dev/null 2>>"$log"'

# The guard of a command that runs in a sandbox. If its input ends without a line, as it
# does when the plugin is killed, it kills the processes whose environment has the
# command's mark. It looks twice, because one may have been about to start.
GUARD = """
read -r done && exit
for pause in 0 1; do
  sleep $pause
  while pids=$(grep -lzxF "$1" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3) && [ -n "$pids" ]; do
    kill -9 $pids
    sleep 0.02
  done
done
"""

# Makes a command the first of a new session on a terminal, which it has to open itself.
ON_TERMINAL = 'tty=$1; shift; exec "$@" <>"$tty" >&0 2>&0'


class Driver:
    """Keeps what it knows in files, so that the plugin may end at any moment and be started again."""

    def info(self, _request, _context):
        return M["InfoResponse"](
            name="python",
            version="0.1.0",
            abilities=["configure", "exec", "explain", "logs"],
            config_schema=json.dumps(CONFIG_SCHEMA),
        )

    def configure(self, request, _context):
        config = json.loads(request.config_json)
        if unknown := config.keys() - CONFIG_SCHEMA["properties"].keys():
            raise invalid(f"unknown keys: {', '.join(sorted(unknown))}")
        self.command = config.get("command")
        if not isinstance(self.command, list) or not self.command or not all(isinstance(word, str) for word in self.command):
            raise invalid("command must be a list of a program and its arguments")
        for key in ("ready_path", "state_dir"):
            if not str(config.get(key, "/")).startswith("/"):
                raise invalid(f"{key} must begin with /")
        self.ready_path = config.get("ready_path")
        self.ports = Ports()
        self.deleted_life = 0 if os.environ.get("BIVOUAC_DROP_MARKS") == "1" else DELETED_LIFE
        self.folder = pathlib.Path(config.get("state_dir", "/var/tmp/bivouac-python"), request.instance)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.folder.parent, self.folder):
                check_own(folder)
        except OSError as error:
            raise invalid(f"state_dir: {error}") from error
        return M["Empty"]()

    def create(self, request, context):
        spec = request.spec
        if not os.path.isdir(spec.volume_host_path):
            raise invalid(f"{spec.volume_host_path} is not a folder")
        record = self.begin(spec, context)
        yield M["CreateResponse"](stage=PLACED)
        yield M["CreateResponse"](stage=STARTED)
        self.await_ready(record, context)
        with self.locked(spec.session_id, context):
            record = self.load(spec.session_id)
            if record.get("ended"):
                raise conflict(f"session {spec.session_id} was stopped while it started")
            record["ready"] = True
            self.save(spec.session_id, record)
        sandbox = self.sandbox(record)
        if sandbox.state != RUNNING:
            raise not_ready(f"it has ended since it answered: {sandbox.reason}")
        yield M["CreateResponse"](stage=READY)
        log("debug", "sandbox_ready", session_id=spec.session_id, pid=record["pid"])
        yield M["CreateResponse"](sandbox=sandbox)

    def begin(self, spec, context):
        """Starts a sandbox's process, or finds that it was started."""
        wanted = {name: getattr(spec, name) for name in ("session_id", "chat_id", "agent_id", "volume_host_path")}
        with self.locked(spec.session_id, context) as lock:
            record = self.load(spec.session_id)
            if record.get("ended"):
                raise conflict(f"session {spec.session_id} was stopped")
            if record.get("spec", wanted) != wanted:
                raise conflict(f"session {spec.session_id} has another spec")
            if "pid" in record:
                return record
            if not context.is_active():
                raise not_ready("the host has given up")
            record = {"spec": wanted, "port": self.ports.free(), "mark": "BIVOUAC_SANDBOX=" + uuid.uuid4().hex, "begun": time.time()}
            self.save(spec.session_id, record)
            with open(self.log(spec.session_id, STDOUT), "ab") as output:
                process = subprocess.Popen(
                    ["/bin/sh", "-c", GATE, "sandbox", self.log(spec.session_id, STDERR), *self.command],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=lock,
                    start_new_session=True,  # the host ends the plugin's own process group with it
                    env={
                        "PATH": os.environ["PATH"],
                        "PORT": str(record["port"]),
                        "BIVOUAC_SESSION_ID": spec.session_id,
                        "BIVOUAC_CHAT_ID": spec.chat_id,
                        "BIVOUAC_AGENT_ID": spec.agent_id,
                        "BIVOUAC_WORKSPACE": spec.volume_host_path,
                        "BIVOUAC_ACCESS_TOKEN": spec.access_token,
                        **variable(record["mark"]),
                    },
                )
            threading.Thread(target=process.wait, daemon=True).start()
            record["pid"], record["start"] = process.pid, start_of(process.pid)
            self.save(spec.session_id, record)
            with contextlib.suppress(BrokenPipeError), process.stdin as gate:
                gate.write(b"go\n")
            return record

    def await_ready(self, record, context):
        deadline = time.monotonic() + READY_LIMIT
        while not self.answers(record):
            if not context.is_active():
                raise not_ready("the host has given up")
            if not runs(record):
                raise not_ready("its process has ended")
            if time.monotonic() > deadline:
                raise not_ready(f"it did not answer within {READY_LIMIT} s")
            time.sleep(0.01)

    def answers(self, record):
        try:
            if not self.ready_path:
                socket.create_connection(("127.0.0.1", record["port"]), timeout=2).close()
                return True
            connection = http.client.HTTPConnection("127.0.0.1", record["port"], timeout=2)
            with contextlib.closing(connection):
                connection.request("GET", self.ready_path)
                answer = connection.getresponse()
                return answer.status == 200 and record["spec"]["session_id"].encode() in answer.read(4096)
        except (OSError, http.client.HTTPException):
            return False

    def stop(self, request, context):
        self.end(request.session_id, context)
        return M["Empty"]()

    def delete(self, request, context):
        self.end(request.session_id, context)
        with self.locked(request.session_id, context):
            self.save(request.session_id, {"ended": True, "deleted": True})
            for stream in (STDOUT, STDERR):
                self.log(request.session_id, stream).unlink(missing_ok=True)
        return M["Empty"]()

    def end(self, session_id, context):
        """Ends a sandbox, and returns once nothing of it runs."""
        with self.locked(session_id, context):
            record = self.load(session_id)
            if not record.get("ended"):
                record["ended"] = time.time()
                record["reason"] = "stopped" if runs(record) else "its process has ended"
                self.save(session_id, record)
            began = time.monotonic()
            while pids := members(record):
                if not context.is_active():
                    raise Failure(grpc.StatusCode.UNAVAILABLE, "it still runs")
                patient = time.monotonic() - began < STOP_GRACE
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM if patient else signal.SIGKILL)
                time.sleep(0.01)

    def inspect(self, request, _context):
        record = self.load(request.session_id)
        if "spec" not in record:
            raise not_found(f"no session {request.session_id}")
        return M["InspectResponse"](sandbox=self.sandbox(record))

    def list(self, _request, _context):
        for file in self.folder.glob("*.json"):
            record = self.load(file.stem)
            if "spec" in record:
                self.cut_logs(file.stem)
                yield M["ListResponse"](sandboxes=[self.sandbox(record)])
            elif record.get("deleted"):
                self.expire(file)

    def expire(self, file):
        """Removes the record of a sandbox that was deleted long ago. The record goes last: once it is gone, so is all else."""
        with contextlib.suppress(FileNotFoundError):  # another List was quicker
            if time.time() - file.stat().st_mtime >= self.deleted_life:
                file.with_suffix(".lock").unlink(missing_ok=True)
                file.unlink()

    def log(self, session_id, stream):
        return self.file(session_id, ".stderr" if stream == STDERR else ".stdout")

    def cut_logs(self, session_id):
        """Empties logs that are too long. The sandbox appends, so it goes on at the beginning."""
        for stream in (STDOUT, STDERR):
            with contextlib.suppress(FileNotFoundError):
                if self.log(session_id, stream).stat().st_size > MAX_LOG:
                    os.truncate(self.log(session_id, stream), 0)

    def logs(self, request, context):
        record = self.load(request.session_id)
        if "spec" not in record:
            raise not_found(f"no session {request.session_id}")
        if request.task:
            raise invalid("a process has no tasks")
        try:
            file = open(self.log(request.session_id, request.stream), "rb")
        except FileNotFoundError:
            return  # it has not started
        with file:
            size = os.fstat(file.fileno()).st_size
            offset = max(size + request.offset, 0) if request.offset < 0 else min(request.offset, size)
            while context.is_active():
                more = request.follow and runs(record)  # if it ends after that, there is another round
                if os.fstat(file.fileno()).st_size < offset:
                    offset = 0  # it was cut
                file.seek(offset)
                data = file.read(MAX_CHUNK)
                if data:
                    yield M["LogsResponse"](output=M["Output"](stream=request.stream, data=data, offset=offset))
                    offset += len(data)
                elif more:
                    time.sleep(0.05)
                else:
                    return

    def explain(self, request, _context):
        record = self.load(request.session_id)
        if "spec" not in record:
            raise not_found(f"no session {request.session_id}")
        told = []
        if "pid" in record:
            told.append(M["Happening"](text=f"process {record['pid']} started", time=timestamp(record["begun"])))
        if record.get("ended"):
            told.append(M["Happening"](text=record["reason"], time=timestamp(record["ended"])))
        elif "pid" in record and not runs(record):
            told.append(M["Happening"](text="its process has ended"))
        return M["ExplainResponse"](happenings=told)

    def exec(self, requests, context):
        start = next(requests).start
        if start.task or start.user:
            raise invalid("a process has no tasks, and no other user")
        if "pid" not in self.load(start.session_id):  # do not make a lock for it
            raise not_found(f"no session {start.session_id}")
        with Command(context) as command:
            with self.locked(start.session_id, context):  # a Stop finds the command, or the command finds that it is too late
                record = self.load(start.session_id)
                if record.get("ended") or not runs(record):
                    raise not_found(f"no sandbox of session {start.session_id} runs")
                command.start(start, environment(record["pid"]))
            threading.Thread(target=command.send_input, args=(requests,), daemon=True).start()
            for stream, data in command.output():
                yield M["ExecResponse"](output=M["Output"](stream=stream, data=data))
            if context.is_active():
                yield M["ExecResponse"](exit_code=command.exit_code())

    def sandbox(self, record):
        sandbox = M["Sandbox"](
            session_id=record["spec"]["session_id"],
            chat_id=record["spec"]["chat_id"],
            container_id=f"{record.get('pid', 0)}-{record['spec']['session_id']}",
            endpoint=M["Endpoint"](ip="127.0.0.1", port=record["port"]),
            state=RUNNING if record.get("ready") else STARTING,
        )
        if not runs(record) and ("pid" in record or record.get("ended")):
            sandbox.state = DEAD
            sandbox.reason = record.get("reason", "its process has ended")
        return sandbox

    @contextlib.contextmanager
    def locked(self, session_id, context):
        """Keeps all others away from a session, also other processes."""
        with open(self.file(session_id, ".lock"), "w") as lock:
            while not taken(lock):
                if not context.is_active():
                    raise Failure(grpc.StatusCode.UNAVAILABLE, "another call for the session is under way")
                time.sleep(0.01)
            yield lock

    def load(self, session_id):
        try:
            return json.loads(self.file(session_id, ".json").read_text())
        except FileNotFoundError:
            return {}

    def save(self, session_id, record):
        new = self.file(session_id, ".new")
        with open(new, "w") as file:
            file.write(json.dumps(record))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.file(session_id, ".json"))

    def file(self, session_id, suffix):
        if not session_id or "/" in session_id or "." in session_id:
            raise invalid(f"session ID {session_id!r}")
        return self.folder / (session_id + suffix)


class Command:
    """A command in a sandbox. It is killed when its call ends before it does, and also when the plugin is killed."""

    def __init__(self, context):
        self.context = context
        self.mark = "BIVOUAC_EXEC=" + uuid.uuid4().hex

    def __enter__(self):
        self.guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, "guard", self.mark],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={"PATH": os.environ["PATH"]},
        )
        threading.Thread(target=self.guard.wait, daemon=True).start()
        if not self.context.add_callback(self.guard.stdin.close):
            self.guard.stdin.close()
        self.files = []
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ValueError, OSError):  # it is closed if the call has ended
            self.guard.stdin.close()
        for file in self.files:
            file.close()

    def start(self, start, env):
        self.tty = start.tty
        words = list(start.command)
        env.update({pair.key: pair.value for pair in start.env}, **variable(self.mark))
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        if self.tty:
            if not shutil.which(words[0], path=env.get("PATH")):
                raise invalid(f"{words[0]} is not a program")
            terminal, other_end = (open(fd, "r+b", buffering=0) for fd in os.openpty())
            self.files = [terminal, other_end]
            words = ["/bin/sh", "-c", ON_TERMINAL, "sh", os.ttyname(other_end.fileno()), *words]
            streams = dict.fromkeys(streams, subprocess.DEVNULL)
        try:
            self.process = subprocess.Popen(
                words, env=env, cwd=start.dir or env["BIVOUAC_WORKSPACE"], start_new_session=True, bufsize=0, **streams
            )
        except OSError as error:
            raise invalid(str(error)) from error
        if self.tty:
            self.stdin, self.outputs = terminal, {terminal: STDOUT}
            if start.HasField("size"):
                self.resize(start.size)
        else:
            self.stdin, self.outputs = self.process.stdin, {self.process.stdout: STDOUT, self.process.stderr: STDERR}
            self.files = [self.process.stdin, *self.outputs]

    def resize(self, size):
        fcntl.ioctl(self.stdin, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.columns, 0, 0))

    def send_input(self, requests):
        with contextlib.suppress(grpc.RpcError, ValueError, OSError):  # the call or the command has ended
            for request in requests:
                if request.HasField("resize") and self.tty:
                    self.resize(request.resize)
                elif request.HasField("stdin"):
                    self.stdin.write(request.stdin)
                elif request.HasField("stdin_close") and not self.tty:
                    self.stdin.close()

    def output(self):
        """Yields what the command prints until it has ended. What it left in the background may print on."""
        with selectors.DefaultSelector() as selector:
            for file in self.outputs:
                selector.register(file, selectors.EVENT_READ)
            while self.context.is_active():
                ended = self.process.poll() is not None
                ready = selector.select(0 if ended else 0.05)
                for key, _ in ready:
                    try:
                        data = os.read(key.fd, MAX_CHUNK)
                    except OSError:  # nobody has the terminal any more
                        data = b""
                    if data:
                        yield self.outputs[key.fileobj], data
                    else:
                        selector.unregister(key.fileobj)
                if ended and not ready:
                    return

    def exit_code(self):
        self.guard.stdin.write(b"done\n")
        self.guard.stdin.flush()
        code = self.process.wait()
        return code if code >= 0 else 128 - code


def variable(text):
    name, _, value = text.partition("=")
    return {name: value}


def timestamp(seconds):
    return M["Timestamp"](seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def taken(lock):
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def check_own(folder):
    """What the records say is done to processes: nobody else may write them."""
    found = folder.lstat()
    if not stat_bits.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise invalid(f"state_dir: {folder} must be a directory that only this user can write to")


class Ports:
    """The ports of sandboxes. They are below those that Linux gives to clients and those that Nomad assigns."""

    FIRST, LAST = 10000, 19999

    def __init__(self):
        self.lock = threading.Lock()
        self.next = random.randint(self.FIRST, self.LAST)

    def free(self):
        """Returns a port on which nobody listens. Two calls at a time never return the same one."""
        with self.lock:
            for _ in range(self.FIRST, self.LAST + 1):
                port, self.next = self.next, self.next + 1 if self.next < self.LAST else self.FIRST
                with contextlib.suppress(OSError), socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
                    return port
        raise not_placed(f"no port from {self.FIRST} to {self.LAST} is free")


def stat(pid):
    """Returns the state, process group and start time of a process from its stat file."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[2]), fields[19]


def start_of(pid):
    """Tells one process from a later one with the same ID."""
    found = stat(pid)
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{found[2]}" if found else None


def runs(record):
    """Says whether a process of the sandbox runs."""
    pid = record.get("pid")
    found = stat(pid) if pid else None
    if found and start_of(pid) == record["start"] and not is_gone(pid, found[0]):
        return True
    return bool(members(record))


def members(record):
    """Returns the processes of the sandbox: those of its group, and the commands that were run in it."""
    pid = record.get("pid")
    if pid is None:
        return []
    reused = start_of(pid) not in (None, record["start"])
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        seen = stat(entry)
        if seen and not is_gone(entry, seen[0]):
            if seen[1] == pid and not reused or variable(record["mark"]).items() <= environment(entry).items():
                found.append(int(entry))
    return found


def environment(pid):
    """Returns the environment that a process was started with, if this user may see it."""
    try:
        text = pathlib.Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in os.fsdecode(text).split("\0") if "=" in word)


def is_gone(pid, state):
    """A zombie may still have other threads, and with them its sockets."""
    try:
        return state in "ZX" and len(os.listdir(f"/proc/{pid}/task")) == 1
    except OSError:
        return True


if __name__ == "__main__":
    serve(Driver())
