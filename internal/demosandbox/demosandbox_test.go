package demosandbox

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shoenig/test/must"
)

func TestHandler(t *testing.T) {
	// Given a sandbox whose workspace holds a file, and a link that leads out of it.
	outside := filepath.Join(t.TempDir(), "secret")
	must.NoError(t, os.WriteFile(outside, []byte("secret"), 0o600))
	workspace := t.TempDir()
	must.NoError(t, os.WriteFile(filepath.Join(workspace, "notes.txt"), []byte("hello"), 0o600))
	must.NoError(t, os.Symlink(outside, filepath.Join(workspace, "link")))
	handler := Handler(Config{
		SessionID: "s-1", ChatID: "c-1", AgentID: `a "quoted"`, Command: []string{"/demo", "-x"}, Workspace: workspace,
	}, func() {})

	for _, test := range []struct {
		name, method, path string
		status             int
		body               string // what the body contains
	}{
		{"tells whom it serves", "GET", "/", 200, `{"agent_id":"a \"quoted\"","chat_id":"c-1","command":["/demo","-x"],"session_id":"s-1"}`},
		{"proves who answers", "GET", "/healthz", 200, "s-1"},
		{"lists the workspace", "GET", "/workspace/", 200, "notes.txt"},
		{"serves a file of it", "GET", "/workspace/notes.txt", 200, "hello"},
		{"follows no link out of it", "GET", "/workspace/link", 500, ""},
		{"climbs out of nothing", "GET", "/workspace/%2e%2e/%2e%2e/etc/passwd", 404, ""},
		{"has nothing else", "GET", "/etc/passwd", 404, ""},
		{"is read only", "POST", "/workspace/notes.txt", 405, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			answer := httptest.NewRecorder()
			handler.ServeHTTP(answer, newRequest(test.method, test.path))
			must.Eq(t, test.status, answer.Code)
			must.StrContains(t, answer.Body.String(), test.body)
			must.StrNotContains(t, answer.Body.String(), "secret")
		})
	}
}

func TestHandlerOfASpare(t *testing.T) {
	// Given a sandbox that has no chat yet, and whose workspace is a link.
	dir := t.TempDir()
	config := Config{SessionID: "s-1", Workspace: filepath.Join(dir, "workspace"), SessionFile: filepath.Join(dir, "session.json")}
	for _, folder := range []string{"empty", "volume"} {
		must.NoError(t, os.Mkdir(filepath.Join(dir, folder), 0o700))
	}
	must.NoError(t, os.WriteFile(filepath.Join(dir, "volume", "notes.txt"), []byte("hello"), 0o600))
	must.NoError(t, os.Symlink("empty", config.Workspace))
	handler := Handler(config, func() {})
	answers := func(path string, status int, body string) {
		t.Helper()
		answer := httptest.NewRecorder()
		handler.ServeHTTP(answer, newRequest(http.MethodGet, path))
		must.Eq(t, status, answer.Code)
		must.StrContains(t, answer.Body.String(), body)
	}
	answers("/", 200, `{"agent_id":"","chat_id":"","command":null,"session_id":"s-1"}`)
	answers("/workspace/notes.txt", 404, "")

	// When it gets one, then it tells of it, and shows its files.
	must.NoError(t, os.WriteFile(config.SessionFile, []byte(`{"session_id":"s-1","chat_id":"c-1","agent_id":"a-1"}`), 0o600))
	must.NoError(t, os.Remove(config.Workspace))
	must.NoError(t, os.Symlink("volume", config.Workspace))
	answers("/", 200, `{"agent_id":"a-1","chat_id":"c-1","command":null,"session_id":"s-1"}`)
	answers("/workspace/notes.txt", 200, "hello")

	for name, text := range map[string]string{"of another session": `{"session_id":"s-2"}`, "that is damaged": "{"} {
		t.Run("it believes no file "+name, func(t *testing.T) {
			must.NoError(t, os.WriteFile(config.SessionFile, []byte(text), 0o600))
			answers("/", 500, "session file: ")
		})
	}
}

// newRequest is a request as a caller sends it who knows the endpoint.
func newRequest(method, path string) *http.Request {
	request := httptest.NewRequest(method, path, nil)
	request.Host = "127.0.0.1:8080"
	return request
}

func TestHandlerRefusesWebPages(t *testing.T) {
	workspace := t.TempDir()
	must.NoError(t, os.WriteFile(filepath.Join(workspace, "notes.txt"), []byte("hello"), 0o600))

	for _, test := range []struct {
		name      string
		host      string
		header    http.Header
		forbidden bool
	}{
		{"curl at the endpoint", "127.0.0.1:18620", nil, false},
		{"curl at the address of a node", "192.0.2.7:30123", nil, false},
		{"curl at an IPv6 address", "[::1]:18620", nil, false},
		{"curl at an IPv6 address and port 80", "[::1]", nil, false},
		{"curl at localhost", "localhost:18620", nil, false},
		{"a browser whose user typed the address", "127.0.0.1:18620", http.Header{"Sec-Fetch-Site": {"none"}}, false},
		{"a page of the sandbox itself", "127.0.0.1:18620", http.Header{"Sec-Fetch-Site": {"same-origin"}}, false},
		{"a page of the sandbox itself in an old browser", "127.0.0.1:18620", http.Header{"Origin": {"http://127.0.0.1:18620"}}, false},

		{"a page whose name points here", "evil.example:18620", nil, true},
		{"a name that looks like an address", "127.0.0.1.evil.example:18620", nil, true},
		{"no host", "", nil, true},
		{"a page of another site", "127.0.0.1:18620", http.Header{"Sec-Fetch-Site": {"cross-site"}}, true},
		{"a page of another port", "127.0.0.1:18620", http.Header{"Sec-Fetch-Site": {"same-site"}}, true},
		{"a page of another site in an old browser", "127.0.0.1:18620", http.Header{"Origin": {"https://evil.example"}}, true},
		{"a page without an origin", "127.0.0.1:18620", http.Header{"Origin": {"null"}}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			exited := false
			handler := Handler(Config{Workspace: workspace}, func() { exited = true })
			for _, request := range []*http.Request{newRequest(http.MethodGet, "/workspace/notes.txt"), newRequest(http.MethodPost, "/exit")} {
				request.Host, request.Header = test.host, test.header
				answer := httptest.NewRecorder()
				handler.ServeHTTP(answer, request)
				must.Eq(t, test.forbidden, answer.Code == http.StatusForbidden, must.Sprint(request.Method, answer.Body))
			}
			must.Eq(t, !test.forbidden, exited)
		})
	}
}

func TestHandlerRefusesStrangers(t *testing.T) {
	workspace := t.TempDir()
	const right, wrong = "Bearer t0ken", "Bearer t0kem"

	for _, test := range []struct {
		name          string
		token         string
		require       bool
		method, path  string
		authorization string
		status        int
	}{
		{"lets the caller with the token in", "t0ken", true, "GET", "/", right, 200},
		{"refuses one without", "t0ken", true, "GET", "/", "", 401},
		{"refuses one with another", "t0ken", true, "GET", "/", wrong, 401},
		{"refuses one with a part of it", "t0ken", true, "GET", "/", "Bearer t0k", 401},
		{"refuses one with an empty one", "t0ken", true, "GET", "/", "Bearer ", 401},
		{"refuses the token as something else", "t0ken", true, "GET", "/", "Basic t0ken", 401},
		{"refuses the volume to strangers", "t0ken", true, "GET", "/workspace/", "", 401},
		{"refuses its end to strangers", "t0ken", true, "POST", "/exit", "", 401},
		{"proves who answers to anybody", "t0ken", true, "GET", "/healthz", "", 200},
		{"refuses everybody if it has no token", "", true, "GET", "/", "Bearer ", 401},

		{"lets everybody in if it requires none", "t0ken", false, "GET", "/", "", 200},
		{"lets the caller with the token in even so", "t0ken", false, "GET", "/", right, 200},
		{"refuses one with another even so", "t0ken", false, "GET", "/", wrong, 401},
		{"lets everybody in if it has none and requires none", "", false, "GET", "/", right, 200},
	} {
		t.Run(test.name, func(t *testing.T) {
			exited := false
			handler := Handler(Config{AccessToken: test.token, RequireToken: test.require, Workspace: workspace}, func() { exited = true })
			request := newRequest(test.method, test.path)
			if test.authorization != "" {
				request.Header.Set("Authorization", test.authorization)
			}
			answer := httptest.NewRecorder()
			handler.ServeHTTP(answer, request)
			must.Eq(t, test.status, answer.Code)
			must.Eq(t, test.status == 401, answer.Header().Get("WWW-Authenticate") == "Bearer")
			must.False(t, exited)
			must.StrNotContains(t, answer.Body.String(), "t0ken")
		})
	}
}

func TestRunThatRequiresATokenNeedsOne(t *testing.T) {
	err := Run(t.Context(), Config{Addr: "127.0.0.1:0", Workspace: t.TempDir(), RequireToken: true})
	must.ErrorIs(t, err, errNoToken)
}

func TestFromEnv(t *testing.T) {
	env := map[string]string{"PORT": "9000", "BIVOUAC_SESSION_ID": "s-1", "BIVOUAC_ACCESS_TOKEN": "t0ken"}
	config := FromEnv(func(name string) string { return env[name] })
	must.Eq(t, Config{Addr: "127.0.0.1:9000", SessionID: "s-1", Workspace: "/workspace", AccessToken: "t0ken"}, config)

	env["BIVOUAC_BIND"] = "0.0.0.0"
	must.Eq(t, "0.0.0.0:9000", FromEnv(func(name string) string { return env[name] }).Addr)
	env["BIVOUAC_SESSION_FILE"] = "/run/bivouac/session.json"
	must.Eq(t, env["BIVOUAC_SESSION_FILE"], FromEnv(func(name string) string { return env[name] }).SessionFile)
}

func TestRunEndsAtOnce(t *testing.T) {
	// Given a running sandbox with a request that never ends.
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must.NoError(t, err)
	addr := listener.Addr().String()
	must.NoError(t, listener.Close())
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, Config{Addr: addr, SessionID: "s-1", Workspace: t.TempDir()}) }()
	var conn net.Conn
	for conn == nil && ctx.Err() == nil {
		conn, _ = net.Dial("tcp", addr)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_, err = io.WriteString(conn, "GET / HTTP/1.1\r\n")
	must.NoError(t, err)

	// When it is told to stop, then it does, and drops the connection.
	stop()
	must.NoError(t, <-done)
	_, err = http.Get("http://" + addr + "/")
	must.Error(t, err)
}

func TestRunNeedsItsWorkspace(t *testing.T) {
	err := Run(t.Context(), Config{Addr: "127.0.0.1:0", Workspace: filepath.Join(t.TempDir(), "missing")})
	must.ErrorIs(t, err, os.ErrNotExist)
}

func TestRunOfASpareNeedsNoWorkspace(t *testing.T) {
	dir := t.TempDir()
	err := Run(t.Context(), Config{Addr: "127.0.0.1:no-port", Workspace: filepath.Join(dir, "missing"), SessionFile: filepath.Join(dir, "session.json")})
	must.ErrorContains(t, err, "no-port") // it gets as far as to listen
}

func TestRunExitsWhenItIsTold(t *testing.T) {
	// Given a running sandbox, and nobody who knows yet where.
	exited := false
	answer := httptest.NewRecorder()

	// When it is told to exit, then it does.
	Handler(Config{}, func() { exited = true }).ServeHTTP(answer, newRequest(http.MethodPost, "/exit"))
	must.True(t, exited)
}

func TestHandlerPrints(t *testing.T) {
	var stdout, stderr strings.Builder
	handler := Handler(Config{Stdout: &stdout, Stderr: &stderr}, func() {})
	for path, text := range map[string]string{"/print": "hello\n", "/print?stream=stderr": "oh\n"} {
		request := httptest.NewRequest(http.MethodPost, path, strings.NewReader(text))
		request.Host = "127.0.0.1:8080"
		answer := httptest.NewRecorder()
		handler.ServeHTTP(answer, request)
		must.Eq(t, http.StatusOK, answer.Code)
	}
	must.Eq(t, "hello\n", stdout.String())
	must.Eq(t, "oh\n", stderr.String())
}

// The test binary is also the program that does things.
func TestMain(m *testing.M) {
	os.Exit(Main(os.Args[1:], func() error {
		os.Exit(m.Run())
		return nil
	}))
}

func TestDo(t *testing.T) {
	for _, test := range []struct {
		actions, stdin string
		code           int
		stdout, stderr string
	}{
		{"", "", 0, "", ""},
		{"out=a err=b out=c exit=3 out=d", "", 3, "a\nc\n", "b\n"},
		{"copy out=end", "input\n", 0, "input\nend\n", ""},
		{"env=DEMO_VARIABLE dir", "", 0, "value\n/\n", ""},
		{"stubborn kill", "", -1, "", ""},
		{"size=1x1", "", 1, "", "demo-sandbox: size=1x1: inappropriate ioctl for device\n"},
		{"lock=missing", "", 1, "", "demo-sandbox: lock=missing: open /workspace/missing: no such file or directory\n"},
		{"dance", "", 1, "", "demo-sandbox: dance: unknown action\n"},
	} {
		t.Run(test.actions, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-do="+test.actions)
			cmd.Env, cmd.Dir = []string{"DEMO_VARIABLE=value", "BIVOUAC_WORKSPACE=/workspace"}, "/"
			var stdout, stderr strings.Builder
			cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(test.stdin), &stdout, &stderr
			_ = cmd.Run() // the exit code says the same
			must.Eq(t, test.code, cmd.ProcessState.ExitCode())
			must.Eq(t, test.stdout, stdout.String())
			must.Eq(t, test.stderr, stderr.String())
		})
	}
}

func TestObey(t *testing.T) {
	for _, test := range []struct {
		name    string
		order   string
		refused error
	}{
		{"runs where it is told nothing", "", nil},
		{"fails where it is told to", "exit\n", errToldToExit},
		{"hangs where it is told to, until its end", "hang", context.Canceled},
		{"hangs for a while where it is told to, or until its end", "hang 1h", context.Canceled},
	} {
		t.Run(test.name, func(t *testing.T) {
			workspace, err := os.OpenRoot(t.TempDir())
			must.NoError(t, err)
			t.Cleanup(func() { must.NoError(t, workspace.Close()) })
			must.NoError(t, workspace.WriteFile(".demo-sandbox-s-1", []byte(test.order), 0o600))
			ctx, cancel := context.WithCancel(t.Context())
			cancel()

			release, err := Obey(ctx, workspace, "s-1")
			must.ErrorIs(t, err, test.refused)
			if err != nil {
				return
			}
			// Only one of a session runs at a time.
			_, err = Obey(ctx, workspace, "s-1")
			must.ErrorIs(t, err, errSecond)
			release()
			release, err = Obey(ctx, workspace, "s-1")
			must.NoError(t, err)
			release()
		})
	}
}
